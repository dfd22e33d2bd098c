"""Producers: a repeated append gets its original receipt, and nothing is appended twice."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from mesh import limits
from mesh.durable.dedup_ids import NS_PER_S, Original
from mesh.durable.producers import (
    FIRST_EPOCH_MAX,
    NEW,
    Fenced,
    Gap,
    NewRun,
    Producers,
    SnapshotDamaged,
    Unknown,
)

P, Q = 0xA, 0xB
NOW_S = 1_700_000_000
NOW_NS = NOW_S * NS_PER_S


@pytest.fixture
def producers() -> Producers:
    return Producers()


def open_anew(producers: Producers, producer_id: int, now_ns: int = NOW_NS) -> int:
    """As the log does: decide, write, note. Returns the epoch."""
    opened = producers.open(producer_id, now_ns)
    producers.opened(producer_id, opened.epoch, opened.next_seq)
    return opened.epoch


# Sequences


def test_what_follows_is_new(producers: Producers) -> None:
    epoch = open_anew(producers, P)
    assert producers.check(P, epoch, 0, 3) is NEW
    producers.appended(P, epoch, 0, 3, 100, 7)
    assert producers.check(P, epoch, 3, 1) is NEW


def test_a_repeat_of_exactly_one_batch_names_its_original(producers: Producers) -> None:
    epoch = open_anew(producers, P)
    producers.appended(P, epoch, 0, 3, 100, 7)
    producers.appended(P, epoch, 3, 1, 110, 8)
    producers.appended(P, epoch, 4, 5, 120, 9)
    assert producers.check(P, epoch, 0, 3) == Original(100, 7)
    assert producers.check(P, epoch, 3, 1) == Original(110, 8)
    assert producers.check(P, epoch, 4, 5) == Original(120, 9)


@pytest.mark.parametrize(("seq", "count"), [(0, 4), (1, 3), (2, 2), (2, 5)])
def test_a_batch_that_overlaps_others_is_a_gap(producers: Producers, seq: int, count: int) -> None:
    epoch = open_anew(producers, P)
    producers.appended(P, epoch, 0, 3, 100, 7)
    producers.appended(P, epoch, 3, 1, 103, 8)
    verdict = producers.check(P, epoch, seq, count)
    assert verdict == Gap(seq, count, 4)
    assert str(verdict) == (
        f"records {seq} to {seq + count - 1} came, where 4 is the next "
        "and no batch that has them is remembered"
    )


@pytest.mark.parametrize(("seq", "count"), [(0, 2), (1, 1), (1, 2), (2, 1)])
def test_part_of_a_batch_is_where_that_is(producers: Producers, seq: int, count: int) -> None:
    epoch = open_anew(producers, P)
    producers.appended(P, epoch, 0, 3, 100, 7)
    producers.appended(P, epoch, 3, 1, 103, 8)
    assert producers.check(P, epoch, seq, count) == Original(100 + seq, 7)


def test_a_batch_beyond_the_next_is_a_gap(producers: Producers) -> None:
    epoch = open_anew(producers, P)
    producers.appended(P, epoch, 0, 3, 100, 7)
    verdict = producers.check(P, epoch, 1004, 2)
    assert verdict == Gap(1004, 2, 3)
    assert str(verdict) == "records 1,004 to 1,005 came where 3 is the next"


def test_producers_are_apart(producers: Producers) -> None:
    p, q = open_anew(producers, P), open_anew(producers, Q)
    producers.appended(P, p, 0, 3, 100, 7)
    assert producers.check(Q, q, 0, 3) is NEW


def test_just_the_last_batches_are_remembered(producers: Producers) -> None:
    epoch = open_anew(producers, P)
    for i in range(limits.PRODUCER_BATCHES + 1):
        producers.appended(P, epoch, 2 * i, 2, 2 * i, 7)
    end = 2 * limits.PRODUCER_BATCHES + 2
    assert producers.check(P, epoch, 0, 2) == Gap(0, 2, end)
    for i in range(1, limits.PRODUCER_BATCHES + 1):
        assert producers.check(P, epoch, 2 * i, 2) == Original(2 * i, 7)


def test_a_record_turned_away_uses_up_its_number_and_names_the_original(
    producers: Producers,
) -> None:
    epoch = open_anew(producers, P)
    producers.appended(P, epoch, 0, 1, 500, 9)
    producers.appended(P, epoch, 1, 1, 20, 3)
    assert producers.check(P, epoch, 1, 1) == Original(20, 3)
    assert producers.check(P, epoch, 2, 1) is NEW


# Epochs


def test_a_new_run_goes_on_where_the_last_one_stood(producers: Producers) -> None:
    first = open_anew(producers, P)
    producers.appended(P, first, 0, 3, 100, 7)
    assert producers.open(P, NOW_NS) == NewRun(first + 1, 3)


def test_a_run_whose_opening_was_lost_shares_its_epoch_with_no_other(producers: Producers) -> None:
    """What it still appends would be taken for what the other did under that number."""
    open_anew(producers, P)
    lost = producers.open(P, NOW_NS)
    later = producers.open(P, NOW_NS + 60 * NS_PER_S)
    assert later.epoch > lost.epoch


def test_an_opening_that_was_not_written_changes_nothing(producers: Producers) -> None:
    epoch = open_anew(producers, P)
    producers.open(P, NOW_NS)
    assert producers.open(P, NOW_NS).epoch == epoch + 1
    assert producers.check(P, epoch, 0, 1) is NEW


def test_an_earlier_run_is_fenced_also_with_its_repeats(producers: Producers) -> None:
    first = open_anew(producers, P)
    producers.appended(P, first, 0, 3, 100, 7)
    second = open_anew(producers, P)
    for seq in (0, 3):
        assert producers.check(P, first, seq, 3) == Fenced(first, second)
    assert str(Fenced(4, 5)) == "epoch 4 of this producer was ended by epoch 5"


def test_a_new_run_may_repeat_what_the_last_one_wrote(producers: Producers) -> None:
    producers.appended(P, open_anew(producers, P), 0, 3, 100, 7)
    assert producers.check(P, open_anew(producers, P), 0, 3) == Original(100, 7)


def test_who_was_never_opened_is_unknown(producers: Producers) -> None:
    verdict = producers.check(P, 1, 0, 1)
    assert verdict == Unknown(P, 1)
    assert str(verdict) == "producer 000000000000000a with epoch 1 is not known here"


def test_an_epoch_that_nobody_was_given_is_unknown(producers: Producers) -> None:
    """It was, by a log that lost the opening."""
    epoch = open_anew(producers, P)
    assert producers.check(P, epoch + 1, 0, 1) == Unknown(P, epoch + 1)


@pytest.mark.parametrize(
    ("now_ns", "epoch"),
    [
        (0, 1),
        (NOW_NS + 999_999_999, NOW_S),
        (1 << 63, FIRST_EPOCH_MAX),
    ],
)
def test_the_first_epoch_is_the_clock_s(producers: Producers, now_ns: int, epoch: int) -> None:
    """Above any before it, though the table that knew of those be lost."""
    assert producers.open(P, now_ns) == NewRun(epoch, 0)


# What is forgotten


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PRODUCERS_MAX", 3)


@pytest.mark.usefixtures("three")
def test_the_producer_idle_longest_is_forgotten_first(producers: Producers) -> None:
    epochs = [open_anew(producers, i) for i in range(3)]
    producers.appended(0, epochs[0], 0, 1, 100, 7)
    open_anew(producers, 3)
    assert len(producers) == 3
    assert producers.forgotten == {"producer": 1}
    assert producers.check(0, epochs[0], 1, 1) is NEW
    assert producers.check(1, epochs[1], 0, 1) == Unknown(1, epochs[1])
    assert producers.check(2, epochs[2], 0, 1) is NEW


@pytest.mark.usefixtures("three")
def test_asking_keeps_nobody_from_being_forgotten(producers: Producers) -> None:
    """Else the table would not follow from the log alone."""
    epochs = [open_anew(producers, i) for i in range(3)]
    producers.check(0, epochs[0], 0, 1)
    producers.open(0, NOW_NS)
    open_anew(producers, 3)
    assert producers.check(0, epochs[0], 0, 1) == Unknown(0, epochs[0])


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("clock_ns", [0, NOW_NS])
def test_no_run_gets_the_epoch_of_one_that_was_forgotten(
    producers: Producers, clock_ns: int
) -> None:
    """Its first batch would pass for the new run's."""
    for _ in range(5):
        stale = open_anew(producers, P)
    for i in range(3):
        open_anew(producers, i, clock_ns)
    assert producers.check(P, stale, 0, 1) == Unknown(P, stale)
    fresh = open_anew(producers, P, clock_ns)
    producers.appended(P, fresh, 0, 1, 100, 7)
    assert producers.check(P, stale, 0, 1) == Fenced(stale, fresh)
    assert producers.check(P, stale, 1, 1) == Fenced(stale, fresh)


