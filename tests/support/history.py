"""Whether what the processes of a run saw can be what a log without faults showed them.

Producers, consumers and readers that are killed at any moment write down what they do
(`tests.support.history_events`). `judge` holds that against each other and reports what a correct
stream never shows, each finding with the events that prove it:

============== ===================================================================================
lost           an acknowledged append that the last full replay of its partition lacks
unseen         an acknowledged append that a group never got, though it was drained
duplicate      one append at two places
offset reused  two appends at one place
reordered      a producer's records against its own order within a partition; in groups told to be
               ordered by key, a record delivered to a consumer before an earlier one of its key
skipped        an offset left out in the middle of what one reader read
non-monotonic  a reader, or a committed position as one observer saw it, that did not go on
acked again    a record delivered after its acknowledgement was confirmed
phantom        a record that nobody appended, or whose append failed
changed        a record that differs from what was appended
============== ===================================================================================

An append without an outcome may be there or not. What is not written down cannot be judged:
`Judgement.judged` counts what was, for a test to look at.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from math import inf
from operator import attrgetter
from typing import Literal, TypeVar

import msgspec

from tests.support.history_events import (
    Ack,
    Acked,
    AnyEvent,
    Appended,
    Buried,
    Committed,
    Delivered,
    Drained,
    Event,
    Failed,
    Invoked,
    Read,
    Replayed,
    Sighting,
    Trimmed,
)

FindingKind = Literal[
    "lost",
    "unseen",
    "duplicate",
    "offset reused",
    "reordered",
    "skipped",
    "non-monotonic",
    "acked again",
    "phantom",
    "changed",
]
Place = tuple[str, int]
"""Partition and offset."""
E = TypeVar("E", bound=Event)


class Finding(msgspec.Struct, frozen=True):
    """Something that a correct stream never shows."""

    kind: FindingKind
    text: str
    evidence: tuple[AnyEvent, ...]

    def __str__(self) -> str:
        return "\n    ".join([f"{self.kind}: {self.text}", *map(repr, self.evidence)])


class Judgement(msgspec.Struct, frozen=True):
    """`judged` counts what was looked at: a run in which nothing happened has no findings."""

    findings: list[Finding]
    judged: Counter[str]

    def __str__(self) -> str:
        return "\n".join([f"judged: {dict(self.judged)}", *map(str, self.findings)])


def judge(
    events: Iterable[AnyEvent],
    *,
    key_ordered: Collection[str] = (),
    on_the_way_s: float = 0.0,
) -> Judgement:
    """Hold the events against each other, in whatever order they come.

    `key_ordered` names the groups with ``order="key"``. `on_the_way_s` is how long a delivery may
    have been on its way to a consumer: what was sent before another's late ack, and arrives after
    it, was not delivered again.
    """
    court = _Court(events)
    court.hear_every_sighting()
    court.hear_producers()
    court.hear_replays()
    court.hear_groups()
    court.hear_readers()
    court.hear_commits()
    court.hear_acks(round(on_the_way_s * 1e9))
    for group in key_ordered:
        court.hear_keys(group)
    return Judgement(court.findings, court.judged)


class _Court:
    """The events, each kind by itself in the order of time, and what was found so far."""

    def __init__(self, events: Iterable[AnyEvent]) -> None:
        self.findings: list[Finding] = []
        self._events: defaultdict[type[Event], list[Event]] = defaultdict(list)
        for event in events:
            self._events[type(event)].append(event)
        for some in self._events.values():
            some.sort(key=attrgetter("at"))
        self.judged = Counter(
            {kind.__name__.lower(): len(all) for kind, all in self._events.items()}
        )
        self._invoked: dict[str, Invoked] = {}
        """The first call of each append."""
        self._without_order: set[str] = set()
        """Appends that were called more than once, or are at more than one place."""
        for invoked in self._all(Invoked):
            if self._invoked.setdefault(invoked.id, invoked) is not invoked:
                self._without_order.add(invoked.id)
        self._receipts: dict[str, Appended] = {}
        """The first of each append."""
        for appended in self._all(Appended):
            self._receipts.setdefault(appended.id, appended)
        self._place_of: dict[str, Sighting] = {}
        """Of each append who says where it is: its receipt, or who saw it first."""
        self._lost: set[Place] = set()
        self._trimmed: defaultdict[tuple[str, str], list[Trimmed]] = defaultdict(list)
        for trimmed in self._all(Trimmed):
            self._trimmed[trimmed.receiver, trimmed.partition].append(trimmed)

    def _all(self, kind: type[E]) -> list[E]:
        return self._events[kind]  # type: ignore[return-value]

    def _find(self, kind: FindingKind, text: str, *evidence: AnyEvent) -> None:
        self.findings.append(Finding(kind, text, evidence))

    # -- What is in the log ------------------------------------------------------------------

    def hear_every_sighting(self) -> None:
        """Each record is there once, alone, whole, and because somebody appended it."""
        failed = self._failed()
        first_at: dict[Place, Sighting] = {}
        place_of = self._place_of
        told: set[tuple[str, str, Place | None]] = set()
        for seen in self._sightings():
            identity, place = seen.id, (seen.partition, seen.offset)
            invoked = self._invoked.get(identity)
            other = first_at.setdefault(place, seen)
            before = place_of.setdefault(identity, seen)
            at = f"{seen.partition}/{seen.offset}"
            if invoked is None and _is_news(told, "phantom", identity):
                self._find("phantom", f"{identity} at {at}, which nobody appended", seen)
            if identity in failed and invoked and _is_news(told, "phantom", identity):
                text = f"{identity} is at {at}, and its append failed"
                self._find("phantom", text, invoked, failed[identity], seen)
            if other.id != identity and _is_news(told, "reused", identity, place):
                self._find("offset reused", f"{at} has {other.id}, and {identity}", other, seen)
            elsewhere = before.offset != seen.offset or before.partition != seen.partition
            if elsewhere and _is_news(told, "duplicate", identity):
                self._without_order.add(identity)
                text = f"{identity} is at {before.partition}/{before.offset}, and at {at}"
                self._find("duplicate", text, before, seen)
            if isinstance(seen, Appended) or invoked is None or seen.digest == invoked.digest:
                continue
            if _is_news(told, "changed", identity, place):
                text = f"{identity} at {at} is {seen.digest}, and was {invoked.digest}"
                self._find("changed", text, invoked, seen)

    def _sightings(self) -> Iterator[Sighting]:
        yield from self._all(Appended)
        yield from self._all(Delivered)
        yield from self._all(Read)

    def _failed(self) -> dict[str, Failed]:
        """Appends that are certainly not in the log: each call of them failed."""
        failures = Counter(event.id for event in self._all(Failed))
        calls = Counter(event.id for event in self._all(Invoked)) if failures else Counter()
        return {
            event.id: event
            for event in self._all(Failed)
            if failures[event.id] == calls[event.id] and event.id not in self._receipts
        }

    def hear_producers(self) -> None:
        """In a partition, each producer's records are in its order."""
        written: defaultdict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
        for identity, seen in self._place_of.items():
            invoked = self._invoked.get(identity)
            if invoked is not None and identity not in self._without_order:
                records = written[invoked.producer, seen.partition]
                records.append((invoked.seq, seen.offset, identity))
        for (producer, partition), records in written.items():
            records.sort()
            for (seq, offset, one), (next_seq, next_offset, next_one) in pairwise(records):
                if next_offset < offset:
                    text = (
                        f"{producer} appended {one} as its number {seq} and {next_one} as "
                        f"{next_seq}, which are at {partition}/{offset} and {next_offset}"
                    )
                    calls = self._invoked[one], self._invoked[next_one]
                    places = self._place_of[one], self._place_of[next_one]
                    self._find("reordered", text, *calls, *places)

    def hear_replays(self) -> None:
        """What was acknowledged before the last full replay of its partition began is in it."""
        last = {event.partition: event for event in sorted(self._all(Replayed), key=_since)}
        replayed: defaultdict[str, set[str]] = defaultdict(set)
        for read in self._all(Read):
            replay = last.get(read.partition)
            if replay is not None and replay.reader == read.reader:
                replayed[read.partition].add(read.id)
        for receipt in self._receipts.values():
            replay = last.get(receipt.partition)
            if replay is None or not _is_due(receipt, replay):
                continue
            self.judged["looked for in a replay"] += 1
            if receipt.id not in replayed[receipt.partition]:
                self._lost.add((receipt.partition, receipt.offset))
                text = (
                    f"{receipt.id} was acknowledged at {receipt.partition}/{receipt.offset}, "
                    f"and the replay by {replay.reader} lacks it"
                )
                self._find("lost", text, receipt, replay)

    # -- What readers and groups got ---------------------------------------------------------

    def hear_groups(self) -> None:
        """What was acknowledged before a group was drained for the last time, it got."""
        got: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for delivered in self._all(Delivered):
            got[delivered.group, delivered.partition].add(delivered.id)
        last = {(e.group, e.partition): e for e in sorted(self._all(Drained), key=_since)}
        of_partition: defaultdict[str, list[Drained]] = defaultdict(list)
        for drained in last.values():
            of_partition[drained.partition].append(drained)
        for receipt in self._receipts.values():
            partition, offset = receipt.partition, receipt.offset
            for drained in of_partition[partition]:
                if not _is_due(receipt, drained):
                    continue
                self.judged["looked for in a group"] += 1
                seen = receipt.id in got[drained.group, partition]
                if not seen and not self._was_trimmed(drained.group, partition, offset):
                    text = (
                        f"{receipt.id} was acknowledged at {partition}/{offset}, "
                        f"and {drained.group} never got it"
                    )
                    self._find("unseen", text, receipt, drained)

    def _was_trimmed(self, receiver: str, partition: str, offset: int) -> bool:
        told = self._trimmed.get((receiver, partition), ())
        return any(trimmed.first <= offset <= trimmed.last for trimmed in told)

    def hear_readers(self) -> None:
        """Each goes on, and leaves out nothing but what is lost: that is told of already."""
        furthest: dict[tuple[str, str], Read] = {}
        for read in self._all(Read):
            reader, partition, offset = read.reader, read.partition, read.offset
            before = furthest.setdefault((reader, partition), read)
            if before is read:
                continue
            text = f"{reader} read {partition}/{offset} after {before.offset}"
            if offset <= before.offset:
                self._find("non-monotonic", text, before, read)
                continue
            furthest[reader, partition] = read
            for left_out in range(before.offset + 1, offset):
                if (partition, left_out) in self._lost:
                    continue
                if not self._was_trimmed(reader, partition, left_out):
                    self._find("skipped", f"{text}, and not {left_out}", before, read)
                    break

    def hear_commits(self) -> None:
        """What an observer saw of a group's committed position does not go back."""
        furthest: dict[tuple[str, str, str], Committed] = {}
        for event in self._all(Committed):
            key = event.observer, event.group, event.partition
            before = furthest.setdefault(key, event)
            if event.offset >= before.offset:
                furthest[key] = event
            else:
                text = (
                    f"{event.group} had {event.partition} settled below {before.offset}, "
                    f"and then below {event.offset}"
                )
                self._find("non-monotonic", text, before, event)

    def hear_acks(self, on_the_way_ns: int) -> None:
        """What a group was told is settled, it does not deliver again."""
        confirmed: dict[tuple[str, str, int], Acked] = {}
        for event in self._all(Acked):
            confirmed.setdefault((event.group, event.partition, event.offset), event)
        for delivered in self._all(Delivered):
            key = delivered.group, delivered.partition, delivered.offset
            acked = confirmed.get(key)
            if acked is None or delivered.at <= acked.at + on_the_way_ns:
                continue
            del confirmed[key]  # once is enough
            text = (
                f"{delivered.consumer} got {delivered.partition}/{delivered.offset} "
                f"{(delivered.at - acked.at) / 1e9:.6f} s after {acked.consumer} had settled it "
                f"for {delivered.group}"
            )
            self._find("acked again", text, acked, delivered)

    def hear_keys(self, group: str) -> None:
        """A consumer of `group` that gets a record had those of its key before it, or they were
        settled by then: somebody had called ack or reject, or they are among the dead letters.
        A nak is not written down, so whether its delay held back the key is not looked at."""
        offsets_of: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        index_of: dict[Place, tuple[str, int]] = {}
        """Of each place its key, and its index among the offsets of that key."""
        for partition, offset, key in sorted(self._keys()):
            index_of[partition, offset] = key, len(offsets_of[partition, key])
            offsets_of[partition, key].append(offset)
        settled_at: dict[Place, float] = {}
        for ack in self._all(Ack):
            if ack.group == group:
                settled_at.setdefault((ack.partition, ack.offset), ack.at)
        for buried in self._all(Buried):
            if buried.group == group:
                settled_at[buried.partition, buried.offset] = 0
        had: dict[tuple[str, str, str], int] = {}
        """Of each consumer and key the index it was given last."""
        settled: Counter[tuple[str, str]] = Counter()
        """Of each key how many from the first on are settled."""
        for delivered in self._all(Delivered):
            consumer, partition = delivered.consumer, delivered.partition
            if delivered.group != group or (partition, delivered.offset) not in index_of:
                continue
            self.judged["looked at for key order"] += 1
            key, index = index_of[partition, delivered.offset]
            offsets = offsets_of[partition, key]
            first = settled[partition, key]
            while (
                first < index and settled_at.get((partition, offsets[first]), inf) <= delivered.at
            ):
                first += 1
            settled[partition, key] = first
            first = max(first, had.get((consumer, partition, key), -1) + 1)
            had[consumer, partition, key] = index
            for offset in offsets[first:index]:
                if settled_at.get((partition, offset), inf) > delivered.at:
                    text = (
                        f"{consumer} got {partition}/{delivered.offset} before {offset}, "
                        f"which has the same key {key!r} and was not settled"
                    )
                    self._find("reordered", text, delivered)
                    break

    def _keys(self) -> Iterator[tuple[str, int, str]]:
        for identity, seen in self._place_of.items():
            invoked = self._invoked.get(identity)
            if invoked is not None and invoked.key is not None:
                yield seen.partition, seen.offset, invoked.key


def _is_news(
    told: set[tuple[str, str, Place | None]], what: str, identity: str, at: Place | None = None
) -> bool:
    """Whether that has not been told; from now on it has."""
    if (what, identity, at) in told:
        return False
    told.add((what, identity, at))
    return True


def _is_due(receipt: Appended, end: Replayed | Drained) -> bool:
    """Whether what was acknowledged there has to have been read by then."""
    return receipt.at < end.since and receipt.offset >= end.start


def _since(event: Replayed | Drained) -> int:
    return event.since
