"""A process that works on a log on a real disk and says what came of it, until something ends it.

`WORK` is a program for `tests.support.faults.traced`: it does `tests.support.trials.work`, twice.
`OPCODES` forks for one opcode of `small_work` after the other, which is killed there, and looks at
what that has left. What they print is read by `heard`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Final

from mesh.durable import log as logs
from mesh.durable import recovery, segment, storage
from mesh.durable.log import Log
from mesh.durable.storage import Disk, Storage
from mesh.errors import StorageFailed
from tests.support.opcodes import before_opcode
from tests.support.planted_parts import PLANTED
from tests.support.trials import Journal, work

_ROOT: Final = Path(__file__).parents[2]
_PROGRAM: Final = f"""
import sys
sys.path.insert(0, {str(_ROOT)!r})
from tests.support.log_process import {{0}} as main
main(*sys.argv[1:])
"""
WORK: Final = _PROGRAM.format("work_twice")
"""Arguments: the directory, and what is planted (`PLANTED`), if anything."""
MEND: Final = _PROGRAM.format("work_and_mend")
"""Likewise; it goes on after failures, as long as mending helps."""
OPCODES: Final = _PROGRAM.format("die_at_opcodes")
"""Arguments: a directory; from which opcode, every which, and what is planted, if anything. Prints
how many it were."""

_TRACED: Final = {module.__file__ for module in (logs, recovery, segment, storage)}
"""What is done to files is done there."""


class Telling(Journal):
    """A journal that another process reads, whatever becomes of this one. It knows what there was
    before, and whether that is still there."""

    def __init__(self, fd: int = 1) -> None:
        super().__init__()
        self._fd = fd

    def begins(self, log: Log) -> None:
        self.trimmed, self.acknowledged, self.attempted = log.start, log.end, log.end
        self._tell("begins", log.start, log.end)

    def append(self, log: Log, count: int) -> None:
        self._tell("attempts", self.attempted + count)
        super().append(log, count)
        self._tell("acknowledges", self.acknowledged)

    def mended(self, log: Log) -> None:
        super().mended(log)
        self._tell("mends", log.end)

    def trim(self, log: Log, offset: int) -> None:
        self._tell("trims", offset)
        super().trim(log, offset)

    def _tell(self, *words: object) -> None:
        os.write(self._fd, " ".join(map(str, words)).encode() + b"\n")


def heard(journal: Journal, lines: Iterable[str]) -> None:
    """What a process told, and that it is consistent with what was told before."""
    for line in lines:
        match line.split():
            case ["begins", start, end]:
                journal.may_be(int(start), int(end))
                journal.trimmed = int(start)
                journal.acknowledged = journal.attempted = int(end)
            case ["attempts", end]:
                journal.attempted = int(end)
            case ["acknowledges", end]:
                journal.acknowledged = int(end)
            case ["mends", end]:
                journal.may_be(0, int(end))
                journal.attempted = int(end)
            case ["trims", offset]:
                journal.trimmed = max(journal.trimmed, int(offset))
            case other:
                raise AssertionError(f"it says {other}")


def with_planted(name: str) -> contextlib.AbstractContextManager[object]:
    return PLANTED[name]() if name else contextlib.nullcontext()


def work_twice(path: str, planted: str = "") -> None:
    with with_planted(planted):
        for _ in range(2):
            work(Disk(Path(path)), Telling())


def work_and_mend(path: str, planted: str = "") -> None:
    with with_planted(planted):
        _work_and_mend(path)


def _work_and_mend(path: str) -> None:
    """Appends, rolls and trims; a failure is mended, and if that fails it is tried twice more."""
    journal, disk = Telling(), Disk(Path(path))
    log = journal.open(disk)
    journal.begins(log)
    for number in range(12):
        try:
            journal.append(log, number % 3 + 1)
        except StorageFailed:
            if not mends(log):
                break
            journal.mended(log)
        if number == 8:
            journal.reads(log)
            journal.trim(log, log.end - 4)
    log.close()


def mends(log: Log) -> bool:
    for _ in range(3):
        try:
            log.mend()
        except StorageFailed:
            continue
        return True
    return False


def small_work(disk: Storage, journal: Journal) -> None:
    """Begin, append, roll, trim, mark, close; little enough to die at each opcode of it."""
    log = journal.open(disk)
    journal.begins(log)
    journal.append(log, 4)
    journal.append(log, 1)
    journal.trim(log, log.end)
    log.mark()
    log.close()


def die_at_opcodes(path: str, first: str, step: str, planted: str = "") -> None:
    with with_planted(planted):
        _die_at_opcodes(path, first, step)


def _die_at_opcodes(path: str, first: str, step: str) -> None:
    for nth in count(int(first), int(step)):
        with tempfile.TemporaryDirectory(dir=path) as directory:
            journal = Journal()
            status = _died_at(nth, Path(directory), journal)
            journal.holds_and_goes_on(Disk(Path(directory, "log")))
        if status == 0:
            sys.stdout.write(str(nth))
            return
        assert status == -signal.SIGKILL, status


def _died_at(nth: int, directory: Path, journal: Journal) -> int:
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        sys.settrace(before_opcode(nth, _TRACED, _die))
        small_work(Disk(directory / "log"), Telling(writing))
        os._exit(0)
    os.close(writing)
    with open(reading) as told:
        heard(journal, told)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def room_for_work() -> Path | None:
    """A directory in memory, where there is one: processes that are killed need no better."""
    path = Path("/dev/shm")
    return path if path.is_dir() and shutil.disk_usage(path).free > 1 << 24 else None
