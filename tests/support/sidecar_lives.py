"""A sidecar life after life: on a disk that fails, fills and is mended, through crashes, kills and
closings, as time passes and the wall clock is set. The ground that the rules of
`tests.support.sidecar_machine` stand on: each of them is `done`, or asks a question with `ask`.

Promises that after all that is done the log and the groups are looked at, and only then the answers
are heard; that every question is answered once, in time; that what is opened after an end is sound
and remembers what it has to; and that nothing fails but by a fault of the disk.

Must not know what is asked, nor by whom.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from random import Random
from unittest.mock import patch

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from mesh.durable.check import check
from mesh.durable.folders import DEAD
from mesh.durable.groups import Groups
from mesh.durable.hosted import Hosted
from mesh.durable.outcomes import Appended, Refused
from mesh.durable.protocol import Find, Inspect, Inspected, Query, Reply, Settled
from mesh.durable.sidecar import Sidecar
from mesh.errors import StorageFailed
from mesh.message import StreamStats
from mesh.options import StreamOptions
from tests.support.fake_disk import FakeDisk, Operation, Stopped
from tests.support.one_thread import in_one_thread
from tests.support.sidecar_groups import FollowedGroups
from tests.support.sidecar_records import Records

STREAM = "s"
LETTERS = f"{STREAM}{DEAD}"
SEGMENT_BYTES = 700
OPERATIONS: tuple[Operation, ...] = (
    "create",
    "append",
    "sync",
    "rename",
    "names",
    "remove",
    "truncate",
)
SEEDS = st.integers(0, 1 << 16)
Hear = Callable[[Reply], None]
End = Callable[[FakeDisk], FakeDisk]


class Question(msgspec.Struct, eq=False):
    by_s: float
    """When it is to be answered."""
    answered: bool = False


class Lives(RuleBasedStateMachine):
    """See above."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = ExitStack()
        self.patches.enter_context(patch("mesh.limits.GROUP_WINDOW", 16))
        self.disk = FakeDisk(1)
        self.now_s, self.set_back_s = 1e6, 0.0
        self.end: End = FakeDisk.kill
        self.unfinished = 0
        """Steps, one in the other: those in which something was not as it should be stay so."""
        self.faulty_step = self.may_lose = False
        self.records = Records()
        self.groups = FollowedGroups(self.records)
        self.questions: list[Question] = []
        self.inbox: list[tuple[Hear, Reply]] = []
        self.made = False
        """The stream, as somebody was told."""
        self.reopening = False
        self.begin_life()

    @property
    def options(self) -> StreamOptions:
        return self.records.options

    def teardown(self) -> None:
        self.life.close()
        self.patches.close()

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
            assert not self.made, "forgotten"
        else:
            self.look_again(power=power, torn=torn)
        self.reopening = False
        self.unfinished -= 1

    def check(self, *, torn: bool) -> None:
        for name in sorted(self.sidecar.streams):
            folder = self.disk.folder("streams").folder(name.replace(".", "%2E"))
            report = check(folder, self.sidecar.number)
            assert not report.findings, report.findings
            assert torn or name not in self.sidecar._hosted or not report.torn_bytes

    def look_again(self, *, power: bool, torn: bool) -> None:
        self.told(Find(LETTERS))  # a record of which there is one may be settled
        stats = self.stats()
        assert torn or not stats.torn_bytes
        if self.groups.by_name:
            groups = self.groups_in(self.hosted)
            assert groups is not None
            self.groups.look_again(groups, stats, power=power)

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
            if faulty:
                self.groups.journals_failed()
            self.mend_disk()
            self.end_life(FakeDisk.again, torn=faulty)

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
            committed = self.groups.committed
            if not self.done(self.turns.tick):
                return
            if self.hosted_now is not None and self.groups_in(self.hosted_now) is not None:
                self.groups.synced(committed, faulty=self.faulty_step)

    def set_clock(self, seconds: float) -> None:
        self.set_back_s = self.turns.set_back_s = max(0.0, self.set_back_s - seconds)

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
            if self.hosted_now is not None:
                self.records.went(self.hosted_now.log)
            if self.faulty_step:
                self.groups.journals_failed()
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

    def groups_in(self, hosted: Hosted) -> Groups | None:
        """None if nobody has asked for them yet."""
        return None if hosted._members is None else hosted._members._groups

    def look(self) -> None:
        """All of it is as it may be."""
        letters = self.sidecar._hosted.get(LETTERS)
        if letters is not None:
            self.groups.look_at_letters(letters.log)
        hosted = self.hosted_now
        if hosted is None:
            return
        log = hosted.log
        kept = self.records.look(log, may_lose=self.may_lose)
        if kept is not None:
            self.groups.lost(kept)
        groups = self.groups_in(hosted)
        if groups is not None and not self.reopening:
            self.groups.look(log, groups)
        if log.start > self.records.start:
            to = self.may_go_to()
            assert to is not None, "taken too soon"
            assert log.start <= to, "taken too soon"
        self.records.look_at_files(log)

    def may_go_to(self) -> int | None:
        """The offset below which retention may take what there was at the last look."""
        acked = self.groups.acked if self.options.retention == "acked" else None
        return self.records.may_go_to(self.turns.time_ns(), acked)
