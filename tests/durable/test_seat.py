"""What a consumer makes of what its sidecar answers: nonsense, a refusal, something out of turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import SimpleNamespace

import msgspec
import pytest

from mesh.durable.batch import Header
from mesh.durable.consumed import ConsumedRecord
from mesh.durable.deliveries import AskedOptions, Delivery
from mesh.durable.group import GroupOptions
from mesh.durable.held import Held
from mesh.durable.outcomes import Refused
from mesh.durable.protocol import (
    Delivered,
    Fetch,
    Inspect,
    Inspected,
    Join,
    Joined,
    Query,
    Reply,
    Settle,
    Settled,
)
from mesh.durable.records import batch_of
from mesh.durable.route import Ask, LocalRoute
from mesh.durable.seat import Seat, Taken
from mesh.durable.sidecar import Sidecar
from mesh.durable.unsaid import Unsaid
from mesh.durable.waiting import Order
from mesh.errors import Busy, PayloadTooLarge, StorageFailed
from mesh.sockets.link import Recipient
from tests.durable.test_sidecar import Asking
from tests.support.fake_disk import FakeDisk
from tests.support.waiting import until


class _Answered:
    waiter: Recipient | None = None

    def __init__(self, reply: Reply | None) -> None:
        self.outcome = reply


def seat_at(
    route: LocalRoute, hand_over: Callable[[Taken], object], member: str = "member"
) -> Seat:
    def handed(_: Seat, taken: Taken) -> None:
        hand_over(taken)

    return Seat(
        route,
        "orders",
        "billing",
        member,
        prefetch=10,
        options=AskedOptions(),
        from_ns=None,
        resume=None,
        message_bytes_max=1 << 26,
        hand_over=handed,
    )


class Sitting:
    """A seat at a sidecar that has ten records, all of them taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sidecar = Sidecar(FakeDisk())
        self.asking = Asking(self.sidecar)
        self.asking.append(*range(10))
        self.route = LocalRoute(self.sidecar)
        self.instead: Callable[[Query], Ask | None] = lambda query: None
        """What is answered in place of the sidecar."""
        begin = self.route.begin
        monkeypatch.setattr(self.route, "begin", lambda query: self.instead(query) or begin(query))
        monkeypatch.setattr(self.route, "reply", lambda ask: ask.outcome)
        self.records: list[ConsumedRecord] = []
        self.seat = seat_at(self.route, self._take)
        self.seat.start()
        until(lambda: len(self.records) == 10)

    def _take(self, taken: Taken) -> None:
        assert isinstance(taken, list), taken
        self.records += taken

    @property
    def settled(self) -> bool:
        return self.route.link.run(lambda: self.seat.settled)


@pytest.fixture
def sitting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sitting]:
    sitting = Sitting(monkeypatch)
    yield sitting
    sitting.seat.close()
    sitting.sidecar.close()


