"""That a producer goes on wherever a Ctrl-C has come in its work: all that is under way has its
outcome, each record is in the log once and in its place, and nothing is left that waits."""

from __future__ import annotations

import sys

import pytest

from mesh.durable import appender as appenders
from mesh.durable.appender import Appender, Pending
from mesh.durable.batch import Batch
from mesh.durable.outcomes import Appended, Opened, Refused
from mesh.durable.protocol import Query
from mesh.durable.records import payloads_of
from mesh.durable.route import Ask
from tests.durable.test_appender import _Ask, _Flusher, _Route
from tests.support.opcodes import before_opcode


class Interruption(BaseException):
    pass


def interrupt() -> None:
    raise Interruption


class _Log(_Route):
    """A sidecar that answers as one does, to all that was asked, when a test says so."""

    def __init__(self, full: set[bytes]) -> None:
        super().__init__()
        self.records: list[bytes] = []
        self._full = full
        self._answered = 0
        self._next_seq = 0
        self._known: dict[int, Appended] = {}

    def begin(self, query: Query) -> Ask:
        """Behind all that was asked for before."""
        self.answer()
        ask = _Ask()
        ask.reply = Opened(1, self._next_seq, "fsync")
        return ask

    def answer(self) -> None:
        for ask in self.asked[self._answered :]:
            assert ask.batch is not None
            ask.reply = self._known.get(ask.batch.header.seq) or self._commit(ask.batch)
        self._answered = len(self.asked)

    def _commit(self, batch: Batch) -> Appended | Refused:
        header, records = batch.header, payloads_of(batch.header, b"".join(batch.body))
        if header.seq != self._next_seq:
            return Refused("gap", "another comes next", self._next_seq)
        if records[0] in self._full:
            self._full.discard(records[0])
            return Refused("full", "there is no room")
        appended = self._known[header.seq] = Appended(len(self.records), header.count, 1)
        self.records += records
        self._next_seq += header.count
        return appended


def interrupted_at(nth: int) -> bool:
    log, interrupted = _Log({b"b3", b"c0"}), False
    appender = Appender(log, "orders", 1, None, flusher=_Flusher(), bytes_max=1 << 24)
    places: list[tuple[bytes, Pending, int]] = []

    def submit(payload: bytes) -> None:
        places.append((payload, *appender.submit_item(payload, len(payload))))

    def go_on() -> None:
        appender.close_batches()
        log.answer()
        appender.advance(None)

    traced = sys.gettrace()
    trace = before_opcode(nth, {appenders.__file__}, interrupt, where_signals_come=True)
    sys.settrace(trace)
    try:
        for letter in "abcd":
            for number in range(6):
                submit(f"{letter}{number}".encode())
            appender.close_batches()
            if letter != "a":
                log.answer()
            appender.advance(None)
    except Interruption:
        interrupted = True
    finally:
        sys.settrace(traced)
    go_on()
    submit(b"last")
    for _ in range(6):
        go_on()
    assert appender.idle
    assert appender.bytes_waiting == 0
    for payload, pending, index in places:
        assert pending.done
        if pending.appended is not None:
            assert log.records[pending.appended.offset + index] == payload
    assert log.records == sorted(set(log.records))
    assert log.records[-1] == b"last"
    return interrupted


@pytest.mark.slow
def test_a_producer_goes_on_wherever_it_was_interrupted() -> None:
    nth = 1
    while interrupted_at(nth):
        nth += 1
    assert nth > 200
