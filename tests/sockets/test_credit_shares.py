"""How a burst is shared, in virtual time and on the accounting alone: so the shares are exact."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from functools import partial

import pytest

from mesh.sockets.credit import Ledger, PusherAccount, WorkerAccount

TASKS = 1000
PREFETCH = 4


class Worker:
    """One that takes `task_us` for each task."""

    def __init__(self, burst: Burst, number: int, task_us: int) -> None:
        self.done = 0
        self.held_max = 0
        self.idle_us = 0
        self._burst = burst
        self._task_us = task_us
        self._idle_since: int | None = 0
        account = burst.ledger.join(number, number, 1, burst.prefetch)
        assert account is not None
        self.at_pusher: WorkerAccount = account
        self._account = PusherAccount(sender=1, number=number)
        self._inbox: deque[int] = deque()

    def arrive(self, seq: int) -> None:
        self._account.arrive(seq, 1, self._burst.prefetch)
        self.held_max = max(self.held_max, self._account.held)
        self._inbox.append(seq)
        if self._idle_since is not None:
            self.idle_us += self._burst.now - self._idle_since
            self._idle_since = None
            self._begin()

    def _begin(self) -> None:
        self._inbox.popleft()
        self._burst.later(self._task_us, self._finish)

    def _finish(self) -> None:
        """Come back for the next one, as `Intake.take` has it."""
        self.done += 1
        self._account.settle()
        if self._account.worth_telling(self._burst.prefetch) or not self._inbox:
            self._account.told = self._account.settled
            self._burst.tell(self.at_pusher, self._account.settled)
        if self._inbox:
            self._begin()
        else:
            self._idle_since = self._burst.now


class Burst:
    """One pusher with `TASKS` to give away, and workers of whom each takes so long for a task."""

    def __init__(self, *task_us: int, prefetch: int = PREFETCH, way_us: int = 50) -> None:
        self.now = 0
        self.prefetch = prefetch
        self.ledger = Ledger()
        self._way_us = way_us
        self._left = TASKS
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.workers = [Worker(self, n, us) for n, us in enumerate(task_us, 1)]
        self._push()
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def later(self, us: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + us, next(self._order), event))

    def tell(self, account: WorkerAccount, settled: int) -> None:
        self.later(self._way_us, partial(self._hear, account, settled))

    def _hear(self, account: WorkerAccount, settled: int) -> None:
        self.ledger.credit(account.number, account.peer, settled)
        self._push()

    def _push(self) -> None:
        while self._left and (account := self.ledger.choose()) is not None:
            self.ledger.sent(account)
            self._left -= 1
            worker = self.workers[account.number - 1]
            self.later(self._way_us, partial(worker.arrive, account.sent))

    @property
    def shares(self) -> list[int]:
        return [worker.done for worker in self.workers]

    @property
    def held_max(self) -> int:
        return max(worker.held_max for worker in self.workers)


def test_equal_workers_do_the_same() -> None:
    """1,000 tasks of 2 ms over four."""
    burst = Burst(2000, 2000, 2000, 2000)
    assert burst.shares == [250, 250, 250, 250]
    assert burst.held_max == PREFETCH
    assert burst.now < 250 * 2000 + 1000, "nobody waited while there was something to do"


def test_what_a_slow_worker_does_not_do_the_others_do_and_it_hoards_nothing() -> None:
    """One of four takes ten times as long: it does a thirty-first of the whole, and ends with no
    more than its prefetch still to do."""
    burst = Burst(2000, 2000, 2000, 20_000)
    *fast, slow = burst.shares
    assert sum(burst.shares) == TASKS
    assert max(fast) - min(fast) <= 1
    in_step = fast[0] / 10
    assert in_step < slow <= in_step + PREFETCH
    assert burst.held_max == PREFETCH
    assert all(worker.idle_us < 1000 for worker in burst.workers)


def test_a_worker_that_hangs_costs_its_prefetch_and_nothing_more() -> None:
    burst = Burst(2000, 2000, 2000, 10**12)
    assert burst.shares == [332, 332, 332, PREFETCH]


@pytest.mark.parametrize("prefetch", [1, 2, 16, 17, 100])
@pytest.mark.parametrize("way_us", [0, 50, 3000])
def test_equal_workers_do_the_same_whatever_the_prefetch_and_the_way(
    prefetch: int, way_us: int
) -> None:
    """Within the tenth that is promised, as long as there is more to do than they may hold."""
    burst = Burst(2000, 2000, 2000, 2000, prefetch=prefetch, way_us=way_us)
    assert all(225 <= share <= 275 for share in burst.shares)
    assert burst.held_max <= prefetch


def test_with_a_prefetch_that_covers_the_way_nobody_ever_waits() -> None:
    """A task and its credit are under way for 6 ms, in which three tasks of 2 ms are done."""
    waited = [
        max(worker.idle_us - 3000 for worker in Burst(*[2000] * 4, prefetch=n, way_us=3000).workers)
        for n in (3, 4)
    ]
    assert waited[0] > 100_000
    assert waited[1] == 0
