"""What a sidecar answers, as messages: each request once, whatever it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from random import Random
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mesh.durable.batch import HEADER_BYTES, Batch, batch
from mesh.durable.deliveries import Settlements
from mesh.durable.hosted import Hosted
from mesh.durable.outcomes import Appended, Opened, Refused, error_of
from mesh.durable.partition import Partition
from mesh.durable.protocol import (
    Answer,
    Append,
    Batches,
    Delivered,
    Fetch,
    Find,
    Inspect,
    Inspected,
    Join,
    Joined,
    Open,
    Place,
    Query,
    Read,
    Reply,
    Settle,
    Settled,
    decode_reply,
    encode_message,
    pack_batch,
    read_batch,
)
from mesh.durable.records import LZ4, NewRecord, batch_of, payloads_of
from mesh.durable.rounds import Rounds
from mesh.durable.sidecar import Sidecar
from mesh.errors import LogLocked, PayloadTooLarge
from mesh.options import StreamOptions
from mesh.sockets import codec
from tests.durable.test_writer import Gate
from tests.support.fake_disk import Content, FakeDisk, Stopped
from tests.support.partitions import numbered, record
from tests.support.waiting import until

NODE = "0123456789abcdef"


class Asking:
    """Whoever asks a sidecar, over a connection that loses nothing."""

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self.answers: SimpleQueue[bytes] = SimpleQueue()
        self.seq = 0
        self.epoch = 0

    def ask(self, query: Query) -> None:
        self.sidecar.handle(encode_message(query), self.answers.put, False)

    def answer(self, timeout: float = 10) -> Reply:
        return decode_reply(self.answers.get(timeout=timeout))

    def told(self, query: Query) -> Reply:
        self.ask(query)
        return self.answer()

    def append(self, *payloads: object, stream: str = "orders") -> Reply:
        if not self.epoch:
            opened = self.told(Open(stream, 7))
            assert isinstance(opened, Opened), opened
            self.epoch = opened.epoch
        records = [each if isinstance(each, NewRecord) else record(each) for each in payloads]
        batch = numbered(batch_of(records), 7, self.epoch, self.seq)
        self.seq += len(payloads)
        return self.told(Append(stream, memoryview(pack_batch(batch))))


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


@pytest.fixture
def sidecar(disk: FakeDisk) -> Iterator[Sidecar]:
    sidecar = Sidecar(disk)
    yield sidecar
    sidecar.close()


@pytest.fixture
def asking(sidecar: Sidecar) -> Asking:
    return Asking(sidecar)


def payloads_in(reply: Reply, sidecar: Sidecar) -> list[object]:
    assert isinstance(reply, Batches | Delivered), reply
    batches = reply.batches if isinstance(reply, Batches) else reply.delivery.batches
    found: list[object] = []
    for data in batches:
        header, body = read_batch(memoryview(data), sidecar.number)
        found += payloads_of(header, body)
    return found


def code_of(reply: Reply) -> str:
    assert isinstance(reply, Refused), reply
    return reply.code


def test_an_append_is_answered_and_can_be_read(asking: Asking, sidecar: Sidecar) -> None:
    first = asking.append("a", "b")
    assert isinstance(first, Appended)
    assert (first.offset, first.count) == (0, 2)
    place = asking.told(Find("orders"))
    assert isinstance(place, Place)
    assert (place.start, place.end, place.offset) == (0, 2, 0)
    assert payloads_in(asking.told(Read("orders", 1)), sidecar) == ["a", "b"]


@pytest.mark.parametrize(
    "odd",
    [
        batch([b"\x91\x01"], count=1, codec=77),
        batch([b"\x91\x01"], count=5),
        batch([b"\xc1"], count=1),
        batch([b""], count=1),
        batch([b"\x91\x01"], count=1, codec=LZ4),
    ],
    ids=["codec", "count", "no array", "nothing", "not compressed"],
)
def test_payloads_that_nobody_could_read_are_not_taken_in(
    asking: Asking, sidecar: Sidecar, odd: Batch
) -> None:
    """Or they would be in the way of whoever reads what is behind them."""
    asking.append("a")
    made = numbered(odd, 7, asking.epoch, 1)
    assert code_of(asking.told(Append("orders", memoryview(pack_batch(made))))) == "malformed"
    assert sidecar.dropped()["malformed"] == 1
    assert isinstance(asking.append("b"), Appended)
    assert payloads_in(asking.told(Read("orders", 0)), sidecar) == ["a", "b"]


def test_who_reads_on_is_answered_when_there_is_more(asking: Asking, sidecar: Sidecar) -> None:
    asking.append("a")
    reader = Asking(sidecar)
    reader.ask(Read("orders", 1, wait_ms=10_000))
    with pytest.raises(Empty):
        reader.answer(0.05)
    asking.append("b")
    assert payloads_in(reader.answer(), sidecar) == ["b"]
    assert payloads_in(reader.told(Read("orders", 2, wait_ms=1)), sidecar) == []


def test_who_waits_is_answered_when_the_sidecar_closes(asking: Asking, sidecar: Sidecar) -> None:
    asking.append("a")
    asking.ask(Read("orders", 1, wait_ms=60_000))
    member = Asking(sidecar)
    assert isinstance(member.told(Join("orders", "billing", NODE, 10)), Joined)
    member.told(Fetch("orders", "billing", NODE, 1))
    member.ask(Fetch("orders", "billing", NODE, 2, wait_ms=60_000))
    sidecar.close()
    assert code_of(asking.answer()) == "closed"
    assert code_of(member.answer()) == "closed"
    assert code_of(asking.told(Open("others", 1))) == "closed"


def test_what_is_not_there_is_refused(asking: Asking) -> None:
    assert code_of(asking.told(Read("orders", 0))) == "missing"
    assert code_of(asking.told(Find("orders"))) == "missing"
    assert code_of(asking.told(Join("orders", "billing", NODE, 1))) == "missing"
    asking.append("a")
    assert code_of(asking.told(Fetch("orders", "billing", NODE, 1))) == "unknown"


def test_what_is_malformed_is_refused(asking: Asking, sidecar: Sidecar) -> None:
    asking.append("a")
    for data in (b"", b"\xc1", b"\x93\xa1A\xa6orders\xc4\x00", bytes(range(200))):
        sidecar.handle(data, asking.answers.put, False)
        assert code_of(asking.answer()) == "malformed"
    good = pack_batch(numbered(batch_of([record("b")]), 7, asking.epoch, asking.seq))
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        assert code_of(asking.told(Append("orders", memoryview(bytes(bad))))) == "malformed"
    for data in (good[:HEADER_BYTES], good[:-1], good + b"\0"):
        assert code_of(asking.told(Append("orders", memoryview(data)))) == "malformed"
    assert isinstance(asking.told(Append("orders", memoryview(good))), Appended)


def test_random_bytes_are_answered_with_a_refusal(asking: Asking, sidecar: Sidecar) -> None:
    luck = Random(3)
    for _ in range(2000):
        sidecar.handle(luck.randbytes(luck.randint(0, 80)), asking.answers.put, False)
        assert code_of(asking.answer()) == "malformed"


def test_a_stream_has_the_options_it_was_made_with(asking: Asking, disk: FakeDisk) -> None:
    options = StreamOptions(keep_count=5)
    assert isinstance(asking.told(Open("orders", 1, options)), Opened)
    assert isinstance(asking.told(Open("orders", 1)), Opened)
    assert code_of(asking.told(Open("orders", 1, StreamOptions()))) == "differs"
    again = Asking(Sidecar(disk.kill()))
    assert isinstance(again.told(Open("orders", 1, options)), Opened)
    assert code_of(again.told(Open("orders", 1, StreamOptions()))) == "differs"
    again.sidecar.close()


def test_what_a_disk_has_refused_is_told(asking: Asking, disk: FakeDisk) -> None:
    asking.append("a")
    disk.faults.fail("sync")
    assert code_of(asking.append("b")) == "storage"
    told = asking.told(Inspect("orders"))
    assert isinstance(told, Inspected)
    assert (told.stats.failures, told.stats.refused) == (1, {"storage": 1})
    assert (told.stats.records, told.stats.unsynced_lost) == (1, 1)
    assert asking.sidecar.dropped() == {"append storage": 1, "unsynced": 1}
    assert code_of(asking.told(Inspect("others"))) == "missing"


def test_a_full_disk_refuses_a_new_stream_as_it_does_an_append(
    asking: Asking, disk: FakeDisk
) -> None:
    """So that who waits for room waits for it, and dead letters do not take it for a fault."""
    asking.append("a")
    disk.faults.room_bytes = 0
    refused = asking.told(Open("others", 1))
    assert isinstance(refused, Refused)
    assert refused.code == code_of(asking.append("b" * 100)) == "full"
    assert refused.text.startswith("stream 'others' cannot be opened: [Errno 28] No space left")
    disk.faults.room_bytes = None
    assert isinstance(asking.told(Open("others", 1)), Opened)


def test_how_far_groups_have_come_is_told_though_nobody_consumes(
    asking: Asking, disk: FakeDisk
) -> None:
    asking.append("a", "b")
    joined = asking.told(Join("orders", "billing", NODE, 10))
    assert isinstance(joined, Joined)
    asking.told(Fetch("orders", "billing", NODE, 1))
    said = Settlements(acks=((0, 1),))
    asking.told(Settle("orders", "billing", NODE, joined.log_epoch, said))
    asking.sidecar.close()
    again = Asking(Sidecar(disk.again()))
    told = again.told(Inspect("orders"))
    assert isinstance(told, Inspected)
    assert (told.stats.groups["billing"].lag, told.stats.groups["billing"].members) == (1, 0)
    again.sidecar.close()


def test_a_stream_whose_segments_are_missing_keeps_its_options(disk: FakeDisk) -> None:
    """A copy that is not complete, say: whoever opened it then gave it other ones."""
    options = StreamOptions(retention="acked", bytes_max=1 << 20)
    asking = Asking(Sidecar(disk))
    asking.told(Open("orders", 1, options))
    asking.append("a")
    asking.sidecar.close()
    found = disk.kill()
    folder = found.folder("streams").folder("orders")
    segments = {
        name: folder._find(name) for name in folder.names() if name.endswith((".log", ".index"))
    }
    for name in segments:
        folder.remove(name)
    again = Asking(Sidecar(found))
    told = again.told(Open("orders", 2))
    assert isinstance(told, Refused)
    assert (told.code, "no segment is left of 1 records" in told.text) == ("damaged", True)
    again.sidecar.close()
    for name, content in segments.items():
        folder._directory.put(name, content)
    again = Asking(Sidecar(found.kill()))
    assert isinstance(again.told(Open("orders", 1, options)), Opened)
    again.sidecar.close()


@pytest.mark.damages
def test_a_damaged_stream_refuses_and_others_go_on(asking: Asking, disk: FakeDisk) -> None:
    asking.append("a")
    asking.append("b")
    found = disk.kill()
    folder = found.folder("streams").folder("orders")
    (name,) = (each for each in folder.names() if each.endswith(".log"))
    file = folder.open_to_read(name)
    data = bytearray(file.read(0, file.size()))
    data[150] ^= 1
    folder._directory.put(name, Content(bytes(data)))
    sidecar = Sidecar(found)
    again = Asking(sidecar)
    assert code_of(again.told(Open("orders", 1))) == "damaged"
    assert code_of(again.told(Read("orders", 0))) == "damaged"
    assert isinstance(again.append("x", stream="others"), Appended)
    sidecar.close()


def test_a_stream_that_cannot_be_looked_after_holds_up_no_other(
    asking: Asking, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking.append("a")
    Asking(sidecar).append("b", stream="others")
    looked_after = Event()

    def tick(hosted: Hosted) -> None:
        if hosted.name == "orders":
            raise OSError("it cannot be read")
        looked_after.set()

    monkeypatch.setattr(Hosted, "tick", tick)
    monkeypatch.setattr(sidecar._rounds, "next", lambda names, now: None)
    sidecar._clerk.run(sidecar._tick)
    assert looked_after.wait(10)


def test_a_directory_is_one_sidecars(sidecar: Sidecar, disk: FakeDisk) -> None:
    with pytest.raises(LogLocked):
        Sidecar(disk.again())
    number = sidecar.number
    sidecar.close()
    again = Sidecar(disk.again())
    assert again.number == number
    again.close()


@pytest.mark.parametrize("name", ["a/b", "a.b", "größe", ".dead", "%2F", "x" * 80])
def test_streams_may_have_any_name_that_channels_have(disk: FakeDisk, name: str) -> None:
    sidecar = Sidecar(disk)
    assert isinstance(Asking(sidecar).append("a", stream=name), Appended)
    assert sidecar.streams == {name}
    sidecar.close()
    again = Sidecar(disk.kill())
    assert again.streams == {name}
    assert payloads_in(Asking(again).told(Read(name, 0)), again) == ["a"]
    again.close()


def test_a_stream_that_is_one_too_many_leaves_nothing(
    disk: FakeDisk, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or whoever asks for ever more names fills the disk with folders."""
    monkeypatch.setattr("mesh.limits.STREAMS_MAX", 1)
    assert isinstance(asking.append("a"), Appended)
    assert code_of(asking.told(Open("more", 7))) == "full"
    assert disk.folder("streams").names() == ["orders"]


