"""Credit without sockets: never more out than the prefetch, and nothing leaks whatever is lost."""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh import limits
from mesh.sockets.credit import Hands, Ledger, PusherAccount, Pushers, WorkerAccount
from mesh.sockets.frame import Malformed

PEER, KEY = 7, 1


def joined(ledger: Ledger, number: int, prefetch: int = 2) -> WorkerAccount:
    account = ledger.join(number, PEER, KEY + number, prefetch)
    assert account is not None
    return account


# -- The pusher's side ---------------------------------------------------------------------------


def test_the_next_task_goes_to_the_worker_with_the_fewest() -> None:
    ledger = Ledger()
    busy, idle = joined(ledger, 1, prefetch=9), joined(ledger, 2, prefetch=9)
    for _ in range(3):
        ledger.sent(busy)
    for _ in range(3):
        assert ledger.choose() is idle
        ledger.sent(idle)


def test_equals_take_turns() -> None:
    ledger = Ledger()
    accounts = [joined(ledger, n, prefetch=3) for n in (1, 2, 3)]
    order = []
    while (account := ledger.choose()) is not None:
        ledger.sent(account)
        order.append(account.number)
    assert order == [1, 2, 3] * 3
    assert [account.outstanding for account in accounts] == [3, 3, 3]


def test_idle_workers_take_turns_however_fast_they_are() -> None:
    ledger = Ledger()
    for n in (1, 2, 3):
        joined(ledger, n)
    order = []
    for _ in range(6):
        account = ledger.choose()
        assert account is not None
        ledger.sent(account)
        ledger.credit(account.number, PEER, account.sent)
        order.append(account.number)
    assert order == [1, 2, 3] * 2


def test_a_worker_without_room_is_passed_over() -> None:
    ledger = Ledger()
    small, large = joined(ledger, 1, prefetch=1), joined(ledger, 2, prefetch=3)
    ledger.sent(small)
    for _ in range(3):
        assert ledger.choose() is large
        ledger.sent(large)
    assert ledger.choose() is None
    assert ledger.room == 0


def test_credit_that_repeats_or_comes_late_changes_nothing() -> None:
    ledger = Ledger()
    account = joined(ledger, 1, prefetch=4)
    for _ in range(4):
        ledger.sent(account)
    assert [ledger.credit(1, PEER, settled) for settled in (3, 3, 1, 4)] == [3, 0, 0, 1]
    assert account.outstanding == 0
    assert ledger.room == 4


def test_a_worker_cannot_claim_more_than_it_was_sent() -> None:
    ledger = Ledger()
    ledger.sent(joined(ledger, 1))
    with pytest.raises(Malformed):
        ledger.credit(1, PEER, 2)
    assert ledger.room == 1


def test_nobody_else_can_give_a_workers_credit() -> None:
    ledger = Ledger()
    ledger.sent(joined(ledger, 1))
    with pytest.raises(Malformed):
        ledger.credit(1, PEER + 1, 1)


def test_credit_of_an_account_that_is_closed_counts_for_nobody() -> None:
    ledger = Ledger()
    ledger.sent(joined(ledger, 1))
    gone = ledger.leave(PEER, KEY + 1)
    assert gone is not None
    assert gone.outstanding == 1
    ledger.sent(joined(ledger, 2))
    assert ledger.credit(1, PEER, 1) == 0
    assert ledger.room == 1


def test_a_number_is_never_given_twice() -> None:
    ledger = Ledger()
    joined(ledger, 1)
    assert ledger.join(1, PEER, KEY, 1) is None
    assert ledger.join(0, PEER, KEY, 1) is None


@pytest.mark.parametrize(
    ("offered", "granted"), [(0, 1), (5, 5), ((1 << 63) - 1, limits.PREFETCH_MAX)]
)
def test_a_prefetch_offered_by_a_peer_is_bounded(offered: int, granted: int) -> None:
    assert joined(Ledger(), 1, prefetch=offered).prefetch == granted


def test_a_worker_that_is_quiet_with_tasks_is_asked_ever_more_rarely() -> None:
    ledger = Ledger()
    account = joined(ledger, 1)
    assert ledger.tick() == []
    ledger.sent(account)
    asked = [tick for tick in range(1, 40) if ledger.tick()]
    assert asked == [1, 2, 4, 8, 16, 32]
    ledger.credit(1, PEER, 1)
    ledger.sent(account)
    assert ledger.tick() == [account]


# -- The worker's side ---------------------------------------------------------------------------


def test_a_gap_counts_as_settled() -> None:
    account = PusherAccount(PEER, 1)
    assert account.arrive(3, 1, prefetch=4) == (2, 0)
    assert (account.held, account.settled) == (1, 2)


