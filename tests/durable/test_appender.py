"""What of a producer is under way, without a sidecar: what shares a batch, in which order, and what
becomes of it."""

from __future__ import annotations

import asyncio
import sys
import threading
from itertools import pairwise
from traceback import walk_tb

import pytest

from mesh.durable.appender import Appender, Pending
from mesh.durable.appending import await_, flush, receipt_of, wait
from mesh.durable.batch import Batch
from mesh.durable.encoding import BATCH_BYTES, BATCH_RECORDS
from mesh.durable.outcomes import Appended, Code, Opened, Refused
from mesh.durable.protocol import Query, Reply
from mesh.durable.records import NewRecord, batch_of, columns_of, payloads_of
from mesh.durable.route import Ask
from mesh.errors import (
    Busy,
    LogFull,
    MeshError,
    OutcomeUnknown,
    ProducerFenced,
    RemoteError,
    Timeout,
)
from mesh.sockets.flusher import Batching, Flusher
from mesh.sockets.link import Link, Recipient
from mesh.timeouts import deadline_of
from tests.support.waiting import until


class _Ask:
    waiter: Recipient | None = None

    def __init__(self, batch: Batch | None = None) -> None:
        self.batch = batch
        self.reply: Reply | MeshError | None = None


class _Route:
    """A sidecar that is asked, and answers when a test says so."""

    partition = "0" * 16
    bytes_max = sys.maxsize

    def __init__(self) -> None:
        self.link = Link("log")
        self.asked: list[_Ask] = []
        self.opening: list[_Ask] = []
        self.busy = False
        self.opens = True
        self.is_sent_once = True
        self.travelling: Ask | None = None

    def begin(self, query: Query) -> Ask:
        if self.busy:
            raise Busy("it is")
        ask = _Ask()
        self.opening.append(ask)
        if self.opens:
            ask.reply = Opened(1, 0, "fsync")
        return ask

    def append(self, stream: str, batch: Batch) -> Ask:
        if self.busy:
            raise Busy("it is")
        self.asked.append(_Ask(batch))
        return self.asked[-1]

    def append_alone(self, stream: str, batch: Batch) -> Ask:
        return self.append(stream, batch)

    def travels(self, ask: Ask) -> bool:
        return ask is self.travelling

    def travel(self, ask: Ask, timeout: float | None) -> None:
        """There is no line."""

    def look(self, ask: Ask | None) -> None:
        """Answers are there by themselves."""

    def reply(self, ask: Ask) -> Reply | MeshError | None:
        assert isinstance(ask, _Ask)
        return ask.reply

    def sent_once(self, ask: Ask) -> bool:
        return self.is_sent_once

    def abandon(self, ask: Ask) -> None:
        """It is not asked to."""

    def payloads(self) -> list[list[object]]:
        """Of what was asked for, batch by batch."""
        batches = [ask.batch for ask in self.asked]
        return [
            payloads_of(each.header, b"".join(each.body)) for each in batches if each is not None
        ]

    def seqs(self) -> list[int]:
        return [ask.batch.header.seq for ask in self.asked if ask.batch is not None]


class _Flusher(Flusher):
    """One that is there, or is not; a test does its work."""

    def __init__(self) -> None:
        super().__init__()
        self.there = True
        self.watched: set[Batching] = set()

    def watch(self, core: Batching) -> bool:
        if self.there:
            self.watched.add(core)
        return self.there

    def forget(self, core: Batching) -> None:
        self.watched.discard(core)


@pytest.fixture
def route() -> _Route:
    return _Route()


@pytest.fixture
def flusher() -> _Flusher:
    return _Flusher()


@pytest.fixture
def appender(route: _Route, flusher: _Flusher) -> Appender:
    return Appender(route, "orders", 1, None, flusher=flusher, bytes_max=1 << 24)


def items(appender: Appender, *payloads: bytes) -> list[tuple[Pending, int]]:
    return [appender.submit_item(payload, len(payload)) for payload in payloads]


def test_who_flushes_does_not_take_for_done_what_is_moved_from_one_queue_to_the_other(
    appender: Appender, route: _Route
) -> None:
    (pending, _), *_ = items(appender, b"a")
    with route.link.lock:
        appender._asked.remove(pending)
        flushing = threading.Thread(target=flush, args=(appender, deadline_of(10), "end"))
        flushing.start()
        flushing.join(0.05)
        appender._asked.append(pending)
    flushing.join(0.05)
    assert flushing.is_alive()
    route.asked[0].reply = Appended(10, 1, 5)
    flushing.join(10)
    assert not flushing.is_alive()
    assert pending.done