@pytest.mark.parametrize(
    ("delivery", "text"),
    [
        (Delivery(((0, 1, 1),), (b"no batch at all",)), "cannot be decoded"),
        (Delivery(((0, 1, 1),), ()), "granted what it did not send"),
    ],
)
def test_who_consumes_is_told_of_a_sidecar_that_sends_nonsense(
    delivery: Delivery, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar = Sidecar(FakeDisk())
    route = LocalRoute(sidecar)

    def begin(query: Query) -> Ask:
        joins = isinstance(query, Join)
        return _Answered(Joined(GroupOptions(), 0, 1) if joins else Delivered(delivery))

    monkeypatch.setattr(route, "begin", begin)
    monkeypatch.setattr(route, "reply", lambda ask: ask.outcome)
    handed: SimpleQueue[Taken] = SimpleQueue()
    seat = seat_at(route, handed.put)
    seat.start()
    error = handed.get(timeout=10)
    assert isinstance(error, StorageFailed)
    assert text in str(error)
    seat.close()
    sidecar.close()


def test_a_delivery_of_very_many_batches_is_read_before_its_leases_end(
    sitting: Sitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took a time that grew with the square of their number: 15 s for these."""
    count = 20_000

    def batch_at(data: memoryview, number: int) -> tuple[Header, memoryview]:
        return msgspec.structs.replace(batch.header, offset=int(data)), body

    batch = batch_of([b"x"])
    body = memoryview(b"".join(batch.body))
    monkeypatch.setattr("mesh.durable.seat.read_batch", batch_at)
    offsets = range(100, 100 + count)
    sitting.records.clear()
    sitting.seat._held = Held(count)
    began = time.monotonic()
    sitting.seat._deliver(
        Delivered(
            Delivery(
                tuple((offset, offset + 1, 1) for offset in offsets),
                tuple(b"%d" % offset for offset in offsets),
            )
        )
    )
    assert time.monotonic() - began < 8
    assert [record.offset for record in sitting.records] == list(offsets)


def test_what_a_sidecar_refused_to_hear_is_said_again(sitting: Sitting) -> None:
    """By one that closes, say: it is not remembered, and so nobody is told that it is."""
    refused = _Answered(Refused("closed", "the sidecar is closed"))
    sitting.instead = lambda query: refused if isinstance(query, Settle) else None
    for record in sitting.records:
        record.ack()
    sitting.seat.say()
    assert not sitting.settled
    sitting.instead = lambda query: None
    sitting.seat.say()
    until(lambda: sitting.settled)
    assert sitting.seat.committed == 10


def test_what_is_committed_does_not_go_back_by_an_answer_that_comes_late(sitting: Sitting) -> None:
    late = _Answered(None)
    sitting.instead = lambda query: late if isinstance(query, Settle) else None
    sitting.records[0].ack()
    sitting.seat.say()
    sitting.seat._joined(Joined(GroupOptions(), 9, sitting.records[0].log_epoch))
    late.outcome = Settled(1)
    assert sitting.settled
    assert sitting.seat.committed == 9


def test_what_is_unsettled_is_what_nothing_was_said_of_in_time(
    sitting: Sitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seat, now = sitting.seat, time.monotonic()
    assert seat.unsettled == 10
    for record in (sitting.records[0], *sitting.records[:4]):
        record.ack()
    sitting.records[4].nak(delay=60)
    sitting.records[5].reject()
    assert seat.unsettled == 4
    later = SimpleNamespace(monotonic=lambda: now + seat.ack_wait_s / 2)
    monkeypatch.setattr("mesh.durable.seat.time", later)
    sitting.records[6].extend()
    later.monotonic = lambda: now + seat.ack_wait_s + 10
    assert seat.unsettled == 1
    seat._joined(Joined(GroupOptions(), 0, sitting.records[0].log_epoch))
    assert seat.unsettled == 0


@pytest.mark.parametrize(("order", "unsettled"), [("any", 9), ("key", 9), ("exclusive", 3)])
def test_what_goes_back_with_another_is_not_unsettled(
    sitting: Sitting, order: Order, unsettled: int
) -> None:
    """One without a key goes by itself."""
    sitting.seat._order = order
    sitting.records[3].nak(delay=60)
    assert sitting.seat.unsettled == unsettled


def test_what_there_was_no_room_for_is_said_later(sitting: Sitting) -> None:
    """That it leaves, too."""

    def busy(query: Query) -> Ask | None:
        if isinstance(query, Settle):
            raise Busy("too much is under way")
        return None

    sitting.instead = busy
    sitting.records[0].ack()
    sitting.records[1].reject("no good")
    sitting.seat.close([record.offset for record in sitting.records[2:]])
    assert not sitting.settled
    assert sitting.seat.unheard
    sitting.instead = lambda query: None
    sitting.seat.say()
    until(lambda: sitting.settled)
    assert not sitting.seat.unheard

    def group() -> tuple[int, int]:
        inspected = Asking(sitting.sidecar).told(Inspect("orders"))
        assert isinstance(inspected, Inspected)
        stats = inspected.stats.groups["billing"]
        return stats.members, stats.committed

    until(lambda: group() == (0, 2))  # once its letter is written


def test_who_finds_no_room_for_a_question_asks_later(sitting: Sitting) -> None:
    busy = 3

    def full(query: Query) -> Ask | None:
        nonlocal busy
        if isinstance(query, Fetch) and busy:
            busy -= 1
            raise Busy("too much is under way")
        return None

    sitting.instead = full
    for record in sitting.records[:]:
        record.ack()
    for n in range(3):
        sitting.asking.append(n)
        until(lambda: len(sitting.records) == 11 + n)  # noqa: B023
    assert not busy


def test_what_is_said_of_much_is_said_in_several_messages_and_that_it_leaves_in_the_last(
    sitting: Sitting,
) -> None:
    said: list[Settle] = []

    def hears(query: Query) -> Ask | None:
        said.extend([query] if isinstance(query, Settle) else [])
        return None

    sitting.instead = hears
    sitting.seat._unsaid = Unsaid(40)
    sitting.seat._say_at = 100
    for record in sitting.records[::2]:
        record.ack()
    sitting.seat.close([record.offset for record in sitting.records[1::2]])
    assert [(len(each.said.acks), len(each.said.unseen), each.leave) for each in said] == [
        (2, 0, False),
        (2, 0, False),
        (1, 1, False),
        (0, 2, False),
        (0, 2, True),
    ]
    inspected = Asking(sitting.sidecar).told(Inspect("orders"))
    assert isinstance(inspected, Inspected)
    assert inspected.stats.groups["billing"].members == 0


def test_a_record_behind_one_that_was_handed_back_is_known_until_the_message_that_says_so_is_heard(
    sitting: Sitting,
) -> None:
    seat = sitting.seat
    seat._order = "exclusive"
    seat._unsaid = Unsaid(20)
    sitting.instead = lambda query: _Answered(None) if isinstance(query, Settle) else None
    first = seat._last_said + 1
    with seat.route.link.lock, seat._lock:  # so that nothing is said meanwhile
        for _ in range(3):
            seat._unsaid.nak(99, 0.0)
    sitting.records[0].nak()
    assert list(seat.handed_back.values()) == [(0, first + 3)]
    assert seat._last_said == first + 3


def test_what_is_handed_back_in_a_later_message_is_known_until_that_is_heard(
    sitting: Sitting,
) -> None:
    """Also where the one before it found no room, and was said under the next number."""
    seat, busy = sitting.seat, [True]
    seat._order = "exclusive"
    seat._unsaid._items_max = 1

    def begin(query: Query) -> Ask | None:
        if isinstance(query, Settle):
            if busy[0]:
                raise Busy("too much is under way")
            said.append(query)
            return _Answered(None)
        return None

    said: list[Settle] = []
    sitting.instead = begin
    with seat.route.link.lock, seat._lock:
        seat._unsaid.nak(99, 0.0)
    sitting.records[0].nak()
    ((_, foretold),) = seat.handed_back.values()
    busy[0] = False
    seat._unsaid._items_max = 1
    seat.say()
    assert [each.said.naks[0][0] for each in said] == [99, 0]
    ((_, number),) = seat.handed_back.values()
    assert number == said[1].number == foretold


def test_what_a_sidecar_has_come_to_take_less_of_is_said_in_more_messages(
    sitting: Sitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came back with another limit."""
    seat, said = sitting.seat, list[Settle]()

    def begin(query: Query) -> Ask | None:
        if isinstance(query, Settle):
            if len(query.said.acks) > 2:
                monkeypatch.setattr(type(seat.route), "bytes_max", 140)
                raise PayloadTooLarge("it takes less now")
            said.append(query)
        return None

    sitting.instead = begin
    seat._say_at = 100
    for record in sitting.records[::2]:
        record.ack()
    seat.say()
    seat.say()
    assert [offset for each in said for offset, _ in each.said.acks] == [0, 2, 4, 6, 8]
    assert len(said) > 1


def test_who_has_left_does_not_join_any_more(sitting: Sitting) -> None:
    """Closed just as its thread is about to join: it would be a member that asks for nothing, with
    the turn of all others, maybe."""
    late = seat_at(sitting.route, lambda taken: None, "late")
    late.close()
    assert not late._join()
    inspected = Asking(sitting.sidecar).told(Inspect("orders"))
    assert isinstance(inspected, Inspected)
    assert inspected.stats.groups["billing"].members == 1