def test_a_lost_tail_counts_as_settled_once_a_mark_tells_of_it() -> None:
    account = PusherAccount(PEER, 1)
    account.arrive(1, 1, prefetch=4)
    assert account.stands_at(3, prefetch=4) == 2
    assert account.stands_at(3, prefetch=4) == 0
    assert account.settled == 2


def test_a_repeat_is_no_second_task() -> None:
    account = PusherAccount(PEER, 1)
    account.arrive(1, 2, prefetch=4)
    assert account.arrive(1, 2, prefetch=4) == (0, 2)
    assert account.arrive(2, 3, prefetch=4) == (0, 1)
    assert account.held == 4


def test_more_tasks_than_the_pusher_had_credit_for_are_refused() -> None:
    account = PusherAccount(PEER, 1)
    with pytest.raises(Malformed, match="over credit"):
        account.arrive(1, 5, prefetch=4)
    with pytest.raises(Malformed, match="over credit"):
        account.stands_at(5, prefetch=4)
    assert account.arrive(1, 4, prefetch=4) == (0, 0)
    account.settle(4)
    account.told = account.settled
    assert account.arrive(8, 1, prefetch=4) == (3, 0)


@pytest.mark.parametrize(
    ("prefetch", "settled", "worth"),
    [(1, 1, True), (4, 1, True), (1024, 1, False), (1024, 511, False), (1024, 512, True)],
)
def test_credit_is_told_at_once_with_a_small_prefetch_and_by_halves_with_a_large_one(
    prefetch: int, settled: int, worth: bool
) -> None:
    account = PusherAccount(PEER, 1)
    account.arrive(1, prefetch, prefetch)
    assert not account.worth_telling(prefetch)
    account.settle(settled)
    assert account.worth_telling(prefetch) is worth


def test_accounts_of_pushers_that_left_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", 2)
    pushers = Pushers({PEER})
    kept = pushers.account(PEER, 1)
    pushers.account(PEER + 1, 2)
    pushers.account(PEER, 3)
    assert pushers.account(PEER, 1) is kept
    assert pushers.of(PEER + 1) == []
    kept.arrive(1, 1, prefetch=4)
    with pytest.raises(Malformed, match="too many pushers"):
        pushers.account(PEER, 4)
    kept.settle()
    new = pushers.account(PEER, 4)
    assert [account.number for account in pushers.of(PEER)] == [3, new.number], (
        "then those whose tasks are done, but for the last of a pusher that is there"
    )


class Worker:
    over = False


def is_over(worker: Worker) -> bool:
    return worker.over


def test_a_caller_holds_tasks_until_it_comes_back_ends_or_is_forgotten() -> None:
    hands = Hands(is_over)
    account = PusherAccount(PEER, 1)
    workers = [Worker() for _ in range(3)]
    for worker in workers:
        hand = hands.of(worker)
        hand.accounts, hand.held = [account, None], 2
    assert hands.take_back_done() == []
    assert hands.of(workers[0]).take_back() == [account, None]
    assert hands.of(workers[0]).take_back() == []
    workers[1].over = True
    assert hands.take_back_done() == [account, None]
    del workers[2], worker
    gc.collect()
    assert hands.take_back_done() == [account, None]


def test_of_tasks_taken_one_after_the_other_all_but_the_last_are_done_with() -> None:
    hands = Hands(is_over)
    worker, account, other = Worker(), PusherAccount(PEER, 1), PusherAccount(PEER, 2)
    hand = hands.of(worker)
    hand.accounts, hand.held = [account, other], 1
    assert hands.take_back_done() == [account]
    assert hands.take_back_done() == [], "that was told already"
    hand.accounts.append(account)
    assert hands.of(worker).take_back() == [other, account]


# -- Dealing out a batch --------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=6), st.integers(0, 200))
def test_a_batch_is_dealt_out_as_if_one_after_the_other_went_to_the_worker_with_the_fewest(
    workers: list[tuple[int, int]], count: int
) -> None:
    def ledger() -> Ledger:
        made = Ledger()
        for number, (prefetch, outstanding) in enumerate(workers, 1):
            account = made.join(number, number, number, prefetch)
            assert account is not None
            made.sent(account, min(outstanding, prefetch))
        return made

    at_once = {account.number: share for account, share in ledger().deal(count)}
    single = ledger()
    one_by_one: Counter[int] = Counter()
    for _ in range(count):
        if (chosen := single.choose()) is None:
            break
        single.sent(chosen)
        one_by_one[chosen.number] += 1
    assert sum(at_once.values()) == sum(one_by_one.values()), "as many as there is room for"
    assert all(at_once.values()), "nobody is dealt nothing"

    def levels(shares: Mapping[int, int]) -> list[int]:
        return sorted(
            min(outstanding, prefetch) + shares.get(number, 0)
            for number, (prefetch, outstanding) in enumerate(workers, 1)
        )

    assert levels(at_once) == levels(one_by_one)


