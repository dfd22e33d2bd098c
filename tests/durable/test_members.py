"""What the clerk does for the members of groups, with nobody in between."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable

import pytest

from mesh import limits
from mesh.durable.batch import Batch
from mesh.durable.cursor import Cursor
from mesh.durable.deliveries import AskedOptions, Delivery, Settlements
from mesh.durable.groups import Groups
from mesh.durable.log import SEGMENT_BYTES, Log
from mesh.durable.members import Members
from mesh.durable.outcomes import Appended, Outcome, Refused
from mesh.durable.protocol import (
    Delivered,
    Fetch,
    Join,
    Joined,
    Reply,
    Settle,
    encode_message,
    pack_batch,
)
from mesh.durable.records import columns_of, headers_of, payloads_of
from mesh.errors import PayloadTooLarge
from mesh.sockets.single import encode
from tests.durable.test_encoding import BYTES_MAX, one_with_headers, plain, with_all
from tests.durable.test_groups import fill, numbered, out_of_files
from tests.support.fake_disk import FakeDisk
from tests.support.logs import PARTITION

MEMBER = "0123456789abcdef-a"
NOW_NS = 1 << 62
"""Nothing is delayed for so long."""
FULL = Refused("full", "there is no room")


class Setting:
    """The members of a log's groups, and what is to go to the dead letters."""

    def __init__(
        self,
        *,
        keeps_all: bool = True,
        bytes_max: int = 1 << 20,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.disk = FakeDisk()
        self.log = Log(
            self.disk, PARTITION, now_ns=0, shown_when_synced=keeps_all, segment_bytes=segment_bytes
        )
        self.groups = Groups(self.disk.folder("groups"), self.log)
        self.members = Members("s", self.groups, self.log, self.bury, bytes_max)
        self.letters: list[int] = []
        """The bytes of each that was sent."""
        self.latest: Batch | None = None
        """Of these."""
        self.under_way: list[Callable[[Outcome], object]] = []

    def bury(self, batch: Batch, done: Callable[[Outcome], object]) -> None:
        self.letters.append(batch.header.size)
        self.latest = batch
        self.under_way.append(done)

    def answer(self, outcome: Outcome) -> None:
        """All letters that are under way."""
        under_way, self.under_way = self.under_way, []
        for done in under_way:
            done(outcome)

    def told(self, query: Join | Fetch | Settle, now: float = 0.0) -> Reply:
        replies: list[Reply] = []
        members = self.members
        members.rewind()
        match query:
            case Join():
                members.join(query, replies.append, now, NOW_NS)
            case Fetch():
                members.fetch(query, replies.append, now, NOW_NS)
            case Settle():
                members.settle(query, replies.append, now, NOW_NS)
        (reply,) = replies
        return reply

    def reject_all(self, group: str = "g", member: str = MEMBER, reason: str = "no") -> None:
        joined = self.told(Join("s", group, member, 1000, AskedOptions()))
        assert isinstance(joined, Joined)
        number = 0
        while True:
            number += 1
            self.members.fetch(Fetch("s", group, member, number), lambda reply: None, 0.0, NOW_NS)
            held = self.groups.stats()[group].in_flight
            if not held:
                return
            end = self.groups.stats()[group].end
            rejects = tuple((offset, reason) for offset in range(end))
            said = Settlements(rejects=rejects)
            self.told(Settle("s", group, member, joined.log_epoch, said))

    def committed(self, group: str = "g") -> int:
        return self.groups.stats()[group].committed

    def too_large(self, group: str = "g") -> int:
        return self.groups.stats()[group].counters.get("dead and too large", 0)


def test_dead_letters_on_their_way_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are read again when it is their turn, and all get there."""
    monkeypatch.setattr(limits, "LETTERS_BYTES_MAX", 10_000)
    setting = Setting()
    fill(setting.log, *(f"{n} " + "x" * 1000 for n in range(60)))
    setting.reject_all()
    sent = 0
    while setting.under_way:
        assert sum(setting.letters[sent:]) < 10_000 + 2000
        sent = len(setting.letters)
        setting.answer(Appended(0, 1, 0))
    assert sent == 60
    assert setting.committed() == 60


def test_a_dead_letter_that_has_to_wait_is_not_held_in_memory() -> None:
    setting = Setting()
    fill(setting.log, *(f"{n} " + "x" * 20_000 for n in range(60)))
    setting.groups.open("g", AskedOptions(), 0)
    tracemalloc.start()
    try:
        setting.reject_all()
        setting.answer(FULL)
        setting.groups._groups["g"].supply._cache.forget(60)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 200_000
    setting.members.tick(1.0, NOW_NS)
    assert len(setting.under_way) == 1, "one in turn tries"
    setting.answer(Appended(0, 1, 0))
    while setting.under_way:
        setting.answer(Appended(0, 1, 0))
    assert setting.committed() == 60


def with_letters_too_large() -> Setting:
    """60 of them, and one that is small. All were told to wait, so far."""
    setting = Setting()
    fill(setting.log, *("x" * 1000 for _ in range(60)), "small")
    setting.members._refused = "full"
    setting.reject_all()
    setting.members._message_bytes_max = 1000  # as if its sidecar had come back with that
    return setting


def test_of_letters_that_are_too_large_no_more_is_read_at_a_time_than_of_those_that_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "LETTERS_BYTES_MAX", 10_000)
    setting = with_letters_too_large()
    setting.members._refused = ""
    passed_over = [setting.too_large()]
    while passed_over[-1] < 60:
        setting.members.tick(1.0, NOW_NS)
        passed_over.append(setting.too_large())
        assert 0 < passed_over[-1] - passed_over[-2] < 12
    assert len(passed_over) > 4
    setting.members.tick(1.0, NOW_NS)
    assert (len(setting.letters), setting.committed()) == (1, 0)


def test_a_letter_that_may_go_is_tried_though_many_that_are_too_large_come_before_it() -> None:
    setting = with_letters_too_large()
    setting.members.tick(1.0, NOW_NS)
    assert (setting.too_large(), len(setting.under_way)) == (60, 1)


def test_where_dead_letters_wait_those_of_all_groups_try_by_turns() -> None:
    setting = Setting()
    fill(setting.log, "poison")
    setting.reject_all("g")
    setting.answer(FULL)
    setting.reject_all("h")
    for _ in range(2):
        setting.members.tick(1.0, NOW_NS)
        assert len(setting.under_way) == 1
        setting.answer(FULL)
    setting.members.tick(1.0, NOW_NS)
    setting.answer(Appended(0, 1, 0))
    assert (setting.committed("g"), setting.committed("h")) == (1, 0)
    setting.answer(Appended(1, 1, 0))
    assert setting.committed("h") == 1


def test_a_record_that_is_acknowledged_while_its_dead_letter_waits_needs_none() -> None:
    setting = Setting()
    fill(setting.log, *numbered(2))
    setting.reject_all()
    setting.answer(FULL)
    setting.told(Settle("s", "g", MEMBER, setting.log.log_epoch, Settlements(acks=((0, 2),))))
    before = len(setting.letters)
    setting.members.tick(1.0, NOW_NS)
    assert (len(setting.letters), setting.committed()) == (before, 2)


def test_a_dead_letter_that_waits_goes_with_its_record_where_that_is_lost() -> None:
    """Another record gets its offset, and is not settled by a letter of the one before."""
    setting = Setting(keeps_all=False)
    fill(setting.log, *numbered(2))
    fill(setting.log, "lost, waits", "lost, under way", synced=False)
    setting.reject_all()
    *kept, waits, under_way = setting.under_way
    setting.under_way = []
    for done in kept:
        done(Appended(0, 1, 0))
    waits(FULL)
    setting.disk.faults.fail("sync")
    with pytest.raises(Exception, match="Input/output"):
        setting.log.sync()
    setting.log.mend()
    assert setting.log.end == setting.committed() == 2
    fill(setting.log, "other", "another")
    setting.members.tick(1.0, NOW_NS)
    assert not setting.under_way, "there is no such record any more"
    joined = setting.told(Join("s", "g", MEMBER, 10))
    assert isinstance(joined, Joined)
    setting.members.fetch(Fetch("s", "g", MEMBER, 1), lambda reply: None, 1.0, NOW_NS)
    said = Settlements(rejects=((2, "no"), (3, "no")))
    setting.told(Settle("s", "g", MEMBER, joined.log_epoch, said))
    under_way(Appended(9, 1, 0))
    assert setting.committed() == 2
    for _ in range(3):
        setting.members.tick(2.0, NOW_NS)
        setting.answer(Appended(0, 1, 0))
    assert setting.committed() == 4


def test_of_what_was_sent_only_that_is_remembered() -> None:
    """Not the records: of each member as much as it may be sent at one time."""
    setting = Setting()
    fill(setting.log, *(f"{n} " + "x" * 100_000 for n in range(20)))
    setting.told(Join("s", "g", MEMBER, 1))
    cache = setting.groups._groups["g"].supply._cache
    tracemalloc.start()
    try:
        for n in range(20):
            member = f"{MEMBER}{n}"
            setting.told(Join("s", "g", member, 1))
            sent = setting.told(Fetch("s", "g", member, 1))
            assert isinstance(sent, Delivered)
            assert sent.delivery.grants == ((n, n + 1, 1),)
        cache.forget(20)
        del sent
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 500_000


def test_who_asks_again_gets_the_same_answer_as_far_as_the_log_has_it_still() -> None:
    setting = Setting(segment_bytes=2000)
    fill(setting.log, *numbered(60), per_batch=3)
    setting.told(Join("s", "g", MEMBER, 100))
    first = setting.told(Fetch("s", "g", MEMBER, 1))
    assert isinstance(first, Delivered)
    setting.groups._groups["g"].supply._cache.forget(60)
    assert setting.told(Fetch("s", "g", MEMBER, 1)) == first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cursor, "read", out_of_files)
        refused = setting.told(Fetch("s", "g", MEMBER, 1))
        assert isinstance(refused, Refused)
        assert refused.text == "group 'g' of stream 's': [Errno 24] Too many open files"
    gone = setting.log.segments[1].base
    setting.log.trim(gone)
    again = setting.told(Fetch("s", "g", MEMBER, 1))
    assert isinstance(again, Delivered)
    assert 0 < len(again.delivery.grants) < len(first.delivery.grants)
    assert again.delivery.grants == tuple(g for g in first.delivery.grants if g[0] >= gone)
    assert again.delivery.batches == first.delivery.batches[-len(again.delivery.batches) :]


MOST = (1 << 64) - 1


@pytest.mark.parametrize("made", [plain, with_all, one_with_headers])
@pytest.mark.parametrize(("group", "reason"), [("g", "no"), ("g" * 250, "\U0001f4a9" * 255)])
def test_the_letter_of_the_largest_record_can_be_read(
    made: Callable[[bytes], Batch], group: str, reason: str
) -> None:
    """It has more to say than its record, and would be in the way of all letters behind it."""
    size = BYTES_MAX
    while True:
        with contextlib.suppress(PayloadTooLarge):
            batch = made(b"x" * size)
            break
        size -= 1
    setting = Setting(bytes_max=BYTES_MAX)
    setting.log.append([batch], 0)
    setting.log.sync()
    setting.reject_all(group, reason=reason)
    letter = setting.latest
    assert letter is not None
    delivery = Delivery(((MOST, MOST, MOST),), (pack_batch(letter),))
    encode(encode_message(Delivered(delivery, ((MOST, MOST, MOST),), MOST)), None, BYTES_MAX)
    body = b"".join(bytes(part) for part in letter.body)
    columns = columns_of(letter.header, body)
    assert columns.headers is not None
    headers = headers_of(columns.headers[0])
    assert headers["mesh-offset"] == 0
    assert len([name for name in headers if name.startswith("mesh-")]) == limits.LETTER_HEADERS
    assert payloads_of(letter.header, body) == [b"x" * size]


def test_a_letter_that_has_room_says_all() -> None:
    setting = Setting()
    setting.log.append([one_with_headers(b"x")], 0)
    setting.log.sync()
    setting.reject_all(reason="r" * 255)
    assert setting.latest is not None
    body = b"".join(bytes(part) for part in setting.latest.body)
    columns = columns_of(setting.latest.header, body)
    assert columns.headers is not None
    headers = headers_of(columns.headers[0])
    assert headers["trace"] == "x" * 100
    assert (headers["mesh-group"], headers["mesh-reason"]) == ("g", "r" * 255)
