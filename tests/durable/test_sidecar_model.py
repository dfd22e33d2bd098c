"""A whole sidecar on a disk that does all it may, against what it said: producers that repeat what
they are not sure of, groups and their dead letters, readers, quotas, retention, idle time.

- What was acknowledged is there, once, where the receipt says, until retention may take it; what
  was refused is not. With a durability that may lose its last records so they go, and no others,
  and whoever had read them is told.
- What was settled is, after a crash if that was synced, after a kill if it was written; nothing is
  settled that nobody settled; and in the end everything is, with nothing left that nobody gets.
- Every question is answered once, in time; what the sidecar tells of itself is what the files say;
  and its logs are sound whenever they are opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from random import Random
from typing import Any, Literal, get_args
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mesh.durable.batch import Batch, Header
from mesh.durable.check import check
from mesh.durable.cursor import Cursor
from mesh.durable.deliveries import AskedOptions, Settlements
from mesh.durable.hosted import Hosted
from mesh.durable.log import Log
from mesh.durable.outcomes import Appended, Opened, Refused
from mesh.durable.protocol import (
    Batches,
    Delivered,
    Fetch,
    Find,
    Inspect,
    Inspected,
    Join,
    Joined,
    Open,
    Query,
    Read,
    Reply,
    Settle,
    Settled,
    read_batch,
)
from mesh.durable.records import Derived, NewRecord, batch_of, columns_of, headers_of, payloads_of
from mesh.durable.retention import Keep, Sealed, trim_to
from mesh.durable.sidecar import DEAD, Sidecar
from mesh.durable.waiting import Order
from mesh.errors import StorageFailed
from mesh.message import StreamStats
from mesh.options import StreamOptions
from mesh.sockets import codec
from tests.support.fake_disk import Content, FakeDisk, Operation, Stopped
from tests.support.one_thread import in_one_thread
from tests.support.partitions import numbered

STREAM = "s"
LETTERS = f"{STREAM}{DEAD}"
NODE = "0123456789abcdef"
ACK_WAIT_S = 10.0
MAX_DELIVER = 3
SEGMENT_BYTES = 700
NOTE_BYTES = 88
ELSEWHERE, PUT_BACK = 77, 78
"""Of what is derived: the sources."""
OPERATIONS: tuple[Operation, ...] = (
    "create",
    "append",
    "sync",
    "rename",
    "names",
    "remove",
    "truncate",
)

OPTIONS = st.builds(
    StreamOptions,
    durability=st.sampled_from(["fsync", "fsync", "interval", "os"]),
    retention=st.sampled_from(["limits", "acked", "acked"]),
    keep_bytes=st.sampled_from([None, None, 1500]),
    keep_s=st.sampled_from([None, None, 20.0]),
    keep_count=st.sampled_from([None, None, 5]),
    bytes_max=st.sampled_from([None, None, None, 1400, 4000]),
    dedup_window_s=st.sampled_from([15.0, 1e6]),
)
PRODUCERS = st.sampled_from([1, 2, 3])
SIZES = st.lists(st.sampled_from([1, 1, 10, 60, 250, 500]), min_size=1, max_size=3)
"""Of the payloads of a batch."""
ORDERS: tuple[Order, ...] = get_args(Order)
GROUPS = st.sampled_from(ORDERS)
"""One of each order, named after it."""
MEMBERS = st.sampled_from([f"{NODE}-a", f"{NODE}-b"])
How = Literal["ack", "nak", "reject", "extend", "leave"]
HOWS: st.SearchStrategy[How] = st.sampled_from(
    ["ack", "ack", "ack", "ack", "nak", "reject", "extend"]
)
SEEDS = st.integers(0, 1 << 16)
Hear = Callable[[Reply], None]
End = Callable[[FakeDisk], FakeDisk]


class Sent(msgspec.Struct, eq=False):
    """A batch that was sent, and is again, until its producer knows what became of it."""

    batch: Batch
    records: list[NewRecord]
    first: int
    """Number of its first record: such a number is what is in its payload, and no other has it."""
    tries: int = 0
    refusals: int = 0
    """That left no doubt."""
    offset: int | None = None
    """Of its first record, once there is a receipt."""

    @property
    def refused(self) -> bool:
        return self.tries == self.refusals


class Run(msgspec.Struct, eq=False):
    """Of a producer."""

    producer: int
    epoch: int
    seq: int
    owed: list[Sent] = []
    """What there is no receipt for."""


class Member(msgspec.Struct, eq=False):
    log_epoch: int
    number: int = 0
    """Of its last question."""
    holding: list[int] = []


class Followed(msgspec.Struct, eq=False):
    """A group, and what it was told."""

    begun_at: int
    said: set[int] = msgspec.field(default_factory=set)
    """To be done, by somebody, ever; and what is among the dead letters."""
    settled: set[int] = msgspec.field(default_factory=set)
    """By now, for sure."""
    written: set[int] = msgspec.field(default_factory=set)
    synced: set[int] = msgspec.field(default_factory=set)
    rejected: set[int] = msgspec.field(default_factory=set)
    members: dict[str, Member] = {}
    committed: int = 0
    committed_synced: int = 0
    failures: int = 0
    failed: bool = False
    """The journal, and it may not be whole since."""

    def lost(self, kept: int) -> None:
        """Records from there on are others, or will be."""
        for offsets in (self.said, self.settled, self.written, self.synced, self.rejected):
            offsets.difference_update([each for each in offsets if each >= kept])
        self.begun_at = min(self.begun_at, kept)
        self.committed = min(self.committed, kept)
        self.committed_synced = min(self.committed_synced, kept)


class Question(msgspec.Struct, eq=False):
    by_s: float
    """When it is to be answered."""
    answered: bool = False


class SidecarMachine(RuleBasedStateMachine):
    """See above."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = ExitStack()
        self.patches.enter_context(patch("mesh.limits.GROUP_WINDOW", 16))
        self.disk = FakeDisk(1)
        self.now_s, self.set_back_s = 1e6, 0.0
        self.options = StreamOptions()
        self.end: End = FakeDisk.kill
        self.unfinished = 0
        """Steps, one in the other: those in which something was not as it should be stay so."""
        self.faulty_step = self.may_lose = False
        self.numbers = 0
        self.sent: dict[int, Sent] = {}
        self.runs: dict[int, Run] = {}
        self.epochs: dict[int, int] = {}
        """The highest that each producer was told."""
        self.shown: dict[int, int] = {}
        """The number of the record at each offset, or that was there until retention took it."""
        self.place: dict[int, int] = {}
        """The other way round."""
        self.times: dict[int, int] = {}
        """By offset."""
        self.log_start = self.log_end = self.log_epoch = self.synced_end = self.gone = 0
        self.sealed: list[Sealed] = []
        self.last_bytes = 0
        self.groups: dict[Order, Followed] = {}
        self.letters: dict[int, int] = {}
        """By their offset among the dead letters: the number of the record."""
        self.buried: set[tuple[str, int]] = set()
        self.reader = 0, 0
        """Next offset, log epoch."""
        self.questions: list[Question] = []
        self.inbox: list[tuple[Hear, Reply]] = []
        self.made = self.reopening = False
        self.begin_life()

    @initialize(options=OPTIONS, groups=st.lists(GROUPS, max_size=2, unique=True))
    def begin(self, options: StreamOptions, groups: list[Order]) -> None:
        self.options = options
        self.append([1, 2], [[10], [60, 1], [250], [1, 1, 1], [250]], 0)
        for name in groups:
            self.join(name, f"{NODE}-a", 4)

    # -- Lives -------------------------------------------------------------------------------

    def begin_life(self) -> None:
        self.life = ExitStack()
        self.turns = self.life.enter_context(in_one_thread(self.now_s))
        self.turns.set_back_s = self.set_back_s
        self.sidecar = Sidecar(self.disk, segment_bytes=SEGMENT_BYTES)

    def end_life(self, end: End, *, power: bool = False, torn: bool = False) -> None:
        """And open what that has left. `torn`: something may have been under way."""
        self.unfinished += 1
        self.now_s = self.turns.now_s
        self.life.close()
        self.reopening = True
        self.questions.clear()
        self.inbox.clear()
        self.disk = end(self.disk)
        self.may_lose = power or torn
        self.check(torn=torn)
        self.begin_life()
        place = self.told(Find(STREAM))
        if isinstance(place, Refused):
            assert place.code == "missing", place
            assert not self.made
        else:
            self.look_again(power=power, torn=torn)
        self.reopening = False
        self.unfinished -= 1

    def look_again(self, *, power: bool, torn: bool) -> None:
        """What is remembered is no less than it was promised to be."""
        self.told(Find(LETTERS))  # a record of which there is one may be settled
        stats = self.stats()
        assert torn or not stats.torn_bytes
        for name, group in self.groups.items():
            found = stats.groups[name]
            if power or group.failed:  # who got what is lost, and it is delivered again
                group.members.clear()
            settled = self.settled_at(name)
            safe = group.synced if power or group.failed else group.written
            committed = group.committed_synced if power or group.failed else group.committed
            assert safe <= settled, "forgotten"
            assert settled <= self.done_by(group), "invented"
            assert found.committed >= committed
            group.settled, group.written, group.synced = set(settled), set(settled), set(settled)
            group.committed = group.committed_synced = found.committed
            group.failures, group.failed = found.counters.get("journal failed", 0), False

    def check(self, *, torn: bool) -> None:
        for name in sorted(self.sidecar.streams):
            folder = self.disk.folder("streams").folder(name.replace(".", "%2E"))
            report = check(folder, self.sidecar.number)
            assert not report.findings, report.findings
            assert torn or name not in self.sidecar._hosted or not report.torn_bytes

    def settled_at(self, name: str) -> set[int]:
        members = self.hosted._members
        assert members is not None
        assert not members._groups._damaged
        settled = members._groups._groups[name].group._tally.settled
        return {offset for offset in range(self.log_end) if offset in settled}

    def done_by(self, group: Followed) -> set[int]:
        """All that may be settled there."""
        return group.said | set(range(max(group.begun_at, self.gone)))

    @rule(crash=st.booleans(), seed=SEEDS)
    def end_now(self, crash: bool, seed: int) -> None:
        """The machine loses its power, or the process is killed."""
        if crash:
            self.end_life(partial(FakeDisk.crash, random=Random(seed)), power=True, torn=True)
        else:
            self.end_life(FakeDisk.kill, torn=self.failed)

    @rule(after=st.integers(1, 12), crash=st.booleans(), seed=SEEDS)
    def end_soon(self, after: int, crash: bool, seed: int) -> None:
        """In the middle of what comes next."""
        self.disk.faults.stop_at = self.disk.operations + after
        self.end = partial(FakeDisk.crash, random=Random(seed)) if crash else FakeDisk.kill

    @rule()
    def close(self) -> None:
        faulty, waiting = self.faulty or self.failed, list(self.questions)
        if self.done(self.sidecar.close):
            assert all(each.answered for each in waiting)
            self.journals_failed(faulty)
            self.mend_disk()
            self.end_life(FakeDisk.again, torn=faulty)

    def journals_failed(self, perhaps: bool) -> None:
        """As the process ended. A sync that failed takes with it what was written."""
        for group in self.groups.values() if perhaps else ():
            group.failed, group.written = True, set(group.synced)

    # -- The disk, and time ------------------------------------------------------------------

    @property
    def faulty(self) -> bool:
        return self.disk.faults.are_due

    @property
    def failed(self) -> bool:
        """Whether a log has not come to terms yet with what its disk did."""
        return any(
            each.log._failed is not None or each._partition._ahead
            for each in self.sidecar._hosted.values()
        )

    @rule(
        operations=st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=3, unique=True),
        nth=st.integers(1, 3),
        count=st.sampled_from([1, 1, 1, 2, 200]),
    )
    def fail(self, operations: list[Operation], nth: int, count: int) -> None:
        """Once, twice, or until it is mended."""
        for operation in operations:
            for later in range(count):
                self.disk.faults.fail(operation, nth + later)

    @rule(room_bytes=st.integers(0, 1000))
    def fill_disk(self, room_bytes: int) -> None:
        self.disk.faults.room_bytes = room_bytes

    @rule()
    def mend_disk(self) -> None:
        self.disk.faults.mend()
        self.disk.faults.room_bytes = None
        self.disk.faults.stop_at = 0

    @rule(seconds=st.sampled_from([1, 1, 2, 12, 40]), set_by_s=st.sampled_from([0, 0, 1, -1, -10]))
    def pass_by(self, seconds: int, set_by_s: float) -> None:
        """Time, in the midst of which the wall clock is set."""
        self.wait(seconds)
        self.set_clock(set_by_s)
        self.wait(1)

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            committed = {name: group.committed for name, group in self.groups.items()}
            if not self.done(self.turns.tick):
                return
            if self.hosted_now is not None and self.hosted._members is not None:
                self.synced(committed)

    def set_clock(self, seconds: float) -> None:
        self.set_back_s = self.turns.set_back_s = max(0.0, self.set_back_s - seconds)

    def synced(self, committed: dict[Order, int]) -> None:
        """A second is over: what groups knew before it is on disk."""
        for name, group in self.groups.items():
            group.failed = group.failed and self.faulty_step
            if not group.failed:
                group.written, group.synced = set(group.settled), set(group.settled)
                group.committed_synced = committed.get(name, group.begun_at)

    # -- Whatever is done --------------------------------------------------------------------

    def done(self, *actions: Callable[[], object]) -> bool:
        """Everybody does what there is to do; False if the process has died of it."""
        self.faulty_step = self.faulty or self.failed
        self.may_lose = self.may_lose or self.faulty_step
        self.unfinished += 1
        try:
            for action in (*actions, self.turns.go):
                self.bear(action)
        except Stopped:  # what it has said before, it has said
            told, self.inbox = self.inbox, []
            self.hear(told, Settled)
            if self.hosted_now is not None:  # what has gone just now may be there again
                self.gone = max(self.gone, self.hosted_now.log.start)
            self.journals_failed(self.faulty_step)
            self.end_life(self.end, power=self.end is not FakeDisk.kill, torn=True)
            self.hear(told, Appended)
            self.unfinished -= 1
            return False
        self.look()
        while self.inbox:
            told, self.inbox = self.inbox, []
            self.hear(told, object)
        for each in self.questions:
            assert each.answered or self.turns.now_s <= each.by_s, "not answered"
        self.questions = [each for each in self.questions if not each.answered]
        self.unfinished -= 1
        self.may_lose = False
        return True

    def hear(self, told: list[tuple[Hear, Reply]], kind: type) -> None:
        for hear, reply in told:
            if isinstance(reply, kind):
                hear(reply)

    def bear(self, action: Callable[[], object]) -> None:
        """A disk that fails may keep the clerk from something: that is logged, and no more."""
        while True:
            try:
                action()
                return
            except (OSError, StorageFailed):
                assert self.faulty_step
                action = self.turns.go

    def asked(self, hear: Hear, wait_s: float = 0.0) -> Callable[[Reply], None]:
        """What an answer to a question is given to."""
        question = Question(self.turns.now_s + wait_s + 2.0)
        self.questions.append(question)

        def answer(reply: Reply) -> None:
            assert not question.answered, "answered twice"
            question.answered = True
            self.inbox.append((hear, reply))

        return answer

    def ask(self, query: Query, hear: Hear, wait_s: float = 0.0) -> None:
        self.done(partial(self.sidecar.ask, query, self.asked(hear, wait_s)))

    def told(self, query: Query) -> Reply | None:
        """The answer to a question that has one at once; None if the process has died of it."""
        replies: list[Reply] = []
        self.ask(query, replies.append)
        return replies[0] if replies else None

    def stats(self) -> StreamStats:
        inspected = self.told(Inspect(STREAM))
        assert isinstance(inspected, Inspected), inspected
        return inspected.stats

    # -- What there is -----------------------------------------------------------------------

    @property
    def hosted_now(self) -> Hosted | None:
        return self.sidecar._hosted.get(STREAM)

    @property
    def hosted(self) -> Hosted:
        hosted = self.hosted_now
        assert hosted is not None
        return hosted

    def look(self) -> None:
        """What was there is, and whatever came or went might."""
        letters = self.sidecar._hosted.get(LETTERS)
        if letters is not None:
            self.look_at_letters(letters.log)
        hosted = self.hosted_now
        if hosted is None:
            return
        log, tip = hosted.log, hosted.log.tip
        found = list(records_in(log))
        assert [offset for offset, *_ in found] == list(range(log.start, tip.offset))
        kept = tip.offset
        if tip.log_epoch != self.log_epoch:
            later = [o for o, header, *_ in found if header.log_epoch > self.log_epoch]
            kept = min(later, default=tip.offset)
        if kept < self.log_end:
            self.lost(kept)
        self.gone = max(self.gone, log.start)
        for offset, header, payload, _ in found:
            if offset not in self.shown:
                self.came(offset, header.time_ns, payload[0])
            assert self.shown[offset] == payload[0]
        self.look_at_groups(hosted)
        self.look_at_segments(hosted)
        self.log_start, self.log_end, self.log_epoch = log.start, tip.offset, tip.log_epoch
        self.synced_end = log.synced_end

    def lost(self, kept: int) -> None:
        """Records from there on."""
        assert self.options.durability != "fsync"
        assert self.may_lose
        assert kept >= self.synced_end
        for offset in [each for each in self.shown if each >= kept]:
            number = self.shown.pop(offset)
            del self.place[number], self.times[offset]
            self.sent[number].offset = None
        for group in self.groups.values():
            group.lost(kept)

    def came(self, offset: int, time_ns: int, number: int) -> None:
        assert number not in self.place, "twice"
        assert not self.sent[number].refused, "it was refused"
        new = self.record(number)
        for other_offset, other_number in self.shown.items():
            other = self.record(other_number)
            assert new.derived is None or new.derived != other.derived, "derived twice"
            if new.dedup_id is not None and new.dedup_id == other.dedup_id:
                assert time_ns - self.times[other_offset] >= self.options.dedup_window_s * 1e9
        assert time_ns >= self.times.get(offset - 1, 0)
        self.shown[offset], self.place[number], self.times[offset] = number, offset, time_ns

    def record(self, number: int) -> NewRecord:
        sent = self.sent[number]
        return sent.records[number - sent.first]

    def look_at_segments(self, hosted: Hosted) -> None:
        """Retention took what may go, and the files are what the log says."""
        log = hosted.log
        if log.start > self.log_start:
            to = self.may_go_to()
            assert to is not None
            assert log.start <= to
        self.sealed = [
            Sealed(each.size, after.base, self.times.get(after.base - 1, 0))
            for each, after in zip(log.segments[:-1], log.segments[1:], strict=True)
        ]
        self.last_bytes = log.segments[-1].size
        if log._failed is None:
            assert isinstance(log.storage, FakeDisk)
            entries = log.storage._directory.entries
            files = {each.name for each in log.segments}
            assert files == {name for name in entries if name.endswith(".log")}
            for each in log.segments:
                file = entries[each.name]
                assert isinstance(file, Content)
                size = len(file.shown)
                assert size == each.size or (each is log.segments[-1] and size > each.size)
                assert not file.shown[each.size :].strip(b"\0")

    def may_go_to(self) -> int | None:
        options, acked = self.options, None
        keep = Keep(
            bytes_max=options.keep_bytes, age_s_max=options.keep_s, count_max=options.keep_count
        )
        if options.retention == "acked" and self.groups:
            done = [self.done_by(each) for each in self.groups.values()]
            acked = next(o for o in range(self.log_end + 1) if any(o not in each for each in done))
        now_ns = self.turns.time_ns()
        return trim_to(self.sealed, self.last_bytes, self.log_end, keep, now_ns, acked)

    def look_at_letters(self, log: Log) -> None:
        for at, header, payload, columns in records_in(log):
            if at in self.letters:
                continue
            assert columns.headers is not None
            assert columns.derived is not None
            headers = headers_of(columns.headers[0])
            name, offset, number = headers["mesh-group"], headers["mesh-offset"], payload[0]
            group = self.groups[name]
            assert (name, number) not in self.buried, "twice"
            assert header.count == 1
            assert columns.derived.offset == offset
            self.letters[at] = number
            self.buried.add((name, number))
            if self.shown.get(offset) == number:
                dead = headers["mesh-deliveries"] >= MAX_DELIVER
                assert dead or offset in group.rejected
                group.said.add(offset)

    def look_at_groups(self, hosted: Hosted) -> None:
        if hosted._members is None or self.reopening:
            return
        groups = hosted._members._groups
        stats = groups.stats()
        for name in [each for each in ORDERS if each in stats]:
            group, found = self.groups.get(name), stats[name]
            if group is None:
                begun_at = groups._groups[name].start
                group = self.groups[name] = Followed(begun_at, committed=begun_at)
            failures = found.counters.get("journal failed", 0)
            if failures > group.failures:  # a sync that failed takes with it what was written
                group.failures, group.failed = failures, True
                group.written = set(group.synced)
            if hosted.log.keeps_all or groups.log_epoch == hosted.log.log_epoch:
                assert found.committed >= group.committed, "committed went back"
                group.committed = found.committed
                assert set(range(group.committed)) <= self.done_by(group), "nobody settled it"

    # -- Producers ---------------------------------------------------------------------------

    @rule(producer=PRODUCERS)
    def open_producer(self, producer: int) -> None:
        self.runs.pop(producer, None)
        self.ask(Open(STREAM, producer, self.options), partial(self.opened, producer))

    def opened(self, producer: int, reply: Reply) -> None:
        if isinstance(reply, Refused):
            assert self.faulty_step, reply
            return
        assert isinstance(reply, Opened), reply
        self.made = True
        if self.options.durability == "fsync":
            assert reply.epoch > self.epochs.get(producer, 0)
        self.epochs[producer] = reply.epoch
        self.runs[producer] = Run(producer, reply.epoch, reply.seq)

    def batch(self, run: Run, records: list[dict[str, Any]], seq: int | None = None) -> Sent:
        first, self.numbers = self.numbers, self.numbers + len(records)
        new = []
        for n, each in enumerate(records):
            size, number = each.pop("size", 1), first + n
            key = None if number % 4 == 3 else b"key %d" % (number % 4)
            new.append(NewRecord(codec.pack([number, "x" * size]), key, **each))
        seq = run.seq if seq is None else seq
        sent = Sent(numbered(batch_of(new), run.producer, run.epoch, seq), new, first)
        self.sent.update((first + n, sent) for n in range(len(new)))
        return sent

    def send(self, *runs: Run) -> None:
        """All that they have no receipt for, in order."""
        actions = []
        for run in runs:
            refused: list[Refused] = []
            for sent in run.owed:
                sent.tries += 1
                answer = self.asked(partial(self.appended, run, sent, refused))
                actions.append(partial(self.sidecar.append, STREAM, sent.batch, answer))
        self.done(*actions)

    def appended(self, run: Run, sent: Sent, refused: list[Refused], reply: Reply) -> None:
        if isinstance(reply, Appended):
            self.receipt(sent, reply)
            run.owed.remove(sent)
            return
        assert isinstance(reply, Refused), reply
        sent.refusals += reply.code != "unsure"
        match reply.code:
            case "full":
                assert self.faulty_step or self.is_full(sent)
            case "storage":
                assert self.faulty_step
            case "unsure":
                assert self.faulty_step
                assert self.failed
            case "large":
                assert sent.batch.header.size > (self.options.bytes_max or 0)
                self.runs.pop(run.producer, None)
            case "gap" | "unknown" | "fenced" if self.options.durability != "fsync":
                if not refused:  # it was lost, and with it how far it had come
                    self.runs.pop(run.producer, None)
            case _:
                assert refused, reply
                assert reply.code == "gap", reply
        refused.append(reply)

    def is_full(self, sent: Sent) -> bool:
        """But for notes that were written with it."""
        log = self.hosted.log
        size = log.size - log.note_bytes + sent.batch.header.size + 12 * NOTE_BYTES
        return self.options.bytes_max is not None and size > self.options.bytes_max

    def receipt(self, sent: Sent, reply: Appended) -> None:
        """What it says is so."""
        records = sent.records
        assert reply.count == len(records)
        if reply.offset + len(records) > self.log_end and self.options.durability != "fsync":
            return  # it is lost already
        assert self.times[reply.offset] == reply.time_ns
        numbers = [self.shown[reply.offset + n] for n in range(len(records))]
        if numbers == list(range(sent.first, sent.first + len(records))):
            assert sent.offset in (None, reply.offset)
            sent.offset = reply.offset
            return
        other = self.record(numbers[0])
        assert reply.repeated
        assert len(records) == 1
        assert sent.offset is None
        assert any(
            mine is not None and mine == its
            for mine, its in (
                (records[0].dedup_id, other.dedup_id),
                (records[0].derived, other.derived),
            )
        )

    def opened_runs(self, producers: list[int]) -> list[Run]:
        for producer in producers:
            if producer not in self.runs:
                self.open_producer(producer)
        return [self.runs[producer] for producer in producers if producer in self.runs]

    @rule(
        producers=st.lists(PRODUCERS, min_size=1, max_size=2, unique=True),
        batches=st.lists(SIZES, min_size=1, max_size=4),
        delay_s=st.sampled_from([0, 0, 0, 5, 25]),
    )
    def append(self, producers: list[int], batches: list[list[int]], delay_s: int) -> None:
        due_ns = self.turns.time_ns() + delay_s * 10**9 if delay_s else 0
        runs = self.opened_runs(producers)
        for run in runs:
            for sizes in batches if len(run.owed) < 5 else ():
                new = self.batch(run, [{"size": size, "due_ns": due_ns} for size in sizes])
                run.owed.append(new)
                run.seq += len(sizes)
        self.send(*runs)

    @rule(
        producer=PRODUCERS,
        dedup_ids=st.lists(st.sampled_from([None, b"a", b"b", b"c"]), min_size=1, max_size=3),
        inputs=st.lists(st.none() | st.integers(0, 5), min_size=3, max_size=3),
    )
    def append_unique(
        self, producer: int, dedup_ids: list[bytes | None], inputs: list[int | None]
    ) -> None:
        for run in self.opened_runs([producer]):
            for dedup_id, offset in zip(dedup_ids, inputs, strict=False):
                derived = None if offset is None else Derived(ELSEWHERE, offset, 0)
                new = self.batch(run, [{"dedup_id": dedup_id, "derived": derived}])
                run.owed.append(new)
                run.seq += 1
            self.send(run)

    @rule(producer=PRODUCERS)
    def give_up(self, producer: int) -> None:
        """What was refused: its numbers go to what comes next, unless it may be there."""
        run = self.runs.get(producer)
        if run is not None and run.owed:
            if all(each.refused for each in run.owed):
                run.seq = run.owed[0].batch.header.seq
                run.owed.clear()
            else:
                del self.runs[producer]

    @precondition(lambda self: self.letters)
    @rule(producer=PRODUCERS)
    def put_back(self, producer: int) -> None:
        """Dead letters: as often as one likes, and each is there once."""
        for run in self.opened_runs([producer]):
            for offset in sorted(self.letters)[-3:]:
                new = self.batch(run, [{"derived": Derived(PUT_BACK, offset, 0)}])
                run.owed.append(new)
                run.seq += 1
            self.send(run)

    @precondition(lambda self: self.place)
    @rule(seed=SEEDS)
    def repeat(self, seed: int) -> None:
        """What has a receipt gets it again, or its run is over."""
        receipts = [each for each in self.sent.values() if each.offset is not None]
        if not receipts:
            return
        sent = Random(seed).choice(receipts)
        header = sent.batch.header
        current = self.runs.get(header.producer)
        is_current = current is not None and current.epoch == header.producer_epoch

        def hear(reply: Reply) -> None:
            if isinstance(reply, Appended):
                self.receipt(sent, reply)
            else:
                assert isinstance(reply, Refused), reply
                surely = is_current and self.options.durability == "fsync"
                assert self.faulty_step or not surely, reply

        answer = self.asked(hear)
        self.done(partial(self.sidecar.append, STREAM, sent.batch, answer))

    @rule(producer=PRODUCERS, size=st.integers(1, 900), old=st.booleans())
    def append_out_of_turn(self, producer: int, size: int, old: bool) -> None:
        """For which room is made all the same."""
        if old and self.options.durability != "fsync":
            return  # that there is a later run may be lost
        for run in self.opened_runs([producer]):
            other = Run(producer, run.epoch - 1 if old else run.epoch, 0)
            sent = self.batch(other, [{"size": size}], run.seq + (0 if old else 100))

            def hear(reply: Reply, sent: Sent = sent) -> None:
                assert isinstance(reply, Refused), reply
                sent.refusals += reply.code != "unsure"

            sent.tries += 1
            self.done(partial(self.sidecar.append, STREAM, sent.batch, self.asked(hear)))

    # -- Groups ------------------------------------------------------------------------------

    @rule(name=GROUPS, member=MEMBERS, prefetch=st.integers(1, 8))
    def join(self, name: Order, member: str, prefetch: int) -> None:
        options = AskedOptions(order=name, ack_wait_s=ACK_WAIT_S, max_deliver=MAX_DELIVER)

        def hear(reply: Reply) -> None:
            if isinstance(reply, Refused):
                assert self.faulty_step or not self.made, reply
                return
            assert isinstance(reply, Joined), reply
            known = self.groups[name].members.get(member)
            new = self.groups[name].members[member] = Member(reply.log_epoch)
            if known is not None:
                new.number = known.number
                new.holding = known.holding if known.log_epoch == reply.log_epoch else []

        self.ask(Join(STREAM, name, member, prefetch, options), hear)

    @rule(name=GROUPS, member=MEMBERS, wait_s=st.sampled_from([0, 0, 3, 30]), again=st.booleans())
    def fetch(self, name: Order, member: str, wait_s: int, again: bool) -> None:
        """`again`: the answer to the last one was lost."""
        group = self.groups.get(name)
        if group is None or member not in group.members:
            self.join(name, member, 4)
            group = self.groups.get(name)
        if group is None or (who := group.members.get(member)) is None:
            return
        if not again or not who.number:
            who.number += 1
        self.ask(
            Fetch(STREAM, name, member, who.number, wait_s * 1000),
            partial(self.delivered, group, member, again),
            wait_s,
        )

    def delivered(self, group: Followed, member: str, again: bool, reply: Reply) -> None:
        if isinstance(reply, Refused):
            assert reply.code in ("unknown", "closed") or self.faulty_step, reply
            group.members.pop(member, None)
            return
        assert isinstance(reply, Delivered), reply
        payloads = {}
        for data in reply.delivery.batches:
            header, body = read_batch(memoryview(data), self.sidecar.number)
            for n, payload in enumerate(payloads_of(header, body)):
                payloads[header.offset + n] = payload[0]
        who = group.members.get(member)
        for first, end, deliveries in reply.delivery.grants:
            assert deliveries <= MAX_DELIVER
            for offset in range(first, end):
                if self.options.durability == "fsync":
                    assert payloads[offset] == self.shown[offset]
                    assert again or offset not in group.settled, "it was done"
                if who is not None and self.shown.get(offset) == payloads[offset]:
                    who.holding.append(offset)
        for _, last, _ in reply.gaps:
            assert last < self.gone
            assert self.options.retention != "acked" or self.has_limits

    @property
    def has_limits(self) -> bool:
        options = self.options
        return any((options.keep_bytes, options.keep_s, options.keep_count))

    @rule(
        names=st.lists(GROUPS, min_size=1, max_size=3),
        member=MEMBERS,
        how=HOWS,
        count=st.integers(1, 6),
        seed=SEEDS,
    )
    def work(self, names: list[Order], member: str, how: How, count: int, seed: int) -> None:
        """A member gets something, and has done with some of that."""
        for name in names:
            self.fetch(name, member, 0, again=False)
            self.say(name, member, how, count, seed)

    @precondition(lambda self: self.holders())
    @rule(how=HOWS, count=st.integers(1, 6), seed=SEEDS)
    def settle(self, how: How, count: int, seed: int) -> None:
        """However late."""
        name, member = Random(seed).choice(self.holders())
        self.say(name, member, how, count, seed)

    @rule(name=GROUPS, member=MEMBERS)
    def leave(self, name: Order, member: str) -> None:
        self.say(name, member, "leave", 0, 0)

    def holders(self) -> list[tuple[Order, str]]:
        return [
            (name, member)
            for name, group in self.groups.items()
            for member, who in group.members.items()
            if who.holding
        ]

    def say(self, name: Order, member: str, how: How, count: int, seed: int) -> None:
        """Of so many records that it got, in any order."""
        group = self.groups.get(name)
        who = None if group is None else group.members.get(member)
        if group is None or who is None or not (who.holding or how == "leave"):
            return
        offsets = Random(seed).sample(sorted(set(who.holding)), min(count, len(set(who.holding))))
        said = {
            "ack": Settlements(acks=tuple((each, each + 1) for each in offsets)),
            "nak": Settlements(naks=tuple((each, seed % 3 * 2.0) for each in offsets)),
            "reject": Settlements(rejects=tuple((each, "bad") for each in offsets)),
            "extend": Settlements(extends=tuple(offsets)),
            "leave": Settlements(),
        }[how]
        who.holding = [o for o in who.holding if how == "extend" or o not in offsets]
        if how == "ack":
            group.said.update(offsets)
        elif how == "reject":
            group.rejected.update(offsets)
        elif how == "leave":
            del group.members[member]

        def hear(reply: Reply) -> None:
            if isinstance(reply, Refused):
                assert self.faulty_step, reply
                return
            assert isinstance(reply, Settled), reply
            counts = self.options.durability == "fsync" or who.log_epoch == self.log_epoch
            if how == "ack" and counts:
                group.settled.update(offset for offset in offsets if offset in self.shown)
                if not group.failed:
                    group.written = set(group.settled)

        self.ask(Settle(STREAM, name, member, who.log_epoch, said, how == "leave"), hear)

    # -- Readers -----------------------------------------------------------------------------

    @rule(bytes_max=st.sampled_from([1, 300, 10_000]), wait_s=st.sampled_from([0, 3, 30]))
    def read_on(self, bytes_max: int, wait_s: int) -> None:
        """From a place that is kept across all that happens."""
        offset, log_epoch = self.reader
        query = Read(STREAM, offset, bytes_max, wait_s * 1000, log_epoch)
        self.ask(query, partial(self.read, self.reader), wait_s)

    def read(self, reader: tuple[int, int], reply: Reply) -> None:
        if isinstance(reply, Refused):
            assert reply.code == "closed" or self.faulty_step or not self.made, reply
            return
        assert isinstance(reply, Batches), reply
        if reader != self.reader or not self.made:
            return
        offset = reader[0]
        if reply.cut_at is not None:
            assert self.options.durability != "fsync"
            assert reply.cut_at < offset
            offset = reply.cut_at
        elif reply.gap_end:
            assert offset < reply.gap_end <= self.gone
            offset = reply.gap_end
        for data in reply.batches:
            header, body = read_batch(memoryview(data), self.sidecar.number)
            assert header.offset <= offset < header.end
            if reply.log_epoch == self.log_epoch:
                for n, payload in enumerate(payloads_of(header, body)):
                    assert self.shown[header.offset + n] == payload[0]
            offset = header.end
        self.reader = offset, reply.log_epoch

    # -- In the end --------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if not self.unfinished:
                self.comes_to_rest()
        finally:
            self.life.close()
            self.patches.close()

    def comes_to_rest(self) -> None:
        """On a disk that is well everything is delivered, and settled; what may go does, and then
        there is room."""
        self.mend_disk()
        self.set_clock(self.set_back_s)
        self.wait(2)
        if self.hosted_now is None:
            return
        for name, group in self.groups.items():
            self.wait(int(ACK_WAIT_S) + 2)
            for member in list(group.members):
                self.leave(name, member)
            for _ in range(20):
                self.drain(name, group)
                if self.stats().groups[name].committed == self.log_end:
                    break
                self.wait(15)
            assert self.stats().groups[name].committed == self.log_end, name
        self.wait(25)
        to = self.may_go_to()
        assert to is None or to <= self.log_start, "it may go"
        if self.options.bytes_max and self.options.retention == "acked" and self.groups:
            self.runs.clear()
            self.append([1], [[500]], 0)
            self.wait(3)
            self.send(self.runs[1])
            assert not self.runs[1].owed, "there is room"
        self.close()

    def drain(self, name: Order, group: Followed) -> None:
        member = f"{NODE}-last"
        self.join(name, member, 1000)
        while True:
            self.fetch(name, member, 0, False)
            who = group.members.get(member)
            if who is None or not who.holding:
                break
            self.say(name, member, "ack", len(who.holding), 0)


def records_in(log: Log) -> Iterator[tuple[int, Header, Any, Any]]:
    cursor = Cursor(log, log.start)
    while batches := cursor.read(1 << 20):
        assert isinstance(batches, list), batches
        for each in batches:
            columns = columns_of(each.header, each.body)
            for n, payload in enumerate(payloads_of(each.header, each.body)):
                yield each.header.offset + n, each.header, payload, columns
    cursor.close()


TestSidecar = SidecarMachine.TestCase
TestSidecar.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSidecar = pytest.mark.slow(TestSidecar)
