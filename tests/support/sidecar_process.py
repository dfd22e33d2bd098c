"""A process that has a sidecar on a real disk and says what came of it, until something ends it.

`WORK` is a program for `tests.support.faults.traced`: it does `tests.support.sidecar_trials.work`,
and goes on after failures. `OPCODES` forks for one opcode of it after the other, which is killed
there, and looks at what that has left. What they print is read by `tests.support.account.heard`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

from mesh.durable import (
    group,
    groups,
    journal,
    log,
    partition,
    producers,
    snapshot,
    storage,
    supply,
)
from mesh.durable.storage import Disk
from mesh.errors import StorageFailed
from tests.support.account import Account, Telling, decode_account, heard
from tests.support.faults import before_each_call
from tests.support.opcodes import before_each_opcode, before_opcode
from tests.support.planted import PLANTED
from tests.support.sidecar_client import new_account
from tests.support.sidecar_trials import holds_and_goes_on, work

_ROOT: Final = Path(__file__).parents[2]
_PROGRAM: Final = f"""
import sys
sys.path.insert(0, {str(_ROOT)!r})
from tests.support.sidecar_process import {{0}} as main
main(*sys.argv[1:])
"""
WORK: Final = _PROGRAM.format("work_as_told")
"""Arguments: the directory, a file with the account of it so far, and what is planted (`PLANTED`),
if anything."""
OPCODES: Final = _PROGRAM.format("die_at_opcodes")
"""Arguments: a directory; from which opcode, every which, and what is planted (`PLANTED`), if
anything. Prints how many it were."""

_TRACED: Final = {
    module.__file__
    for module in (group, groups, journal, log, partition, producers, snapshot, storage, supply)
}


def work_as_told(path: str, account: str, planted: str = "") -> None:
    logging.disable(logging.CRITICAL)
    told = decode_account(Path(account).read_bytes())
    try:
        with PLANTED[planted]() if planted else contextlib.nullcontext():
            work(Disk(Path(path)), Telling(told, fd=1))
    except (OSError, StorageFailed) as error:
        sys.stderr.write(f"ended by {error!r}")


def die_at_opcodes(path: str, first: str, step: str, planted: str = "") -> None:
    logging.disable(logging.CRITICAL)
    if planted:
        with PLANTED[planted]():
            die_at_opcodes(path, first, step)
        return
    places = _places(Path(path))
    for nth in places[int(first) :: int(step)]:
        with tempfile.TemporaryDirectory(dir=path) as directory:
            account = new_account()
            status = _died_at(nth, Path(directory), account)
            holds_and_goes_on(Disk(Path(directory, "sidecar")), account)
        assert status == -signal.SIGKILL, status
    sys.stdout.write(str(len(places)))


def _places(path: Path) -> list[int]:
    """The opcodes before which something had been changed, or said, since the one before: a process
    that is killed at another leaves what it leaves at the last of these."""
    places, at, changed = [1], 0, False

    def change() -> None:
        nonlocal changed
        changed = True

    def opcode() -> None:
        nonlocal at, changed
        at += 1
        if changed:
            places.append(at)
            changed = False

    with (
        tempfile.TemporaryDirectory(dir=path) as directory,
        open(os.devnull, "w") as nowhere,
        before_each_call(change, "write", "pwrite", "open"),
    ):
        sys.settrace(before_each_opcode(_TRACED, opcode))
        work(Disk(Path(directory, "sidecar")), Telling(new_account(), nowhere.fileno()))
        sys.settrace(None)
    return places


def _died_at(nth: int, directory: Path, account: Account) -> int:
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        sys.settrace(before_opcode(nth, _TRACED, _die))
        work(Disk(directory / "sidecar"), Telling(account, writing))
        os._exit(0)
    os.close(writing)
    with open(reading) as told:
        heard(account, told)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
