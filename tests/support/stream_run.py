"""A run in which producers, sidecars, consumers and readers are killed at random, and come back."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.history import Judgement, judge
from tests.support.history_events import load

GROUPS = {"billing": "any", "shipping": "key"}
_SIDECAR = "from mesh.cli import main; main()"
_PROGRAM = "import sys; from tests.support import stream_programs as p; p.{}(*sys.argv[1:])"


class Player:
    """One that is started again and again."""

    def __init__(self, name: str, source: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.runs = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._source = source
        self._arguments = arguments
        self._log = log

    def start(self) -> None:
        if self.process is not None:
            self._gone(10)  # also one that ended by itself leaves the pipe to it open
        self.runs += 1
        arguments = [each.replace("RUN", str(self.runs)) for each in self._arguments]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self._source, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self._gone(10)

    def end(self, timeout: float = 90) -> None:
        """Have it end by itself."""
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._gone(timeout)

    def terminate(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self._gone(20)

    def _gone(self, timeout: float) -> None:
        assert self.process is not None
        self.process.wait(timeout)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


def run(
    folder: Path,
    *,
    seconds: float,
    seed: int,
    producers: int = 4,
    sidecars: int = 2,
    consumers: int = 3,
    killed: tuple[str, ...] = ("",),
    planted: str = "",
) -> Judgement:
    """Let them play, kill and start them, and judge what they wrote down. `killed`: those alone
    whose names begin so. `planted`: in the sidecars (`tests.support.planted`)."""
    luck = random.Random(seed)
    history, errors = folder / "history", folder / "errors.txt"
    history.mkdir()
    logs = [folder / f"log{n}" for n in range(sidecars)]
    players = [
        Player(f"sidecar{n}", _sidecar(planted), ["sidecar", str(log)], errors)
        for n, log in enumerate(logs)
    ]
    for player in players:
        player.start()
    partitions = [_partition_of(log) for log in logs]
    program = _PROGRAM.format
    others = [
        Player(
            f"producer{n}",
            program("produce"),
            [str(history), f"producer{n}", "RUN", partitions[n % sidecars]],
            errors,
        )
        for n in range(producers)
    ]
    for group, order in GROUPS.items():
        others += [
            Player(
                f"{group}{n}",
                program("consume"),
                [str(history), f"{group}{n}", "RUN", group, order],
                errors,
            )
            for n in range(consumers)
        ]
    others.append(Player("reader", program("follow"), [str(history), "reader", "RUN"], errors))
    for player in others:
        player.start()
    try:
        for log in logs:  # or a producer that is killed as it starts leaves it without the stream
            _has_begun(log)
        victims = [each for each in (*players, *others) if each.name.startswith(killed)]
        deadline = time.monotonic() + seconds
        time.sleep(min(3.0, seconds / 3))  # until all of them have begun
        while time.monotonic() < deadline:
            together = luck.sample(victims, luck.choice((1, 2)))
            for victim in together:
                victim.kill()
            time.sleep(luck.uniform(0.0, 0.3))
            for victim in together:
                victim.start()
            time.sleep(luck.uniform(0.1, 0.8))
        for player in others:
            assert player.process is not None
            if player.process.poll() is not None:
                player.start()  # it gave up, as it may
        time.sleep(1.0)
        for player in others:
            player.end()
        settle = f"from tests.support.stream_programs import settle; settle({str(history)!r}, "
        settle += f"{list(GROUPS)!r}, {sidecars})"
        subprocess.run([sys.executable, "-c", settle], check=True, timeout=200)
    finally:
        for player in others:
            if player.process is not None and player.process.poll() is None:
                player.kill()
        for player in players:
            player.terminate()
    return judge(load(history), key_ordered=["shipping"], on_the_way_s=0.5)


def _sidecar(planted: str) -> str:
    if not planted:
        return _SIDECAR
    return f"""
from tests.support.planted import PLANTED
with PLANTED[{planted!r}]():
    {_SIDECAR}
"""


def _has_begun(log: Path) -> None:
    deadline = time.monotonic() + 30
    while not list(log.glob("streams/*/*.log")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _partition_of(log: Path) -> str:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(FileNotFoundError):
            if text := (log / "identity").read_text().strip():
                return text
        assert time.monotonic() < deadline
        time.sleep(0.02)