def test_the_first_leaves_at_once_and_what_follows_shares_a_batch(
    appender: Appender, route: _Route, flusher: _Flusher
) -> None:
    places = items(appender, b"a", b"b", b"c", b"d")
    assert route.payloads() == [[b"a"]]
    assert flusher.watched == {appender}
    assert appender.close_batches()
    assert route.payloads() == [[b"a"], [b"b", b"c", b"d"]]
    assert route.seqs() == [0, 1]
    assert not flusher.watched
    assert [index for _, index in places] == [0, 0, 1, 2]
    assert places[1][0] is places[3][0]


def test_each_record_of_a_batch_has_its_receipt(appender: Appender, route: _Route) -> None:
    places = items(appender, b"a", b"b", b"c")
    appender.close_batches()
    route.asked[0].reply = Appended(10, 1, 5)
    route.asked[1].reply = Appended(20, 2, 6)
    appender.advance(None)
    receipts = [receipt_of(appender, pending, index) for pending, index in places]
    assert [(each.offset, each.count) for each in receipts] == [(10, 1), (20, 1), (21, 1)]
    assert appender.idle
    assert appender.bytes_waiting == 0


def test_records_with_more_than_a_payload_keep_their_place(
    appender: Appender, route: _Route
) -> None:
    items(appender, b"a", b"b")
    appender.submit(batch_of([NewRecord(b"\xc0", b"k")]))
    items(appender, b"c", b"d")
    appender.close_batches()
    sent = [ask.batch.header.count for ask in route.asked if ask.batch is not None]
    assert sent == [1, 1, 1, 2]
    assert route.seqs() == [0, 1, 2, 3]


def test_records_with_a_key_share_a_batch_with_others(appender: Appender, route: _Route) -> None:
    items(appender, b"a", b"b")
    places = [appender.submit_item(NewRecord(b"\xc0", b"k"), 10), *items(appender, b"c")]
    appender.close_batches()
    assert route.payloads() == [[b"a"], [b"b", None, b"c"]]
    assert [index for _, index in places] == [1, 2]
    sent = route.asked[1].batch
    assert sent is not None
    assert columns_of(sent.header, b"".join(sent.body)).keys == [None, b"k", None]


def test_a_record_that_may_be_there_already_has_a_batch_of_its_own(
    appender: Appender, route: _Route
) -> None:
    items(appender, b"a", b"b")
    appender.submit_item(NewRecord(b"\xc0", dedup_id=b"order 7"), 10)
    items(appender, b"c")
    appender.close_batches()
    assert route.payloads() == [[b"a"], [b"b"], [None], [b"c"]]


def test_a_batch_has_no_more_than_it_may(appender: Appender, route: _Route) -> None:
    items(appender, *([b"x"] * (BATCH_RECORDS + 2)))
    assert [len(each) for each in route.payloads()] == [1, BATCH_RECORDS]
    items(appender, b"y" * (BATCH_BYTES - 100), b"z" * 200)
    appender.close_batches()
    assert [len(each) for each in route.payloads()] == [1, BATCH_RECORDS, 2, 1]


def test_without_anybody_to_close_batches_each_leaves_by_itself(
    appender: Appender, route: _Route, flusher: _Flusher
) -> None:
    flusher.there = False
    items(appender, b"a", b"b")
    assert route.payloads() == [[b"a"], [b"b"]]


def test_what_waits_for_its_producer_to_be_opened_is_looked_after(
    appender: Appender, route: _Route, flusher: _Flusher
) -> None:
    route.opens = False
    items(appender, b"a", b"b")
    assert flusher.watched == {appender}
    assert not appender.close_batches()
    route.opening[0].reply = Opened(1, 7, "fsync")
    assert appender.close_batches()
    assert (route.payloads(), route.seqs()) == ([[b"a", b"b"]], [7])


def test_what_was_asked_for_is_asked_for_again_as_it_was(appender: Appender, route: _Route) -> None:
    """The log knows it by its number and its count."""
    places = items(appender, b"a", b"b", b"c")
    appender.close_batches()
    items(appender, b"d")
    appender.close_batches()
    route.asked[0].reply = Refused("full", "there is no room")
    for ask in route.asked[1:]:
        ask.reply = Refused("gap", "0 comes next", 0)
    items(appender, b"e")
    appender.close_batches()
    with pytest.raises(LogFull):
        receipt_of(appender, *places[0])
    assert route.payloads()[3:] == [[b"b", b"c"], [b"d"], [b"e"]]
    assert route.seqs()[3:] == [0, 2, 3]