@pytest.mark.usefixtures("three")
def test_also_not_after_a_restart(producers: Producers) -> None:
    for _ in range(5):
        stale = open_anew(producers, P)
    for i in range(3):
        open_anew(producers, i, 0)
    assert open_anew(Producers.restore(producers.snapshot()), P, 0) > stale


# Made anew from the log


def test_a_log_whose_beginning_is_gone_tells_where_its_producers_stand(
    producers: Producers,
) -> None:
    producers.appended(P, 5, 30, 3, 100, 7)
    producers.opened(Q, 2, 50)
    assert producers.check(P, 5, 33, 1) is NEW
    assert producers.check(P, 5, 30, 3) == Original(100, 7)
    assert producers.check(P, 5, 0, 1) == Gap(0, 1, 33)
    assert producers.check(Q, 2, 50, 1) is NEW


def test_a_log_that_lost_its_middle_is_believed(producers: Producers) -> None:
    producers.appended(Q, 5, 0, 3, 100, 7)
    producers.opened(Q, 6, 50)
    assert producers.check(Q, 6, 50, 1) is NEW
    assert producers.check(Q, 6, 0, 3) == Gap(0, 3, 50)
    producers.appended(P, 5, 0, 3, 100, 7)
    producers.appended(P, 5, 10, 3, 110, 7)
    assert producers.check(P, 5, 13, 1) is NEW
    assert producers.check(P, 5, 10, 3) == Original(110, 7)
    assert producers.check(P, 5, 0, 3) == Gap(0, 3, 13)


