"""A team is what one side needs for one setting: its workers, and what they are asked to do.

Teams are made once for a setting and kept for all its rounds; those whose turn it is not wait for
their pipes.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import struct
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.processes import Failed, Process, Worker
from bench.setting import Address, Setting
from bench.sides import module_of

STALL_S = 20.0
"""A block may take so long; it is made to take a fraction of a second."""
_COUNTS = struct.Struct("<qq")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Team(ABC):
    """The workers of one side, connected with each other."""

    ROLES: tuple[str, ...] = ()
    """Of its workers. Who has not all of them is not measured."""

    def __init__(self, side: str, setting: Setting) -> None:
        self.side = side
        self.setting = setting
        self.lost = 0
        self._ending = contextlib.ExitStack()
        directory = self._ending.enter_context(
            tempfile.TemporaryDirectory(prefix="mesh-bench-", dir=self.place())
        )
        self.address = Address(directory=directory, port=free_port(), transport=setting.transport)

    def place(self) -> str | None:
        """Where its directory is made. None: where temporary ones are."""
        return None

    def opening(self) -> Iterator[None]:
        """Start all and connect them; each step but the last leaves somebody to wait for, so that
        other teams can take theirs meanwhile. Raises `Failed`; `close` is due even then."""
        self.helpers = self._helpers()
        yield from self._steps()

    @abstractmethod
    def _steps(self) -> Iterator[None]: ...

    def _helpers(self) -> list[Process]:
        """The programs that the side needs besides its workers, started."""
        helpers = []
        for command in getattr(module_of(self.side), "helpers", lambda _: [])(self.address):
            helpers.append(Process(command, directory=self.address.directory))
            self._ending.callback(helpers[-1].kill)
        return helpers

    def _worker(self, role: str, number: int = 0) -> Worker:
        worker = Worker(self.side, role, self.setting, self.address, number)
        self._ending.callback(worker.kill)
        return worker

    def close(self) -> None:
        self._ending.close()


class RateTeam(Team):
    """Its blocks are so many of something, as fast as it goes."""

    @abstractmethod
    def block(self, count: int) -> float:
        """How many a second, of `count` of them."""


class LatencyTeam(Team):
    """Its blocks are so many of something, one after the other, each timed."""

    @abstractmethod
    def calls(self, count: int, at_once: int) -> dict[str, Any]:
        """`count` by each of so many at once: ``latencies`` in seconds, ``count``, ``elapsed``."""


class FlowTeam(RateTeam):
    """One who sends and one or several who receive all of it."""

    ROLES = ("publisher", "subscriber")

    def _steps(self) -> Iterator[None]:
        sender, receiver = self.ROLES
        self.sender = self._worker(sender)
        yield
        self.sender.answer()
        self.receivers = [
            self._worker(receiver, number) for number in range(self.setting.receivers)
        ]
        yield
        for one in self.receivers:
            one.answer()
        everybody = [self.sender, *self.receivers]
        for worker in everybody:
            worker.ask("connect")
        yield
        for worker in everybody:
            worker.answer()

    def block(self, count: int) -> float:
        for receiver in self.receivers:
            receiver.ask("receive", count=count, seconds=STALL_S)
        for receiver in self.receivers:
            receiver.answer()  # it listens
        self.sender.ask("send", count=count, seconds=STALL_S)
        started: float = self.sender.answer(STALL_S + 5)["start"]
        expected, ended = self.setting.total(count), started
        for receiver in self.receivers:
            got = receiver.answer(STALL_S + 5)
            ended = max(ended, got["end"])
            self._account(count, got["count"], expected, got["total"])
        return count / (ended - started)

    def _account(self, sent: int, received: int, expected: int, total: int) -> None:
        self.lost += sent - received
        if sent == received and expected != total:
            raise Failed(f"{self.side}: payloads arrived changed")

    def trickle(self, count: int, hz: float) -> list[float]:
        """How long each of `count` messages, sent at `hz`, was on its way, in seconds."""
        seconds = count / hz + STALL_S
        (receiver,) = self.receivers
        receiver.ask("latencies", count=count, seconds=seconds)
        receiver.answer()
        self.sender.ask("trickle", count=count, hz=hz, seconds=seconds)
        self.sender.answer(seconds + 5)
        latencies: list[float] = receiver.answer(seconds + 5)["latencies"]
        self.lost += count - len(latencies)
        return latencies


class QueueTeam(FlowTeam):
    """One who pushes and several who share the tasks: nobody knows how many are for whom.

    So each counts, in memory that is looked at from here.
    """

    ROLES = ("pusher", "puller")
    LOOK_S = 0.0002

    def _steps(self) -> Iterator[None]:
        yield from super()._steps()
        self._done = self._received = 0
        self._cells: list[mmap.mmap] = []
        if len(self.receivers) == 1:
            return
        for number, receiver in enumerate(self.receivers):
            path = Path(self.address.directory, f"count-{number}")
            path.write_bytes(bytes(_COUNTS.size))
            with path.open("r+b") as file:
                cell = mmap.mmap(file.fileno(), _COUNTS.size)
            self._ending.callback(cell.close)
            self._cells.append(cell)
            receiver.ask("work", path=str(path))

    def block(self, count: int) -> float:
        if not self._cells:
            return super().block(count)
        self._done += count
        self.sender.ask("send", count=count, seconds=STALL_S)
        started: float = self.sender.answer(STALL_S + 5)["start"]
        deadline = time.perf_counter() + STALL_S
        while True:
            counts = [_COUNTS.unpack(cell[:]) for cell in self._cells]
            received, ended = sum(got for got, _ in counts), time.perf_counter()
            if received >= self._done or ended > deadline:
                break
            time.sleep(self.LOOK_S)
        self.lost = self._done - received
        return count / (ended - started)


class CallTeam(LatencyTeam):
    """One who calls and one who answers."""

    ROLES = ("server", "caller")
    AT_ONCE = "threads"

    def _steps(self) -> Iterator[None]:
        server, caller = self.ROLES
        self.server = self._worker(server)
        yield
        self.server.answer()
        self.caller = self._worker(caller)
        yield
        self.caller.answer()
        self.caller.ask("connect")
        yield
        self.caller.answer()

    def calls(self, count: int, at_once: int) -> dict[str, Any]:
        self.caller.ask("calls", count=count, seconds=STALL_S, **{self.AT_ONCE: at_once})
        return self.caller.answer(STALL_S + 5)


class AsyncCallTeam(CallTeam):
    ROLES = ("async-server", "async-caller")
    AT_ONCE = "in_flight"


@contextlib.contextmanager
def opened(teams: Sequence[Team]) -> Iterator[None]:
    """Close them all in the end, whatever happens."""
    with contextlib.ExitStack() as ending:
        for team in teams:
            ending.callback(team.close)
        yield