@pytest.mark.parametrize(("sent_once", "error"), [(True, ProducerFenced), (False, OutcomeUnknown)])
def test_of_a_fenced_producer_only_what_cannot_be_there_was_not_written(
    appender: Appender, route: _Route, sent_once: bool, error: type[MeshError]
) -> None:
    """Where the answer was lost with its connection the record may be in the log."""
    places = items(appender, b"a")
    route.asked[0].reply = Refused("fenced", "another run has begun")
    route.is_sent_once = sent_once
    appender.advance(None)
    with pytest.raises(error, match="another run has begun"):
        receipt_of(appender, *places[0])
    with pytest.raises(ProducerFenced):
        items(appender, b"b")
    assert appender.idle
    assert appender.bytes_waiting == 0


def test_who_finds_no_room_for_its_opening_opens_later(appender: Appender, route: _Route) -> None:
    route.busy = True
    items(appender, b"a")
    assert not appender.idle
    route.busy = False
    appender.advance(None)
    assert route.payloads() == [[b"a"]]


def test_an_error_that_is_raised_again_and_again_holds_on_to_nobody(
    appender: Appender, route: _Route
) -> None:
    """Its traceback has the payload of whoever it was raised to."""
    items(appender, b"a")
    route.asked[0].reply = Refused("fenced", "another run has begun")
    appender.advance(None)
    errors = []
    for _ in range(3):
        with pytest.raises(ProducerFenced) as caught:
            items(appender, b"b")
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3
    lengths = [len(list(walk_tb(error.__traceback__))) for error in errors]
    assert len(set(lengths)) == 1


class _Time:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def time() -> _Time:
    return _Time()


@pytest.fixture
def waiting(route: _Route, flusher: _Flusher, time: _Time) -> Appender:
    """One whose appends wait while the log is full."""
    return Appender(
        route, "orders", 1, None, flusher=flusher, bytes_max=1 << 24, waits=True, now=time
    )


def test_what_a_full_log_has_no_room_for_is_asked_for_again_ever_more_rarely(
    waiting: Appender, route: _Route, flusher: _Flusher, time: _Time
) -> None:
    ((pending, index),) = items(waiting, b"a")
    asked = []
    for tenth in range(50):
        time.now_s = tenth / 10
        if route.asked[-1].reply is None:
            route.asked[-1].reply = Refused("full", "there is no room")
            asked.append(time.now_s)
        waiting.close_batches()
        assert not flusher.watched
        assert not pending.done
    pauses = [round(after - before, 3) for before, after in pairwise(asked)]
    assert pauses == sorted(pauses)
    assert 5 <= len(pauses) <= 10
    assert pauses[-1] <= 1.1
    time.now_s = 6
    waiting.advance(None)
    route.asked[-1].reply = Appended(3, 1, 5)
    waiting.advance(None)
    assert receipt_of(waiting, pending, index).offset == 3
    assert set(route.seqs()) == {0}
    assert waiting.bytes_waiting == 0


def test_what_comes_behind_an_append_that_waits_stays_behind_it(
    waiting: Appender, route: _Route, time: _Time
) -> None:
    items(waiting, b"a", b"b")
    waiting.close_batches()
    route.asked[0].reply = Refused("full", "there is no room")
    route.asked[1].reply = Refused("gap", "0 comes next", 0)
    waiting.advance(None)
    waiting.submit(batch_of([NewRecord(b"\xc0")]))
    assert len(route.asked) == 2
    time.now_s = 1
    waiting.advance(None)
    assert route.seqs()[2:] == [0, 1, 2]


def test_what_can_never_have_room_is_refused(waiting: Appender, route: _Route) -> None:
    ((pending, index),) = items(waiting, b"a")
    route.asked[0].reply = Refused("large", "it never will")
    waiting.advance(None)
    with pytest.raises(LogFull, match="never will"):
        receipt_of(waiting, pending, index)


@pytest.mark.parametrize("code", ["full", "storage", "unsure", "closed"])
def test_a_producer_that_could_not_be_opened_is_opened_by_its_next_append(
    appender: Appender, route: _Route, code: Code
) -> None:
    route.opens = False
    ((pending, index),) = items(appender, b"a")
    route.opening[0].reply = Refused(code, "not now")
    appender.advance(None)
    with pytest.raises(MeshError, match="not now"):
        receipt_of(appender, pending, index)
    assert appender.idle
    route.opens = True
    items(appender, b"b")
    assert route.payloads() == [[b"b"]]