# Snapshots


@pytest.fixture
def full(producers: Producers) -> Producers:
    """A table with something of everything."""
    for producer_id in (P, Q, (1 << 64) - 1):
        epoch = open_anew(producers, producer_id)
        for i in range(5):
            producers.appended(producer_id, epoch, 2 * i, 2, 100 + 2 * i, NOW_NS)
    producers.dedup_ids.add("order-7", 100, NOW_NS)
    producers.derivations.add(1, 5, 0, 101, NOW_NS)
    producers.derivations.add(1, 7, 1, 102, NOW_NS)
    return producers


def test_what_is_restored_knows_the_same(full: Producers) -> None:
    restored = Producers.restore(full.snapshot())
    assert restored.snapshot() == full.snapshot()
    assert len(restored) == 3
    assert restored.check(P, NOW_S, 4, 2) == Original(104, NOW_NS)
    assert restored.check((1 << 64) - 1, NOW_S, 10, 1) is NEW
    assert restored.dedup_ids.seen("order-7", NOW_NS) == Original(100, NOW_NS)
    assert restored.derivations.seen(1, 7, 1) == Original(102, NOW_NS)
    assert restored.derivations.seen(1, 5, 1) is None


def test_an_empty_table_can_be_restored(producers: Producers) -> None:
    assert len(Producers.restore(producers.snapshot())) == 0


def test_the_window_of_dedup_ids_is_as_told_and_not_as_before(full: Producers) -> None:
    restored = Producers.restore(full.snapshot(), dedup_window_s=10)
    assert restored.dedup_ids.seen("order-7", NOW_NS + 10 * NS_PER_S) is None


def test_a_snapshot_is_a_copy(full: Producers) -> None:
    snapshot = full.snapshot()
    full.appended(P, NOW_S, 10, 1, 200, NOW_NS)
    assert Producers.restore(snapshot).check(P, NOW_S, 10, 1) is NEW


