"""The teams of a log: one worker that uses it and, unless the log is in that worker's process, what
hosts it, a worker too (the role ``host``) or a program of the side's own (its ``helpers``).

Their directory is on a disk. What the log says it holds is compared with what it was given: no
record that it lost counts as speed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import disk
from bench.processes import START_S, Failed, Process
from bench.setting import Setting
from bench.sides import module_of
from bench.teams import STALL_S, LatencyTeam, RateTeam, Team

LONG_S = 600.0
"""For a whole log to be written or read."""
HOST = "host"


class LogTeam(Team):
    ROLES = ("log",)

    def __init__(self, side: str, setting: Setting) -> None:
        super().__init__(side, setting)
        self.appended = 0

    def place(self) -> str:
        return disk.place()

    def _steps(self) -> Iterator[None]:
        yield from self._hosted()
        self.log = self._worker("log")
        yield
        self.log.answer()
        self.log.ask("connect")
        yield
        self.log.answer()

    def _hosted(self, number: int = 0) -> Iterator[None]:
        self.host: Process | None = None
        if self.helpers:
            self.host = self.helpers[-1]
        elif self.setting.transport != "disk" and HOST in module_of(self.side).ROLES:
            self.host = host = self._worker(HOST, number)
            yield
            host.answer()

    def fill(self, count: int) -> None:
        """Append so many, out of anybody's time."""
        self._append(count, LONG_S)

    def _append(self, count: int, seconds: float) -> float:
        answer = self._asked("do_append_all", count, seconds)
        self._stored(count, answer)
        return count / float(answer["elapsed"])

    def _stored(self, count: int, answer: dict[str, Any]) -> None:
        self.appended += count
        self.lost = abs(self.appended - answer["stored"])  # what is there twice is no better

    def _read(self, count: int) -> float:
        answer = self._asked("do_read", count, LONG_S)
        self._check(count, answer["count"], answer["total"])
        return count / float(answer["elapsed"])

    def _check(self, count: int, found: int, total: int) -> None:
        self.lost += count - found
        if found == count and total != self.setting.total(count):
            raise Failed(f"{self.side}: records are not what was appended")

    def _asked(self, do: str, count: int, seconds: float, **more: Any) -> dict[str, Any]:
        self.log.ask(do, count=count, seconds=seconds, **more)
        return self.log.answer(seconds + START_S)


class AppendTeam(LogTeam, LatencyTeam):
    """Appends one record after the other, and waits for each."""

    def calls(self, count: int, at_once: int) -> dict[str, Any]:
        answer = self._asked("do_append", count, STALL_S)
        self._stored(count, answer)
        return answer


class AppendManyTeam(LogTeam, RateTeam):
    """Appends as fast as it goes."""

    def block(self, count: int) -> float:
        return self._append(count, STALL_S)


class ReplayTeam(LogTeam, RateTeam):
    """Reads a log of `Setting.records` from its start, all of it if a block is of so many."""

    def _steps(self) -> Iterator[None]:
        yield from super()._steps()
        self.fill(self.setting.records)

    def block(self, count: int) -> float:
        return self._read(count)


class ConsumeTeam(LogTeam, RateTeam):
    """Consumes what was appended before, and acknowledges each record."""

    def block(self, count: int) -> float:
        self.fill(count)
        answer = self._asked("do_consume", count, STALL_S, all_in_all=self.appended)
        self._check(count, count, answer["total"])
        self.lost = self.appended - answer["acknowledged"]
        return count / float(answer["elapsed"])


class OpenTeam(LogTeam):
    """Ends the host of a log of `Setting.records` properly, starts it again and reads."""

    def _steps(self) -> Iterator[None]:
        yield from super()._steps()
        self.fill(self.setting.records)
        self._turn = 0

    def reopened(self, count: int) -> tuple[float, float]:
        """(seconds from the start of the host to the first record, MB that it had at most until
        `count` records had been read)."""
        if self.host is None:
            raise Failed(f"{self.side}: no process hosts its log")
        self._turn += 1
        self.log.kill()
        self.host.end()
        self.log = self._worker("log", self._turn)
        self.log.answer()
        start = time.perf_counter()
        self.helpers = self._helpers()
        for _ in self._hosted(self._turn):
            continue
        self.log.ask("connect")
        self.log.answer()
        self._read(1)
        elapsed = time.perf_counter() - start
        self._read(count)
        return elapsed, _memory_max(self.host.pid)


def _memory_max(pid: int) -> float:
    """The most MB it ever had of memory: proc_pid_status(5), VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise Failed("its memory is not known")