# -- Both sides, and everything that can go wrong between them ------------------------------------


@settings(max_examples=60, stateful_step_count=60)
class Conversation(RuleBasedStateMachine):
    """One pusher and one worker over two channels that keep order, and lose what was on its way
    whenever the connection breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.pushers = Pushers({PEER})
        self.tasks: deque[tuple[str, int, int, int]] = deque()
        self.credit: deque[tuple[int, int]] = deque()
        self.in_hand: list[PusherAccount] = []
        self.fate: Counter[str] = Counter()
        self.number = 0

    @initialize(prefetch=st.integers(1, 40))
    def begin(self, prefetch: int) -> None:
        self.prefetch = prefetch
        self.attach()

    @property
    def account(self) -> WorkerAccount:
        return self.ledger._accounts[self.number]

    @rule()
    def attach(self) -> None:
        """Anew, whatever is still on its way or in hand from before."""
        self.ledger.leave(PEER, KEY)
        self.number += 1
        assert self.ledger.join(self.number, PEER, KEY, self.prefetch)

    @rule(count=st.integers(1, 10))
    def push(self, count: int) -> None:
        for _ in range(count):
            account = self.ledger.choose()
            if account is None:
                assert self.account.outstanding == self.prefetch
                return
            self.tasks.append(("task", account.number, account.sent + 1, 1))
            self.ledger.sent(account)
            self.fate["pushed"] += 1

    @rule()
    def tick(self) -> None:
        for account in self.ledger.tick():
            self.tasks.append(("mark", account.number, account.sent, 0))

    @precondition(lambda self: self.tasks)
    @rule(repeat=st.booleans())
    def arrive(self, repeat: bool) -> None:
        what, number, seq, count = self.tasks[0] if repeat else self.tasks.popleft()
        account = self.pushers.account(PEER, number)
        if what == "mark":
            account.stands_at(seq, self.prefetch)
            self.tell(account)
            return
        _, repeats = account.arrive(seq, count, self.prefetch)
        self.in_hand += [account] * (count - repeats)

    @precondition(lambda self: self.in_hand)
    @rule(index=st.integers(0, 1000))
    def settle(self, index: int) -> None:
        account = self.in_hand.pop(index % len(self.in_hand))
        account.settle()
        self.fate["settled"] += 1
        if account.worth_telling(self.prefetch):
            self.tell(account)

    def tell(self, account: PusherAccount) -> None:
        self.credit.append((account.number, account.settled))
        account.told = account.settled

    @precondition(lambda self: self.credit)
    @rule(repeat=st.booleans())
    def hear(self, repeat: bool) -> None:
        number, settled = self.credit[0] if repeat else self.credit.popleft()
        self.ledger.credit(number, PEER, settled)

    @rule(tasks=st.integers(0, 10), credit=st.integers(0, 10))
    def lose(self, tasks: int, credit: int) -> None:
        """What was written to a connection that broke, from the front; the rest survives."""
        for _ in range(min(tasks, len(self.tasks))):
            self.tasks.popleft()
        for _ in range(min(credit, len(self.credit))):
            self.credit.popleft()

    @invariant()
    def never_more_outstanding_than_the_prefetch(self) -> None:
        if self.number:
            assert 0 <= self.account.outstanding <= self.prefetch
            assert self.ledger.room == self.prefetch - self.account.outstanding
            held = [each for each in self.in_hand if each.number == self.number]
            assert len(held) <= self.account.outstanding

    def teardown(self) -> None:
        """Once nothing gets lost any more, everything is settled and there is full room again."""
        while self.tasks:
            self.arrive(False)
        while self.in_hand:
            self.settle(0)
        self.tick()
        self.account.quiet_ticks = 0  # the next mark comes with the next tick, not with the 64th
        self.tick()
        while self.tasks:
            self.arrive(False)
        while self.credit:
            self.hear(False)
        assert self.account.outstanding == 0
        assert self.ledger.room == self.prefetch
        assert self.fate["settled"] <= self.fate["pushed"]


TestConversation = pytest.mark.slow(Conversation.TestCase)


def test_a_worker_with_nothing_in_hand_settles_what_nobody_noted() -> None:
    pushers = Pushers(set())
    one, other = pushers.account(PEER, 1), pushers.account(PEER, 2)
    one.arrive(1, 3, 4)
    other.arrive(1, 1, 4)
    other.settle()
    assert pushers.settle_all() == [one]
    assert (one.settled, one.held, other.settled) == (3, 0, 1)
    assert pushers.settle_all() == []
    hands = Hands(is_over)
    worker = Worker()
    hand = hands.of(worker)
    assert not hands.hold_any()
    hand.accounts = [one]
    assert hands.hold_any()
