"""The judge of histories: silent about what a correct stream can show, right about each fault."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.history import Finding, judge
from tests.support.history_events import (
    Ack,
    Acked,
    AnyEvent,
    Appended,
    Buried,
    Committed,
    Delivered,
    Drained,
    Failed,
    Invoked,
    MalformedHistory,
    Read,
    Recorder,
    Replayed,
    Trimmed,
    Unknown,
    load,
)

KEYED = "by key"
PLAIN = "any order"


class Run:
    """A stream that does everything right, whatever happens to those around it."""

    def __init__(self, seed: int, appends: int = 24) -> None:
        self.random = random.Random(seed)
        self.now = 0
        self.events: list[AnyEvent] = []
        self.logs: dict[str, list[Invoked]] = {"p": [], "q": []}
        self.runs = 0
        for i in range(appends):
            self.append(i)
        for partition in self.logs:
            for _ in range(3):
                self.read(partition)
            self.consume(PLAIN, partition, by_key=False)
            self.consume(KEYED, partition, by_key=True)
            self.replay(partition)

    def later(self) -> int:
        self.now += 1000
        return self.now

    def new(self, what: str) -> str:
        self.runs += 1
        return f"{what}-{self.runs}"

    def append(self, i: int) -> None:
        producer = self.random.choice(("ann", "bob", "cid"))
        key = self.random.choice((None, "red", "blue"))
        invoked = Invoked(
            at=self.later(), id=f"m{i}", producer=producer, seq=i, digest=f"d{i}", key=key
        )
        self.events.append(invoked)
        fate = self.random.choice(("ok", "ok", "ok", "failed", "unknown", "silent", "absent"))
        if fate == "failed":
            self.events.append(Failed(at=self.later(), id=invoked.id))
            return
        partition = self.random.choice(list(self.logs))
        if fate != "absent":
            self.logs[partition].append(invoked)
        if fate == "ok":
            offset = len(self.logs[partition]) - 1
            self.events.append(
                Appended(at=self.later(), id=invoked.id, partition=partition, offset=offset)
            )
        elif fate == "unknown":
            self.events.append(Unknown(at=self.later(), id=invoked.id))

    def read(self, partition: str) -> None:
        log, reader = self.logs[partition], self.new("reader")
        start, end = sorted(self.random.choices(range(len(log) + 1), k=2))
        for offset in range(start, end):
            self.read_one(reader, partition, offset)

    def read_one(self, reader: str, partition: str, offset: int) -> None:
        record = self.logs[partition][offset]
        self.events.append(
            Read(
                at=self.later(),
                reader=reader,
                partition=partition,
                offset=offset,
                id=record.id,
                digest=record.digest,
            )
        )

    def replay(self, partition: str) -> None:
        since, reader = self.later(), self.new("replay")
        for offset in range(len(self.logs[partition])):
            self.read_one(reader, partition, offset)
        self.events.append(
            Replayed(at=self.later(), reader=reader, partition=partition, since=since)
        )

    def consume(self, group: str, partition: str, *, by_key: bool) -> None:
        """Until all is settled. Members die and others come; each has a lane for each key."""
        log, since = self.logs[partition], self.later()
        members = [self.new("consumer"), self.new("consumer")]
        lanes: defaultdict[str, list[int]] = defaultdict(list)
        for offset, record in enumerate(log):
            lanes[record.key or f"{offset}" if by_key else f"{offset}"].append(offset)
        holders: dict[str, tuple[str, int]] = {}
        """Of each lane who holds how many of its first."""
        deliveries: Counter[int] = Counter()
        unsettled = set(range(len(log)))
        while lanes:
            lane = self.random.choice(list(lanes))
            offsets = lanes[lane]
            member, held = holders.get(lane, (self.random.choice(members), 0))
            step = self.random.choice(("deliver", "deliver", "settle", "settle", "die", "lose"))
            if step == "die":
                members[members.index(member)] = self.new("consumer")
                for other in [o for o, (holder, _) in holders.items() if holder == member]:
                    del holders[other]
            elif step == "deliver" and held < len(offsets):
                offset = offsets[held]
                deliveries[offset] += 1
                self.events.append(
                    Delivered(
                        at=self.later(),
                        consumer=member,
                        group=group,
                        partition=partition,
                        offset=offset,
                        id=log[offset].id,
                        digest=log[offset].digest,
                        deliveries=deliveries[offset],
                    )
                )
                holders[lane] = member, held + 1
            elif step in ("settle", "lose") and held:
                offset = offsets[0]
                told = Ack(
                    at=self.later(),
                    consumer=member,
                    group=group,
                    partition=partition,
                    offset=offset,
                )
                self.events.append(told)
                if step == "lose":  # the sidecar crashed: nobody holds anything any more
                    del holders[lane]
                    continue
                self.events.append(
                    Acked(
                        at=self.later(),
                        consumer=member,
                        group=group,
                        partition=partition,
                        offset=offset,
                    )
                )
                holders[lane] = member, held - 1
                unsettled.discard(offset)
                del offsets[0]
                if not offsets:
                    del lanes[lane]
                self.events.append(
                    Committed(
                        at=self.later(),
                        observer="watch",
                        group=group,
                        partition=partition,
                        offset=min(unsettled, default=len(log)),
                    )
                )
        self.events.append(Drained(at=self.later(), group=group, partition=partition, since=since))

    # What faults need

    def some(self, kind: type[AnyEvent], **fields: object) -> list[AnyEvent]:
        return [
            event
            for event in self.events
            if isinstance(event, kind)
            and all(getattr(event, name) == value for name, value in fields.items())
        ]

    def stray(self, identity: str, digest: str, partition: str, offset: int) -> Delivered:
        """A delivery to a group that nothing else is known of."""
        return Delivered(
            at=self.later(),
            consumer="stray",
            group="stray",
            partition=partition,
            offset=offset,
            id=identity,
            digest=digest,
            deliveries=1,
        )


# Faults. Each does just one to a correct run, and returns False if there is nothing to do it to.


def lose(run: Run) -> bool:
    receipts = run.some(Appended)
    if not receipts:
        return False
    receipt = run.random.choice(receipts)
    assert isinstance(receipt, Appended)
    [end] = run.some(Replayed, partition=receipt.partition)
    assert isinstance(end, Replayed)
    [read] = run.some(Read, reader=end.reader, id=receipt.id)
    run.events.remove(read)
    return True


def hide(run: Run) -> bool:
    receipts = run.some(Appended)
    if not receipts:
        return False
    receipt = run.random.choice(receipts)
    assert isinstance(receipt, Appended)
    place = {"group": PLAIN, "partition": receipt.partition, "offset": receipt.offset}
    for kind in (Delivered, Ack, Acked):
        for event in run.some(kind, **place):
            run.events.remove(event)
    return True


def double(run: Run) -> bool:
    receipts = run.some(Appended)
    if not receipts:
        return False
    receipt = run.random.choice(receipts)
    assert isinstance(receipt, Appended)
    [invoked] = run.some(Invoked, id=receipt.id)
    assert isinstance(invoked, Invoked)
    partition = run.random.choice(list(run.logs))
    end = len(run.logs[partition])
    run.events.append(run.stray(invoked.id, invoked.digest, partition, end))
    return True


def reuse(run: Run) -> bool:
    partition = run.random.choice(list(run.logs))
    if not run.logs[partition]:
        return False
    offset = run.random.randrange(len(run.logs[partition]))
    run.events.append(Invoked(at=run.later(), id="other", producer="dan", seq=0, digest="d"))
    run.events.append(run.stray("other", "d", partition, offset))
    return True


def swap(run: Run) -> bool:
    """Two records of one producer change places, for all to see; their keys stay behind."""
    partition = run.random.choice(list(run.logs))
    log = run.logs[partition]
    producer = run.random.choice(("ann", "bob", "cid"))
    mine = [record for record in log if record.producer == producer]
    if len(mine) < 2:
        return False
    at = run.random.randrange(len(mine) - 1)
    one, two = mine[at], mine[at + 1]
    swapped = {one.id: two, two.id: one}
    offsets = {record.id: offset for offset, record in enumerate(log)}
    for i, event in enumerate(run.events):
        match event:
            case Invoked(id=identity) if identity in swapped:
                run.events[i] = replace(event, key=swapped[identity].key)
            case Appended(id=identity) if identity in swapped:
                run.events[i] = replace(event, offset=offsets[swapped[identity].id])
            case Delivered(id=identity) | Read(id=identity) if identity in swapped:
                other = swapped[identity]
                run.events[i] = replace(event, id=other.id, digest=other.digest)
    return True


def overtake(run: Run) -> bool:
    partition = run.random.choice(list(run.logs))
    red = [o for o, record in enumerate(run.logs[partition]) if record.key == "red"]
    if len(red) < 2:
        return False
    offset = run.random.choice(red[1:])
    record = run.logs[partition][offset]
    early = run.stray(record.id, record.digest, partition, offset)
    run.events.append(replace(early, at=0, group=KEYED))
    return True


def skip(run: Run) -> bool:
    reads = Counter(read.reader for read in run.some(Read) if isinstance(read, Read))
    long = [r for r, count in reads.items() if count > 2 and r.startswith("reader")]
    if not long:
        return False
    middle = run.some(Read, reader=run.random.choice(long))[1:-1]
    run.events.remove(run.random.choice(middle))
    return True


def read_again(run: Run) -> bool:
    reads = run.some(Read)
    if not reads:
        return False
    run.events.append(replace(run.random.choice(reads), at=run.later()))
    return True


def take_back(run: Run) -> bool:
    commits = [event for event in run.some(Committed) if isinstance(event, Committed)]
    commits = [event for event in commits if event.offset]
    if not commits:
        return False
    last = {(event.group, event.partition): event for event in commits}
    event = run.random.choice(list(last.values()))
    back = run.random.randrange(event.offset)
    run.events.append(replace(event, at=run.later(), offset=back))
    return True


def deliver_again(run: Run) -> bool:
    deliveries = run.some(Delivered, group=PLAIN)
    if not deliveries:
        return False
    run.events.append(replace(run.random.choice(deliveries), at=run.later()))
    return True


def invent(run: Run) -> bool:
    partition = run.random.choice(list(run.logs))
    run.events.append(run.stray("nobody's", "d", partition, len(run.logs[partition])))
    return True


def resurrect(run: Run) -> bool:
    """An append that failed is there."""
    failures = run.some(Failed)
    if not failures:
        return False
    failure = run.random.choice(failures)
    assert isinstance(failure, Failed)
    [invoked] = run.some(Invoked, id=failure.id)
    assert isinstance(invoked, Invoked)
    run.events[run.events.index(invoked)] = invoked = replace(invoked, producer="dan")
    partition = run.random.choice(list(run.logs))
    end = len(run.logs[partition])
    run.events.append(run.stray(invoked.id, invoked.digest, partition, end))
    return True


def flip(run: Run) -> bool:
    seen = [*run.some(Delivered), *run.some(Read)]
    if not seen:
        return False
    one = run.random.choice(seen)
    run.events[run.events.index(one)] = replace(one, digest="flipped")
    return True


FAULTS: list[tuple[Callable[[Run], bool], str]] = [
    (lose, "lost"),
    (hide, "unseen"),
    (double, "duplicate"),
    (reuse, "offset reused"),
    (swap, "reordered"),
    (overtake, "reordered"),
    (skip, "skipped"),
    (read_again, "non-monotonic"),
    (take_back, "non-monotonic"),
    (deliver_again, "acked again"),
    (invent, "phantom"),
    (resurrect, "phantom"),
    (flip, "changed"),
]
seeds = st.integers(0, 1 << 32)


def findings_of(run: Run) -> list[Finding]:
    """Whatever the order in which the files were read."""
    events = run.events.copy()
    run.random.shuffle(events)
    return judge(events, key_ordered=[KEYED]).findings


@pytest.mark.slow
@given(seeds)
def test_a_correct_run_has_no_findings(seed: int) -> None:
    assert findings_of(Run(seed)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "kind"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
@given(seed=seeds)
def test_one_fault_is_one_finding(fault: Callable[[Run], bool], kind: str, seed: int) -> None:
    run = Run(seed)
    if not fault(run):
        return
    findings = findings_of(run)
    assert [finding.kind for finding in findings] == [kind], findings
    assert findings[0].evidence
    assert set(findings[0].evidence) <= set(run.events)


@pytest.mark.parametrize(("fault", "kind"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_most_runs_have_something_to_do_a_fault_to(fault: Callable[[Run], bool], kind: str) -> None:
    assert sum(fault(Run(seed)) for seed in range(20)) >= 10


# By hand: the texts, and what looks like a fault and is none


def invoked(identity: str, at: int = 0, seq: int = 0, key: str | None = None) -> Invoked:
    return Invoked(at=at, id=identity, producer="ann", seq=seq, digest=f"d{identity}", key=key)


def appended(identity: str, offset: int, at: int = 1) -> Appended:
    return Appended(at=at, id=identity, partition="p", offset=offset)


def read(identity: str, offset: int, at: int = 5, reader: str = "r") -> Read:
    return Read(
        at=at, reader=reader, partition="p", offset=offset, id=identity, digest=f"d{identity}"
    )


def delivered(
    identity: str, offset: int, at: int = 5, consumer: str = "c", group: str = "g"
) -> Delivered:
    return Delivered(
        at=at,
        consumer=consumer,
        group=group,
        partition="p",
        offset=offset,
        id=identity,
        digest=f"d{identity}",
        deliveries=1,
    )


def ack(offset: int, at: int = 6, consumer: str = "c") -> Ack:
    return Ack(at=at, consumer=consumer, group="g", partition="p", offset=offset)


def acked(offset: int, at: int = 7, consumer: str = "c") -> Acked:
    return Acked(at=at, consumer=consumer, group="g", partition="p", offset=offset)


def replayed(reader: str = "r", at: int = 9, since: int = 4, start: int = 0) -> Replayed:
    return Replayed(at=at, reader=reader, partition="p", since=since, start=start)


def drained(at: int = 9, since: int = 4, start: int = 0) -> Drained:
    return Drained(at=at, group="g", partition="p", since=since, start=start)


A, B = invoked("a"), invoked("b", seq=1)
KA, KB = invoked("a", key="k"), invoked("b", seq=1, key="k")


@pytest.mark.parametrize(
    ("events", "text"),
    [
        (
            [A, appended("a", 0), replayed()],
            "lost: a was acknowledged at p/0, and the replay by r lacks it",
        ),
        (
            [A, appended("a", 0), drained()],
            "unseen: a was acknowledged at p/0, and g never got it",
        ),
        ([A, appended("a", 0), read("a", 7)], "duplicate: a is at p/0, and at p/7"),
        ([A, B, appended("a", 0), read("b", 0)], "offset reused: p/0 has a, and b"),
        (
            [A, B, appended("a", 1), appended("b", 0)],
            "reordered: ann appended a as its number 0 and b as 1, which are at p/1 and 0",
        ),
        ([A, B, read("a", 0), read("b", 3, at=6)], "skipped: r read p/3 after 0, and not 1"),
        ([A, B, read("b", 3), read("a", 2, at=6)], "non-monotonic: r read p/2 after 3"),
        ([A, read("a", 2), read("a", 2, at=6)], "non-monotonic: r read p/2 after 2"),
        (
            [
                Committed(at=1, observer="o", group="g", partition="p", offset=5),
                Committed(at=2, observer="o", group="g", partition="p", offset=4),
            ],
            "non-monotonic: g had p settled below 5, and then below 4",
        ),
        (
            [A, acked(0), delivered("a", 0, at=500_007, consumer="d")],
            "acked again: d got p/0 0.000500 s after c had settled it for g",
        ),
        ([read("a", 0)], "phantom: a at p/0, which nobody appended"),
        ([appended("a", 0)], "phantom: a at p/0, which nobody appended"),
        (
            [A, Failed(at=1, id="a"), read("a", 0)],
            "phantom: a is at p/0, and its append failed",
        ),
        ([replace(A, digest="x"), read("a", 0)], "changed: a at p/0 is da, and was x"),
        (
            [KA, KB, appended("a", 0), appended("b", 4), delivered("b", 4)],
            "reordered: c got p/4 before 0, which has the same key 'k' and was not settled",
        ),
    ],
)
def test_each_finding_says_what_and_where(events: list[AnyEvent], text: str) -> None:
    [finding] = judge(events, key_ordered=["g"]).findings
    assert str(finding).splitlines()[0] == text
    assert len(str(finding).splitlines()) == 1 + len(finding.evidence)


IN_LOG = [KA, KB, appended("a", 0), appended("b", 1)]


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([A, Unknown(at=1, id="a"), replayed()], id="unknown and not there"),
        pytest.param([A, Unknown(at=1, id="a"), read("a", 0)], id="unknown and there"),
        pytest.param([A, read("a", 0)], id="no outcome and there"),
        pytest.param([A, appended("a", 0, at=4), replayed()], id="acked as the replay began"),
        pytest.param([A, appended("a", 0, at=4), drained()], id="acked as the draining began"),
        pytest.param(
            [A, appended("a", 0), replayed(start=1), drained(start=1)],
            id="before the beginning",
        ),
        pytest.param(
            [A, appended("a", 0), replayed("early", since=2), read("a", 0), replayed()],
            id="only the last replay counts",
        ),
        pytest.param(
            [
                A,
                appended("a", 0),
                drained(),
                Trimmed(at=8, receiver="g", partition="p", first=0, last=0),
            ],
            id="the group was told that it is gone",
        ),
        pytest.param(
            [
                A,
                B,
                read("a", 0),
                Trimmed(at=5, receiver="r", partition="p", first=1, last=3),
                read("b", 4, at=6),
            ],
            id="the reader was told that it is gone",
        ),
        pytest.param(
            [
                A,
                Failed(at=1, id="a"),
                replace(A, at=2, seq=7),
                B,
                appended("b", 0),
                appended("a", 1, at=3),
            ],
            id="failed, and called again",
        ),
        pytest.param(
            [A, replace(A, at=2), Failed(at=3, id="a"), read("a", 0)],
            id="of two calls one failed",
        ),
        pytest.param([A, appended("a", 0), appended("a", 0, at=2)], id="a repeat's receipt"),
        pytest.param(
            [A, replace(A, at=9, seq=7), B, appended("b", 0), appended("a", 1)],
            id="called again after another",
        ),
        pytest.param([A, read("a", 0), read("a", 0, reader="s")], id="two readers"),
        pytest.param(
            [
                Committed(at=1, observer="o", group="g", partition="p", offset=5),
                Committed(at=2, observer="slow", group="g", partition="p", offset=4),
            ],
            id="two observers",
        ),
        pytest.param([A, ack(0), delivered("a", 0, at=9)], id="an ack that was not confirmed"),
        pytest.param(
            [A, acked(0), delivered("a", 0, at=9, group="other")], id="acked by another group"
        ),
        pytest.param(
            [*IN_LOG, delivered("a", 0), ack(0), delivered("b", 1, at=7, consumer="d")],
            id="key: settled by another",
        ),
        pytest.param(
            [*IN_LOG, delivered("a", 0), delivered("b", 1, at=6)], id="key: both in flight with one"
        ),
        pytest.param(
            [*IN_LOG, delivered("a", 0), delivered("b", 1, at=6), delivered("a", 0, at=7)],
            id="key: delivered again",
        ),
        pytest.param(
            [*IN_LOG, Buried(at=9, group="g", partition="p", offset=0), delivered("b", 1)],
            id="key: among the dead letters",
        ),
    ],
)
def test_what_a_correct_stream_can_show_is_no_finding(events: list[AnyEvent]) -> None:
    assert judge(events, key_ordered=["g"]).findings == []


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(
            [*IN_LOG, delivered("a", 0), delivered("b", 1, at=6, consumer="d")],
            id="in flight with two",
        ),
        pytest.param([*IN_LOG, delivered("b", 1), ack(0)], id="settled afterwards"),
        pytest.param(
            [*IN_LOG, replace(ack(0, at=4), group="other"), delivered("b", 1)],
            id="settled for another group",
        ),
        pytest.param(
            [
                *IN_LOG,
                invoked("e", seq=2, key="k"),
                appended("e", 2),
                delivered("a", 0),
                delivered("e", 2, at=6),
            ],
            id="one left out",
        ),
    ],
)
def test_key_order_is_looked_at_in_the_groups_named(events: list[AnyEvent]) -> None:
    assert [f.kind for f in judge(events, key_ordered=["g"]).findings] == ["reordered"]
    assert judge(events, key_ordered=["a third"]).findings == []


def test_what_was_on_its_way_when_another_acked_is_not_delivered_again() -> None:
    events: list[AnyEvent] = [A, acked(0, at=7), delivered("a", 0, at=1_000_000_007)]
    assert judge(events, on_the_way_s=1.0).findings == []
    assert [f.kind for f in judge(events, on_the_way_s=0.9).findings] == ["acked again"]


def test_a_fault_is_told_once_however_often_it_is_seen() -> None:
    events: list[AnyEvent] = [A, appended("a", 0)]
    for at in range(10, 20):
        events.append(replace(read("b", 0, reader=f"{at}"), at=at))
    assert [f.kind for f in judge(events).findings] == ["phantom", "offset reused"]


def test_a_record_delivered_again_and_again_after_its_ack_is_told_once() -> None:
    events: list[AnyEvent] = [A, acked(0), delivered("a", 0, at=8), delivered("a", 0, at=9)]
    assert [f.kind for f in judge(events).findings] == ["acked again"]


def test_of_a_record_that_is_there_twice_no_order_is_expected() -> None:
    events: list[AnyEvent] = [A, B, read("a", 2), appended("b", 1), read("a", 0, reader="s")]
    assert [f.kind for f in judge(events).findings] == ["duplicate"]


def test_an_offset_that_cannot_be_is_judged_all_the_same() -> None:
    events: list[AnyEvent] = [A, B, read("a", 0), read("b", 1 << 62, at=6)]
    assert [f.kind for f in judge(events).findings] == ["skipped"]


def test_what_was_judged_is_counted() -> None:
    judged = judge([A, appended("a", 0), read("a", 0), replayed(), drained()]).judged
    assert judged["appended"] == judged["read"] == 1
    assert judged["looked for in a replay"] == judged["looked for in a group"] == 1
    assert judge([A, appended("a", 0)]).judged["looked for in a replay"] == 0


# Files


def test_what_is_recorded_is_loaded(tmp_path: Path) -> None:
    run = Run(1)
    half = len(run.events) // 2
    with Recorder(tmp_path / "one.jsonl") as one, Recorder(tmp_path / "two.jsonl") as two:
        one.note(*run.events[:half])
        two.note(*run.events[half:])
    assert load(tmp_path) == run.events


def test_an_event_is_in_the_file_once_it_was_noted(tmp_path: Path) -> None:
    with Recorder(tmp_path / "one.jsonl") as recorder:
        recorder.note(A)
        assert load(tmp_path) == [A]


def test_an_event_has_the_time_at_which_it_was_made() -> None:
    first, second = Failed(id="a"), Failed(id="a")
    assert 0 < first.at <= second.at


def test_wherever_the_last_line_is_torn_the_rest_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    with Recorder(path) as recorder:
        recorder.note(A, B)
    whole = path.read_bytes()
    second_at = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert load(tmp_path) == [A, B][: (size >= second_at) + (size == len(whole))]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"", "Input data was truncated"),
        (b"{", "Input data was truncated"),
        (b'{"event":"failed","at":1}', "Object missing required field `id`"),
        (b'{"event":"failed","at":1,"id":"a","why":1}', "Object contains unknown field `why`"),
        (b'{"event":"read","at":1,"id":7}', "Expected `str`, got `int`.*"),
        (b'{"event":"ended","at":1}', "Invalid value 'ended'.*"),
        (b'{"event":"failed","id":"a"}{"event":"failed","id":"a"}', "JSON is malformed.*"),
        (b"\xff", "JSON is malformed.*"),
    ],
)
def test_anything_else_malformed_is_an_error(tmp_path: Path, line: bytes, text: str) -> None:
    with Recorder(tmp_path / "one.jsonl") as recorder:
        recorder.note(A)
    path = tmp_path / "one.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(MalformedHistory, match=rf"^one\.jsonl, line 2: {text}"):
        load(tmp_path)


def test_no_run_writes_on_where_another_was_killed(tmp_path: Path) -> None:
    Recorder(tmp_path / "one.jsonl").close()
    with pytest.raises(FileExistsError):
        Recorder(tmp_path / "one.jsonl")
