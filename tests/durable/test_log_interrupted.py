"""That a log can be mended whatever ended its work, and wherever: not only an error of the disk,
also memory that ran out, or a Ctrl-C. Nothing acknowledged is lost, and no hole is left."""

from __future__ import annotations

import sys
from random import Random

import pytest

from mesh.durable import index as indexes
from mesh.durable import log as logs
from mesh.durable import segment as segments
from tests.support.fake_disk import FakeDisk
from tests.support.opcodes import before_opcode
from tests.support.trials import Journal

_INTERRUPTED = {module.__file__ for module in (indexes, logs, segments)}


class Interruption(BaseException):
    pass


def interrupt() -> None:
    raise Interruption


def interrupted_at(nth: int) -> bool:
    """Whether it was, or the work has fewer opcodes. What is left is mended, goes on and survives
    a crash."""
    disk, journal = FakeDisk(nth), Journal()
    log = journal.open(disk)
    journal.append(log, 2)
    traced, interrupted = sys.gettrace(), False
    sys.settrace(before_opcode(nth, _INTERRUPTED, interrupt))
    try:
        for _ in range(5):  # some of them begin a segment
            journal.append(log, 2)
        journal.trim(log, log.end - 6)
    except Interruption:
        interrupted = True
    finally:
        sys.settrace(traced)
    log.mend()
    journal.mended(log)
    for _ in range(2):
        journal.append(log, 3)
        journal.trim(log, log.end - 6)
    for seed in range(3):
        journal.holds(disk.crash(Random(seed)))
    log.close()
    journal.holds_and_goes_on(disk.kill())
    return interrupted


def interrupted_at_every(step: int) -> int:
    nth = 1
    while interrupted_at(nth):
        nth += step
    return nth


@pytest.mark.slow
def test_a_log_is_mended_where_it_was_interrupted_at_many_opcodes() -> None:
    assert interrupted_at_every(11) > 2000


@pytest.mark.long
def test_a_log_is_mended_where_it_was_interrupted_at_every_opcode() -> None:
    assert interrupted_at_every(1) > 2000