def test_a_restored_table_is_as_bounded_as_any(
    full: Producers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version with lower limits reads what one with higher limits wrote."""
    full.dedup_ids.add("order-8", 101, NOW_NS)
    snapshot = full.snapshot()
    monkeypatch.setattr(limits, "PRODUCERS_MAX", 2)
    monkeypatch.setattr(limits, "DEDUP_IDS_MAX", 1)
    restored = Producers.restore(snapshot)
    assert len(restored) == 2
    assert restored.forgotten == {"producer": 1, "dedup id": 1}
    assert restored.check(P, NOW_S, 0, 2) == Unknown(P, NOW_S)
    assert restored.dedup_ids.seen("order-7", NOW_NS) is None


def test_every_flipped_bit_is_noticed(full: Producers) -> None:
    snapshot = full.snapshot()
    for bit in range(8 * len(snapshot)):
        damaged = bytearray(snapshot)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SnapshotDamaged):
            Producers.restore(bytes(damaged))


def test_every_torn_end_is_noticed(full: Producers) -> None:
    snapshot = full.snapshot()
    for size in range(len(snapshot)):
        with pytest.raises(SnapshotDamaged):
            Producers.restore(snapshot[:size])
    with pytest.raises(SnapshotDamaged):
        Producers.restore(snapshot + b"\0")


def sealed(body: bytes) -> bytes:
    """A snapshot whose checksum is right, whatever its body."""
    length = struct.pack("<Q", len(body))
    return struct.pack("<4sII", b"MPRD", 1, zlib.crc32(length + body)) + length + body


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: b"", "a snapshot of 0 bytes is shorter than its header of 20"),
        (lambda s: b"XXXX" + s[4:], "it begins with b'XXXX' instead of b'MPRD'"),
        (lambda s: s[:4] + b"\2\0\0\0" + s[8:], "version 2, where 1 is known"),
        (lambda s: s + b"\0", "a body of 7 bytes, where the header says 6"),
        (
            lambda s: s[:8] + b"\0\0\0\0" + s[12:],
            "checksum [0-9a-f]{8}, where the header says 00000000",
        ),
        (lambda s: sealed(b"\xc1"), "its body is none: MessagePack data is malformed.*"),
        (lambda s: sealed(b"\x95\0\xdd\xff\xff\xff\xff"), "its body is none: .*"),
        (
            lambda s: sealed(msgspec.msgpack.encode([0, [[P, 1, 0, b"x" * 29]], [], [], []])),
            "29 bytes of batches, where each has 28",
        ),
    ],
)
def test_damage_is_named(producers: Producers, change: Callable[[bytes], bytes], text: str) -> None:
    with pytest.raises(SnapshotDamaged, match=f"^{text}$"):
        Producers.restore(change(producers.snapshot()))


# Against a model


class Life:
    """One producer from its first opening until it is forgotten."""

    def __init__(self, epoch: int, next_seq: int) -> None:
        self.epoch = epoch
        self.next_seq = next_seq
        self.batches: dict[tuple[int, int], Original] = {}


class Batch(msgspec.Struct, frozen=True):
    """An append that was accepted, once."""

    life: Life
    producer_id: int
    epoch: int
    seq: int
    count: int


PRODUCERS, BATCHES, IDS = 3, 4, 5


class Partition(RuleBasedStateMachine):
    """A log that keeps every event, and producers that do all they should not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Producers(dedup_window_s=50e-9)
        self.events: list[tuple[str, tuple[Any, ...]]] = []
        self.saved = (0, self.table.snapshot())
        self.lives: dict[int, Life] = {}
        """Of those that are known, the one idle longest first."""
        self.accepted: list[Batch] = []
        self.given: set[tuple[int, int]] = set()
        self.ids: dict[str, Original] = {}
        self.derived: dict[tuple[int, int, int], Original] = {}
        self.offset = 0
        self.now_ns = 0

    def note(self, event: str, *arguments: Any) -> None:
        self.events.append((event, arguments))
        self.apply(self.table, event, arguments)

    def apply(self, table: Producers, event: str, arguments: tuple[Any, ...]) -> None:
        call: Callable[..., None]
        match event:
            case "id":
                call = table.dedup_ids.add
            case "derived":
                call = table.derivations.add
            case _:
                call = getattr(table, event)
        call(*arguments)

    def wrote(self, producer_id: int, life: Life) -> None:
        self.lives.pop(producer_id, None)
        self.lives[producer_id] = life
        while len(self.lives) > PRODUCERS:
            del self.lives[next(iter(self.lives))]

    @rule(producer_id=st.integers(0, 4))
    def open(self, producer_id: int) -> None:
        opened = self.table.open(producer_id, self.now_ns)
        life = self.lives.get(producer_id)
        if life is None:
            life = Life(opened.epoch, 0)
        else:
            assert opened.epoch > life.epoch
        assert opened.next_seq == life.next_seq
        assert (producer_id, opened.epoch) not in self.given, "an epoch is given once"
        self.given.add((producer_id, opened.epoch))
        life.epoch = opened.epoch
        self.note("opened", producer_id, opened.epoch, opened.next_seq)
        self.wrote(producer_id, life)

    @rule(producer_id=st.integers(0, 4), count=st.integers(1, 3))
    def append(self, producer_id: int, count: int) -> None:
        life = self.lives.get(producer_id)
        if life is None:
            assert isinstance(self.table.check(producer_id, 1, 0, count), Unknown)
            return
        assert self.table.check(producer_id, life.epoch, life.next_seq, count) is NEW
        self.note(
            "appended", producer_id, life.epoch, life.next_seq, count, self.offset, self.now_ns
        )
        batch = Batch(life, producer_id, life.epoch, life.next_seq, count)
        self.accepted.append(batch)
        life.batches[life.next_seq, count] = Original(self.offset, self.now_ns)
        life.next_seq += count
        self.offset += count
        self.wrote(producer_id, life)

    @rule(data=st.data())
    def deliver_an_earlier_batch_again(self, data: st.DataObject) -> None:
        if not self.accepted:
            return
        batch = data.draw(st.sampled_from(self.accepted))
        life = self.lives.get(batch.producer_id)
        verdict = self.table.check(batch.producer_id, batch.epoch, batch.seq, batch.count)
        if life is None:
            assert verdict == Unknown(batch.producer_id, batch.epoch)
        elif batch.epoch < life.epoch:
            assert verdict == Fenced(batch.epoch, life.epoch)
        else:
            assert batch.life is life, "epochs are never those of an earlier life"
            self.check_known(life, batch.producer_id, batch.seq, batch.count)

    @rule(producer_id=st.integers(0, 4), seq=st.integers(0, 30), count=st.integers(1, 4))
    def say_anything(self, producer_id: int, seq: int, count: int) -> None:
        if (life := self.lives.get(producer_id)) is not None:
            self.check_known(life, producer_id, seq, count)

    def check_known(self, life: Life, producer_id: int, seq: int, count: int) -> None:
        verdict = self.table.check(producer_id, life.epoch, seq, count)
        remembered = list(life.batches)[-BATCHES:]
        having = [(s, c) for s, c in remembered if s <= seq and seq + count <= s + c]
        if seq == life.next_seq:
            assert verdict is NEW
        elif having:
            original = life.batches[having[0]]
            moved = original.offset + seq - having[0][0]
            assert verdict == Original(moved, original.time_ns)
        else:
            assert verdict == Gap(seq, count, life.next_seq)

    @rule(name=st.sampled_from("abcd"), passed_ns=st.integers(0, 30))
    def use_an_id(self, name: str, passed_ns: int) -> None:
        self.now_ns += passed_ns
        known = self.ids.get(name)
        if known is not None and self.now_ns - known.time_ns >= 50:
            known = None
        assert self.table.dedup_ids.seen(name, self.now_ns) == known
        if known is None:
            self.note("id", name, self.offset, self.now_ns)
            self.ids[name] = Original(self.offset, self.now_ns)
            self.offset += 1

    @rule(source=st.integers(0, 1), offset=st.integers(0, 9), output=st.integers(0, 1))
    def derive(self, source: int, offset: int, output: int) -> None:
        key = source, offset, output
        seen = self.table.derivations.seen(*key)
        assert seen == self.derived.get(key)
        if seen is None:
            self.note("derived", *key, self.offset, self.now_ns)
            self.derived[key] = Original(self.offset, self.now_ns)
            self.offset += 1

    @rule()
    def save(self) -> None:
        self.saved = len(self.events), self.table.snapshot()

    @rule()
    def restart(self) -> None:
        """The last snapshot and what came after it, and the whole log: the same table."""
        at, snapshot = self.saved
        restored = Producers.restore(snapshot, dedup_window_s=50e-9)
        for event, arguments in self.events[at:]:
            self.apply(restored, event, arguments)
        anew = Producers(dedup_window_s=50e-9)
        for event, arguments in self.events:
            self.apply(anew, event, arguments)
        assert restored.snapshot() == anew.snapshot() == self.table.snapshot()
        self.table = restored

    @invariant()
    def bounded(self) -> None:
        assert len(self.table) == len(self.lives) <= PRODUCERS


@pytest.mark.slow
def test_nothing_is_appended_twice_whatever_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PRODUCERS_MAX", PRODUCERS)
    monkeypatch.setattr(limits, "PRODUCER_BATCHES", BATCHES)
    monkeypatch.setattr(limits, "DEDUP_IDS_MAX", IDS)
    run_state_machine_as_test(Partition)