@pytest.mark.parametrize(
    "reply",
    [
        Refused("storage", "a disk"),
        RemoteError("Malformed", "no answer", ""),
        Opened(1, 0, "fsync"),
    ],
    ids=["refused", "error", "nonsense"],
)
def test_what_may_have_been_written_is_not_refused_and_its_number_given_to_no_other(
    appender: Appender, route: _Route, reply: Reply
) -> None:
    """Or the next would be taken for it, and be nowhere."""
    route.is_sent_once = False
    ((pending, index),) = items(appender, b"a")
    route.asked[0].reply = reply
    route.opens = False
    appender.advance(None)
    with pytest.raises(OutcomeUnknown):
        receipt_of(appender, pending, index)
    items(appender, b"b")
    assert route.payloads() == [[b"a"]]
    route.opening[-1].reply = Opened(2, 1, "fsync")
    appender.advance(None)
    assert (route.payloads(), route.seqs()) == ([[b"a"], [b"b"]], [0, 1])
    assert appender.bytes_waiting > 0


def test_what_a_disk_did_not_let_go_of_is_unknown_and_nothing_is_taken_for_it(
    appender: Appender, route: _Route
) -> None:
    """Neither what was written with it, nor what comes next."""
    ((first, _),) = items(appender, b"a")
    ((second, _),) = items(appender, b"b")
    appender.close_batches()
    for ask in route.asked:
        ask.reply = Refused("unsure", "a disk")
    route.opens = False
    appender.advance(None)
    for pending in (first, second):
        with pytest.raises(OutcomeUnknown):
            receipt_of(appender, pending, 0)
    items(appender, b"c")
    route.opening[-1].reply = Opened(2, 2, "fsync")
    appender.advance(None)
    assert (route.payloads(), route.seqs()) == ([[b"a"], [b"b"], [b"c"]], [0, 1, 2])


def test_nothing_overtakes_what_travels_alone(appender: Appender, route: _Route) -> None:
    """What came before it would be taken for a gap, and what comes after the gap for it."""
    appender.submit_and_claim(batch_of([b"a"]))
    route.travelling = route.asked[0]
    items(appender, b"b")
    appender.submit(batch_of([b"c"]))
    appender.close_batches()
    assert route.seqs() == [0]
    route.travelling, route.asked[0].reply = None, Appended(0, 1, 5)
    appender.advance(None)
    assert (route.payloads(), route.seqs()) == ([[b"a"], [b"b"], [b"c"]], [0, 1, 2])


def test_a_full_way_is_tried_again(appender: Appender, route: _Route) -> None:
    items(appender, b"a")
    route.busy = True
    items(appender, b"b")
    assert not appender.close_batches()
    items(appender, b"c")
    route.busy = False
    assert appender.close_batches()
    assert route.payloads() == [[b"a"], [b"b"], [b"c"]]


def test_whatever_the_answer_was_is_told_each_time(appender: Appender, route: _Route) -> None:
    ((pending, index),) = items(appender, b"a")
    route.asked[0].reply = RemoteError("Malformed", "the answer is none", "")
    appender.advance(None)
    for _ in range(2):
        with pytest.raises(OutcomeUnknown, match="is none"):
            receipt_of(appender, pending, index)


# -- Waiting


@pytest.fixture
def woken_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks again by itself."""
    monkeypatch.setattr("mesh.durable.appending.AGAIN_S", 1000.0)


@pytest.mark.usefixtures("woken_only")
def test_who_waits_for_a_batch_that_another_waits_for_has_the_same_patience(
    appender: Appender, route: _Route
) -> None:
    """It neither spins nor outstays its timeout, and is woken when the other has the answer."""
    places = items(appender, b"a", b"b", b"c")
    appender.close_batches()
    shared, _ = places[2]
    waited = threading.Thread(target=wait, args=(appender, shared, deadline_of(10)))
    waited.start()
    until(lambda: route.asked[1].waiter is not None)
    before = appender.route.link.attempts
    with pytest.raises(Timeout):
        wait(appender, shared, deadline_of(0.12))
    assert appender.route.link.attempts - before < 5
    last = threading.Thread(target=wait, args=(appender, shared, deadline_of(10)))
    last.start()
    with route.link.lock:
        for number, ask in enumerate(route.asked):
            ask.reply = Appended(number, 1, 5)
            route.link.hand(ask, True)
    waited.join(10)
    last.join(10)
    assert shared.done
    assert not appender._claimed


@pytest.mark.usefixtures("woken_only")
def test_tasks_that_wait_for_one_batch_leave_their_loop_to_others(
    appender: Appender, route: _Route
) -> None:
    places = items(appender, b"a", b"b", b"c")
    appender.close_batches()

    async def others() -> None:
        awaiting = [asyncio.ensure_future(await_(appender, places[2][0], None)) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for number, ask in enumerate(route.asked):
            ask.reply = Appended(number, 1, 5)
        with route.link.lock:
            route.link.hand(route.asked[1], True)
        await asyncio.gather(*awaiting)

    asyncio.run(others())
    assert not appender._claimed