@pytest.mark.parametrize(
    ("fetched", "unseen", "deliveries"),
    [(1, (), 2), (1, ((0, 10),), 1), (0, (), 1)],
    ids=["seen", "unseen here", "under way"],
)
def test_what_a_member_that_leaves_has_shown_to_nobody_was_never_delivered(
    disk: FakeDisk, fetched: int, unseen: tuple[tuple[int, int], ...], deliveries: int
) -> None:
    """Also what it was sent, and did not get any more."""
    sidecar = Sidecar(disk)
    asking = Asking(sidecar)
    for n in range(10):
        asking.append(n)
    joined = asking.told(Join("orders", "billing", NODE, 100))
    assert isinstance(joined, Joined)
    asking.told(Fetch("orders", "billing", NODE, 1))
    said = Settlements(unseen=unseen)
    asking.told(Settle("orders", "billing", NODE, joined.log_epoch, said, True, fetched=fetched))
    asking.told(Join("orders", "billing", f"{NODE}-2", 100))
    delivered = asking.told(Fetch("orders", "billing", f"{NODE}-2", 1))
    assert isinstance(delivered, Delivered)
    assert {grant[2] for grant in delivered.delivery.grants} == {deliveries}
    sidecar.close()


@pytest.mark.parametrize("joins", [False, True])
def test_what_is_said_of_a_log_is_not_taken_for_said_of_another_in_its_place(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    """Whose consumers have lived on: it was moved away, and the stream began anew."""
    sidecar = Sidecar(disk)
    asking = Asking(sidecar)
    for n in range(4):
        asking.append(n)
    old = asking.told(Join("orders", "billing", NODE, 100))
    assert isinstance(old, Joined)
    sidecar.close()
    later = SimpleNamespace(time_ns=lambda: time.time_ns() + 10**10, monotonic=time.monotonic)
    monkeypatch.setattr("mesh.durable.sidecar.time", later)
    again = FakeDisk()
    again.replace("identity", disk.open_to_read("identity").read(0, 64))
    sidecar = Sidecar(again)
    asking = Asking(sidecar)
    for n in range(4):
        asking.append(n)
    asking.told(Join("orders", "billing", f"{NODE}-2", 100))
    asking.told(Fetch("orders", "billing", f"{NODE}-2", 1))
    if joins:
        joined = asking.told(Join("orders", "billing", NODE, 100, log_epoch=old.log_epoch))
        assert isinstance(joined, Joined)
        assert joined.cut_at == 0
    said = Settlements(((0, 2),), rejects=((2, "bad"),))
    settled = asking.told(Settle("orders", "billing", NODE, old.log_epoch, said, number=1))
    assert settled == Settled(0)
    inspected = asking.told(Inspect("orders"))
    assert isinstance(inspected, Inspected)
    group = inspected.stats.groups["billing"]
    assert (group.in_flight, group.committed) == (4, 0)
    sidecar.close()


def test_what_was_said_and_is_asked_again_hands_nothing_back_again(disk: FakeDisk) -> None:
    """A record that has come again meanwhile is another delivery, which somebody works on."""
    sidecar = Sidecar(disk)
    asking = Asking(sidecar)
    for n in range(3):
        asking.append(n)
    joined = asking.told(Join("orders", "billing", NODE, 100))
    assert isinstance(joined, Joined)
    asking.told(Fetch("orders", "billing", NODE, 1))
    said = Settlements(((1, 2),), naks=((0, 0.0),), rejects=((2, "bad"),))
    settle = Settle("orders", "billing", NODE, joined.log_epoch, said, number=1)
    asking.told(settle)
    again = asking.told(Fetch("orders", "billing", NODE, 2))
    assert isinstance(again, Delivered)
    assert again.delivery.grants == ((0, 1, 2),)
    for _ in range(3):
        asking.told(settle)
    inspected = asking.told(Inspect("orders"))
    assert isinstance(inspected, Inspected)
    group = inspected.stats.groups["billing"]
    assert group.in_flight == 1
    assert not group.counters.keys() & {"late nak", "late reject"}
    sidecar.close()


# -- Streams that nobody asks for


def sizes(disk: FakeDisk, stream: str) -> list[int]:
    folder = disk.folder("streams").folder(stream)
    return [folder.open_to_read(n).size() for n in folder.names() if n.endswith(".log")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [StreamOptions(keep_s=0.001), StreamOptions(retention="acked")], ids=["age", "acked"]
)
def test_what_is_to_go_goes_though_nobody_has_asked_for_the_stream(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch, options: StreamOptions
) -> None:
    sidecar = Sidecar(disk, segment_bytes=500)
    for stream in ("kept", "orders"):
        asking = Asking(sidecar)
        for n in range(40):
            asking.append(n, stream=stream)
        joined = asking.told(Join(stream, "billing", NODE, 100))
        assert isinstance(joined, Joined)
        asking.told(Fetch(stream, "billing", NODE, 1))
        said = Settlements(acks=((0, 40),))
        settled = asking.told(Settle(stream, "billing", NODE, joined.log_epoch, said))
        assert settled == Settled(40)
    sidecar.close()
    assert len(sizes(disk, "orders")) > 5
    # Now it has been closed for long.
    folder = disk.folder("streams").folder("orders")
    folder.replace("options", msgspec.json.encode(options))
    monkeypatch.setattr("mesh.durable.sidecar._TICK_S", 0.01)
    again = Sidecar(disk.again(), segment_bytes=500)
    until(lambda: len(sizes(disk, "orders")) == 1)
    assert not again._hosted
    assert len(sizes(disk, "kept")) > 5
    assert payloads_in(Asking(again).told(Read("orders", 39)), again) == [39]
    again.close()


def test_a_stream_that_somebody_has_asked_for_is_not_opened_a_second_time(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_one = Sidecar._open

    def counted(sidecar: Sidecar, name: str, *more: Any) -> Any:
        opened.append(name)
        return open_one(sidecar, name, *more)

    first = Sidecar(disk, segment_bytes=500)
    asking = Asking(first)
    assert isinstance(asking.told(Open("orders", 7, StreamOptions(keep_s=1e6))), Opened)
    for n in range(40):
        asking.append(n)
    first.close()
    monkeypatch.setattr(Sidecar, "_open", counted)
    monkeypatch.setattr("mesh.durable.sidecar._TICK_S", 1000)
    sidecar = Sidecar(disk.again(), segment_bytes=500)
    sidecar._look_after("orders")
    assert opened == ["orders"]
    assert isinstance(Asking(sidecar).append("more"), Appended)
    sidecar._look_after("orders")
    assert opened == ["orders", "orders"]
    sidecar.close()
    Sidecar(disk.again()).close()


# -- Members


def test_a_member_is_given_records_and_settles_them(asking: Asking, sidecar: Sidecar) -> None:
    asking.append("a", "b", "c")
    joined = asking.told(Join("orders", "billing", NODE, 2))
    assert isinstance(joined, Joined)
    given = asking.told(Fetch("orders", "billing", NODE, 1))
    assert isinstance(given, Delivered)
    assert [(first, end) for first, end, _ in given.delivery.grants] == [(0, 2)]
    said = Settlements(acks=((0, 2),))
    assert asking.told(Settle("orders", "billing", NODE, joined.log_epoch, said)) == Settled(2)
    given = asking.told(Fetch("orders", "billing", NODE, 2))
    assert isinstance(given, Delivered)
    assert [(first, end) for first, end, _ in given.delivery.grants] == [(2, 3)]


def test_what_cannot_have_been_read_from_a_log_settles_nothing_of_it(asking: Asking) -> None:
    """It was begun anew, or brought back from a backup, and its offsets are other records'."""
    asking.append(*range(5))
    join = Join("orders", "billing", f"{NODE}-m", 10, resume=6)
    told = asking.told(join)
    assert isinstance(told, Refused)
    assert (told.code, told.text) == (
        "malformed",
        "stream 'orders': its log ends at 5, and all below 6 is said to be done (resume_from): "
        "that was read from another log, or an older copy is back",
    )
    inspected = asking.told(Inspect("orders"))
    assert isinstance(inspected, Inspected)
    assert inspected.stats.groups == {}
    joined = asking.told(msgspec.structs.replace(join, resume=5))
    assert isinstance(joined, Joined)
    assert joined.committed == 5


def test_a_question_asked_again_gets_the_same_answer(asking: Asking) -> None:
    """The first was lost with its connection, and what it brought is not to wait for its lease."""
    asking.append("a", "b")
    asking.told(Join("orders", "billing", NODE, 10))
    first = asking.told(Fetch("orders", "billing", NODE, 1))
    assert isinstance(first, Delivered)
    assert first.delivery.grants
    assert asking.told(Fetch("orders", "billing", NODE, 1)) == first


def test_the_members_of_a_node_that_is_gone_hold_nothing(asking: Asking, sidecar: Sidecar) -> None:
    asking.append("a", "b")
    asking.told(Join("orders", "billing", NODE + "1", 10))
    asking.told(Fetch("orders", "billing", NODE + "1", 1))
    other = Asking(sidecar)
    other.told(Join("orders", "billing", "f" * 16, 10))
    other.ask(Fetch("orders", "billing", "f" * 16, 1, wait_ms=60_000))
    sidecar.node_gone(NODE)
    given = other.answer()
    assert isinstance(given, Delivered)
    assert given.delivery.grants == ((0, 2, 2),)


def test_what_is_rejected_is_a_dead_letter_though_its_headers_are_none(
    asking: Asking, sidecar: Sidecar
) -> None:
    """Some producer of its own making may send such."""
    asking.append(NewRecord(codec.pack("a"), headers=["odd"]))
    joined = asking.told(Join("orders", "billing", NODE, 1))
    assert isinstance(joined, Joined)
    asking.told(Fetch("orders", "billing", NODE, 1))
    said = Settlements(rejects=((0, "no"),))
    asking.told(Settle("orders", "billing", NODE, joined.log_epoch, said))
    until(lambda: "orders.dead" in sidecar.streams)
    letter = asking.told(Read("orders.dead", 0, wait_ms=10_000))
    assert payloads_in(letter, sidecar) == ["a"]


def test_dead_letters_wait_for_room_together(
    asking: Asking,
    sidecar: Sidecar,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One in turn tries, and all go once that one does."""
    bury, tried, full = Sidecar._bury, SimpleQueue[Batch](), Event()
    full.set()

    def refuse(self: Sidecar, stream: str, batch: Batch, answer: Answer) -> None:
        tried.put(batch)
        if full.is_set():
            answer(Refused("full", "there is no room"))
        else:
            bury(self, stream, batch, answer)

    monkeypatch.setattr(Sidecar, "_bury", refuse)
    asking.append(*range(20))
    joined = asking.told(Join("orders", "billing", NODE, 20))
    assert isinstance(joined, Joined)
    asking.told(Fetch("orders", "billing", NODE, 1))
    said = Settlements(rejects=tuple((offset, "no") for offset in range(20)))
    asking.told(Settle("orders", "billing", NODE, joined.log_epoch, said))
    until(lambda: tried.qsize() == 20)
    for more in range(1, 4):
        sidecar._clerk.run(sidecar._tick)
        until(lambda more=more: tried.qsize() >= 20 + more)  # type: ignore[misc]
    assert tried.qsize() < 30
    assert len([each for each in caplog.records if "have to wait" in each.message]) == 1
    full.clear()
    sidecar._clerk.run(sidecar._tick)
    until(lambda: "orders.dead" in sidecar.streams)
    until(lambda: getattr(asking.told(Find("orders.dead")), "end", 0) == 20)


def test_who_lets_in_less_than_comes_next_is_told_so(asking: Asking, sidecar: Sidecar) -> None:
    """It would be sent that all the same, and its connection would end, again and again."""
    asking.append("small")
    asking.append("x" * 5000)
    small = 4096
    first = asking.told(Read("orders", 0, message_bytes_max=small))
    assert payloads_in(first, sidecar) == ["small"]
    next_read = asking.told(Read("orders", 1, message_bytes_max=small))
    asking.told(Join("orders", "billing", NODE, 10, message_bytes_max=small))
    assert payloads_in(asking.told(Fetch("orders", "billing", NODE, 1)), sidecar) == ["small"]
    next_fetched = asking.told(Fetch("orders", "billing", NODE, 2))
    for reply, where in ((next_read, ""), (next_fetched, "group 'billing' of ")):
        assert isinstance(reply, Refused), reply
        text = "a batch of 5,076 bytes, with records 1 to 1, has no room within the limit of 4,096"
        because = f"{text} of who reads it (option message_bytes_max)"
        assert reply == Refused("over", f"{where}stream 'orders': {because}")
        assert isinstance(error_of(reply), PayloadTooLarge)
    assert payloads_in(asking.told(Read("orders", 1)), sidecar) == ["x" * 5000]


def test_what_a_node_asked_before_it_died_makes_it_no_member(disk: FakeDisk) -> None:
    present = {NODE}
    sidecar = Sidecar(disk, is_present=present.__contains__)
    asking = Asking(sidecar)
    asking.append("a")
    assert isinstance(asking.told(Join("orders", "billing", NODE + "1", 10)), Joined)
    present.clear()
    sidecar.node_gone(NODE)
    assert code_of(asking.told(Join("orders", "billing", NODE + "1", 10))) == "unknown"
    assert code_of(asking.told(Fetch("orders", "billing", NODE + "1", 1))) == "unknown"
    sidecar.close()


@pytest.mark.slow
def test_a_stream_that_was_only_begun_is_made_as_it_is_asked_for_then() -> None:
    """Ended while it was made. Whoever reads first does not make it, with other options."""
    options, ended = StreamOptions(retention="acked"), 0
    for nth in range(1, 40):
        disk = FakeDisk(nth)
        sidecar = Sidecar(disk)
        disk.faults.stop_at = disk.operations + nth
        try:
            opened = sidecar._open("orders", options, True)
            assert isinstance(opened, Hosted)
            sidecar._hosted["orders"] = opened
        except Stopped:
            ended += 1
        sidecar.close()
        sidecar = Sidecar(disk.kill())
        asking = Asking(sidecar)
        found = asking.told(Find("orders"))
        assert isinstance(found, Place) or (isinstance(found, Refused) and found.code == "missing")
        assert isinstance(asking.told(Open("orders", 7, options)), Opened)
        assert isinstance(asking.told(Find("orders")), Place)
        sidecar.close()
    assert 8 < ended < 39


# -- Its end


def test_a_directory_is_nobody_elses_while_one_of_its_logs_is_written(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its disk takes: two would write one file."""
    sidecar = Sidecar(disk)
    asking = Asking(sidecar)
    asking.append("a")
    with monkeypatch.context() as patch:
        gate = Gate(patch)
        batch = numbered(batch_of([record("b")]), 7, asking.epoch, 1)
        asking.ask(Append("orders", memoryview(pack_batch(batch))))
        until(lambda: gate.waiting == 1)
        sidecar.close(0.05)
        with pytest.raises(LogLocked):
            Sidecar(disk.again())
        gate.open()
        assert isinstance(asking.answer(), Appended)

        opened: list[Sidecar] = []

        def is_free() -> bool:
            with contextlib.suppress(LogLocked):
                opened.append(Sidecar(disk.again()))
            return bool(opened)

        until(is_free)
    assert payloads_in(Asking(opened[0]).told(Read("orders", 0)), opened[0]) == ["a", "b"]
    opened[0].close()


class Hanging:
    """The disk of one stream does not answer as it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stream: str = "slow") -> None:
        self.gate, self.began = Event(), Event()
        open_one = Sidecar._open

        def hang(sidecar: Sidecar, name: str, *more: Any) -> Any:
            if name == stream:
                self.began.set()
                assert self.gate.wait(30)
            return open_one(sidecar, name, *more)

        monkeypatch.setattr(Sidecar, "_open", hang)


def hanging_sidecar(disk: FakeDisk, monkeypatch: pytest.MonkeyPatch) -> tuple[Asking, Hanging]:
    """One that has a record in stream "slow"."""
    asking = Asking(Sidecar(disk))
    asking.append("a", stream="slow")
    asking.sidecar.close()
    hanging = Hanging(monkeypatch)
    asking.sidecar = Sidecar(disk.again())
    return asking, hanging


def test_a_stream_whose_opening_hangs_holds_up_none_of_the_others(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither who appends to others, nor who reads them; and in whichever order they ask."""
    before = Asking(Sidecar(disk))
    before.append("a", stream="slow")
    before.append("b", stream="quick")
    before.sidecar.close()
    hanging = Hanging(monkeypatch)
    sidecar = Sidecar(disk.again())
    slow, quick = Asking(sidecar), Asking(sidecar)

    def ask() -> None:  # as the one thread does that passes on what comes over sockets
        slow.ask(Find("slow"))
        assert hanging.began.wait(30)
        slow.ask(Open("slow", 8))
        quick.ask(Open("quick", 7))
        quick.ask(Find("quick"))

    asks = Thread(target=ask, daemon=True)
    asks.start()
    try:
        told = {type(quick.answer()) for _ in range(2)}
        assert told == {Opened, Place}
        assert slow.answers.empty()
    finally:
        hanging.gate.set()
        asks.join()
    assert {type(slow.answer()) for _ in range(2)} == {Opened, Place}
    sidecar.close()


def test_a_stream_that_hangs_as_it_is_looked_after_holds_up_none_of_the_others(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nobody has asked for it."""
    before = Asking(Sidecar(disk, segment_bytes=500))
    assert isinstance(before.told(Open("slow", 7, StreamOptions(keep_s=1e6))), Opened)
    for n in range(40):
        before.append(n, stream="slow")
    Asking(before.sidecar).append("b", stream="quick")
    before.sidecar.close()
    hanging = Hanging(monkeypatch)
    sidecar = Sidecar(disk.again(), segment_bytes=500)
    quick = Asking(sidecar)
    try:
        assert hanging.began.wait(30)
        assert isinstance(quick.told(Find("quick")), Place)
    finally:
        hanging.gate.set()
    sidecar.close()


def test_names_that_are_too_many_or_none_are_refused_though_the_disk_hangs(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for ever more of them makes nothing grow."""
    monkeypatch.setattr("mesh.limits.STREAMS_MAX", 3)
    monkeypatch.setattr("mesh.limits.OPENINGS_MAX", 1)
    hanging = Hanging(monkeypatch)
    asking = Asking(sidecar := Sidecar(disk))
    names = ["slow", "a", "b"]
    for name in names:
        asking.ask(Open(name, 7))
    asking.ask(Open("a", 8))
    try:
        assert hanging.began.wait(30)
        other = Asking(sidecar)
        assert code_of(other.told(Open("c", 7))) == "full"
        assert code_of(other.told(Open("x" * 300, 7))) == "malformed"
    finally:
        hanging.gate.set()
    assert {type(asking.answer()) for _ in range(4)} == {Opened}
    assert sidecar.streams == set(names)
    sidecar.close()


def test_a_stream_that_could_not_be_made_takes_nobodys_place(
    disk: FakeDisk, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.STREAMS_MAX", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Partition, "__init__", lambda *_, **__: 1 / 0)
        assert code_of(asking.told(Open("a", 7))) == "storage"
    assert isinstance(asking.told(Open("b", 7)), Opened)


def test_a_stream_is_looked_after_once_a_thread_is_free(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Sidecar(disk)
    for name in ("slow", "a"):
        Asking(before).append("a", stream=name)
    before.close()
    monkeypatch.setattr("mesh.limits.OPENINGS_MAX", 1)
    monkeypatch.setattr("mesh.durable.sidecar._TICK_S", 1e6)  # by hand
    hanging = Hanging(monkeypatch)
    put_back: SimpleQueue[str] = SimpleQueue()
    looked_after: SimpleQueue[str] = SimpleQueue()

    def is_put_back(rounds: Rounds, name: str) -> None:
        rounds._due.appendleft(name)
        put_back.put(name)

    monkeypatch.setattr(Rounds, "put_back", is_put_back)
    monkeypatch.setattr(Sidecar, "_may_go", lambda sidecar, name: looked_after.put(name))
    sidecar = Sidecar(disk.again())
    sidecar.ask(Find("slow"), lambda _: None)
    assert hanging.began.wait(30)
    sidecar._clerk.run(sidecar._tick)
    assert put_back.get(timeout=10) == "a"
    assert looked_after.empty()
    hanging.gate.set()
    until(lambda: not sidecar._openings._threads)
    sidecar._clerk.run(sidecar._tick)
    assert looked_after.get(timeout=10) == "a"
    sidecar.close()


def test_what_is_appended_while_a_stream_is_opened_is_written_in_its_order(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking, hanging = hanging_sidecar(disk, monkeypatch)
    sidecar = asking.sidecar
    for n in range(1, 10):
        if n == 5:
            hanging.gate.set()
        batch = numbered(batch_of([record(n)]), 7, asking.epoch, n)
        asking.ask(Append("slow", memoryview(pack_batch(batch))))
    for n in range(1, 10):
        appended = asking.answer()
        assert isinstance(appended, Appended), appended
        assert appended.offset == n
    sidecar.close()


def test_a_sidecar_closes_in_time_while_a_stream_is_being_opened(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking, hanging = hanging_sidecar(disk, monkeypatch)
    sidecar = asking.sidecar
    asking.ask(Find("slow"))
    assert hanging.began.wait(30)
    asking.ask(Read("slow", 0))
    closes = Thread(target=sidecar.close, args=(0.05,), daemon=True)
    closes.start()
    closes.join(10)
    try:
        assert not closes.is_alive()
        assert code_of(asking.answer()) == "closed"
        with pytest.raises(LogLocked):
            Sidecar(disk.again())
    finally:
        hanging.gate.set()
        closes.join()
    assert code_of(asking.answer()) == "closed"
    until(lambda: is_free(disk))


def is_free(disk: FakeDisk) -> bool:
    with contextlib.suppress(LogLocked):
        Sidecar(disk.again()).close()
        return True
    return False


@pytest.mark.parametrize(
    "query",
    [
        Open("orders", 8),
        Find("orders"),
        Find("others"),
        Read("orders", 0),
        Inspect("orders"),
        Join("orders", "billing", NODE, 1),
        Fetch("orders", "billing", NODE, 1),
        Settle("orders", "billing", NODE, 1, Settlements()),
    ],
    ids=lambda query: f"{type(query).__name__} {query.stream}",
)
def test_what_is_asked_of_a_sidecar_that_was_closed_is_refused(
    disk: FakeDisk, query: Query
) -> None:
    asking = Asking(Sidecar(disk))
    asking.append("a")
    asking.sidecar.close()
    assert code_of(asking.told(query)) == "closed"


def test_who_asks_is_answered_whatever_goes_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asking = Asking(Sidecar(FakeDisk()))
    asking.append("x")
    later: list[Answer] = []

    def fail(hosted: Hosted, query: Read, answer: Answer) -> None:
        later.append(answer)
        raise ZeroDivisionError

    monkeypatch.setattr(Hosted, "read", fail)
    assert code_of(asking.told(Read("orders", 0))) == "storage"
    later[0](Refused("closed", "too late"))
    assert asking.answers.empty()
    assert "ZeroDivisionError" in caplog.text
    asking.sidecar.close()
