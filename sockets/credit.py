"""Credit: who may send how many tasks to whom, and who still has which in hand. No I/O.

An *account* is one attachment of a worker to a pusher. The pusher draws a random number for it,
every task of the account carries that number, and every credit frame brings it back: so a worker
that is attached anew starts with full credit, and nothing of the earlier account counts for it.

Both sides keep cumulative counts, so a frame that repeats or is late changes nothing::

    pusher                                          worker
    sent       tasks 1, 2, 3 … of the account  ──▶  expected   the next of them
    settled    how many are off its hands      ◀──  settled    expected - 1 - held

    outstanding = sent - settled, never over the worker's prefetch

A task that is lost on the way is a gap in the sequence, and a gap counts as settled. The last
before a silence leaves no gap: so an account that stays quiet with tasks outstanding is sent a
*mark*, which says where its sequence stands, and which the worker answers with its count.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Container
from typing import Generic, TypeVar

from mesh import limits
from mesh.sockets.frame import Malformed

C = TypeVar("C")

NO_ACCOUNT = 0
"""In tasks of a program that knows no credit."""
PREFETCH_SMALL = 16
"""Up to this prefetch each settled task is told at once: waiting would leave the worker idle."""


class WorkerAccount:
    """What a pusher keeps of one worker."""

    __slots__ = ("key", "number", "peer", "prefetch", "quiet_ticks", "sent", "settled")

    def __init__(self, number: int, peer: int, key: int, prefetch: int) -> None:
        self.number = number
        self.peer = peer
        self.key = key
        self.prefetch = min(max(1, prefetch), limits.PREFETCH_MAX)
        self.sent = 0
        self.settled = 0
        self.quiet_ticks = 0

    @property
    def outstanding(self) -> int:
        return self.sent - self.settled

    @property
    def has_room(self) -> bool:
        return self.sent - self.settled < self.prefetch


class Ledger:
    """The pusher's side: all workers of one queue, and who of them gets the next task."""

    def __init__(self) -> None:
        self.room = 0
        """How many tasks could be sent now, to all of them together."""
        self._accounts: OrderedDict[int, WorkerAccount] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def has_room(self) -> bool:
        return self.room > 0

    def knows(self, peer: int, key: int) -> bool:
        return self._find(peer, key) is not None

    def join(self, number: int, peer: int, key: int, prefetch: int) -> WorkerAccount | None:
        """A worker comes, with full credit. None if the number is in use: draw another."""
        if number in self._accounts or number == NO_ACCOUNT:
            return None
        account = self._accounts[number] = WorkerAccount(number, peer, key, prefetch)
        self.room += account.prefetch
        return account

    def leave(self, peer: int, key: int) -> WorkerAccount | None:
        """A worker is gone: its account, whose outstanding tasks are lost; None if it had none."""
        account = self._find(peer, key)
        if account is not None:
            del self._accounts[account.number]
            self.room -= account.prefetch - account.outstanding
        return account

    def choose(self, full: Container[WorkerAccount] = ()) -> WorkerAccount | None:
        """Of the workers with room, and not `full`, the one with the fewest tasks; of equals the
        longest unused."""
        best: WorkerAccount | None = None
        fewest = limits.PREFETCH_MAX
        for account in self._accounts.values():
            outstanding = account.sent - account.settled
            if outstanding < fewest and outstanding < account.prefetch and account not in full:
                best, fewest = account, outstanding
                if not outstanding:
                    break
        return best

    def deal(self, count: int) -> list[tuple[WorkerAccount, int]]:
        """How many of `count` tasks each worker gets: as if one after the other went to the worker
        with the fewest. What nobody has room for is not dealt out."""

        def dealt_up_to(level: int) -> int:
            return sum(
                max(0, min(level, account.prefetch) - account.outstanding) for account in accounts
            )

        accounts = [account for account in self._accounts.values() if account.has_room]
        level = bisect_right(range(limits.PREFETCH_MAX + 1), count, key=dealt_up_to) - 1
        left = count - dealt_up_to(level)
        shares = []
        for account in accounts:
            share = max(0, min(level, account.prefetch) - account.outstanding)
            if left and account.outstanding <= level < account.prefetch:
                share, left = share + 1, left - 1
            if share:
                shares.append((account, share))
        return shares

    def sent(self, account: WorkerAccount, count: int = 1) -> None:
        """So many tasks, from ``account.sent + 1`` on, are on their way to that worker."""
        account.sent += count
        account.quiet_ticks = 0
        self.room -= count
        self._accounts.move_to_end(account.number)

    def not_sent(self, account: WorkerAccount, count: int) -> None:
        """The last `count` are not: there was no room for them."""
        account.sent -= count
        self.room += count

    def credit(self, number: int, peer: int, settled: int) -> int:
        """A worker says how many are off its hands; returns how many of them are news.

        An account that is closed or was never open is none of ours: 0. Raises `Malformed` if the
        worker claims more than it was sent.
        """
        account = self._accounts.get(number)
        if account is None:
            return 0
        if account.peer != peer or settled > account.sent:
            raise Malformed("malformed")
        news = max(0, settled - account.settled)
        if news:
            account.settled = settled
            account.quiet_ticks = 0
            self.room += news
        return news

    def tick(self) -> list[WorkerAccount]:
        """Those to send a mark to: quiet for 1, 2, 4, 8 … ticks with tasks outstanding.

        Ever more rarely, since a worker that is busy with one long task reads none of them.
        """
        due = []
        for account in self._accounts.values():
            if account.outstanding:
                account.quiet_ticks += 1
                if account.quiet_ticks & (account.quiet_ticks - 1) == 0:
                    due.append(account)
        return due

    def _find(self, peer: int, key: int) -> WorkerAccount | None:
        for account in self._accounts.values():
            if (account.peer, account.key) == (peer, key):
                return account
        return None


class PusherAccount:
    """What a worker keeps of one pusher's account."""

    __slots__ = ("expected", "held", "number", "sender", "told")

    def __init__(self, sender: int, number: int) -> None:
        self.sender = sender
        self.number = number
        self.expected = 1
        """Sequence of the next task; all before it have arrived or never will."""
        self.held = 0
        """Tasks that arrived and are not settled."""
        self.told = 0
        """The count in the last credit frame sent."""

    @property
    def settled(self) -> int:
        return self.expected - 1 - self.held

    def arrive(self, seq: int, count: int, prefetch: int) -> tuple[int, int]:
        """Tasks `seq` to ``seq + count - 1`` are here: (how many before them are lost, how many of
        them are repeats). Raises `Malformed` for tasks that the pusher had no credit for."""
        missed = self._advance(seq + count - 1, prefetch, count)
        repeats = min(count, max(0, -missed))
        self.held += count - repeats
        return max(0, missed), repeats

    def stands_at(self, seq: int, prefetch: int) -> int:
        """A mark says that `seq` was the last task sent: how many before it are lost."""
        return max(0, self._advance(seq, prefetch, 0))

    def settle(self, count: int = 1) -> None:
        """So many of the tasks held are off this worker's hands."""
        self.held -= count

    def worth_telling(self, prefetch: int) -> bool:
        """Whether to send credit now, though the worker still has tasks to go on with."""
        owed = self.settled - self.told
        return owed > 0 and (prefetch <= PREFETCH_SMALL or 2 * owed >= prefetch)

    def _advance(self, last: int, prefetch: int, count: int) -> int:
        """How far the first of `count` tasks is beyond the expected one; less than 0: repeats."""
        if last > self.told + prefetch:
            raise Malformed("over credit")
        beyond = last + 1 - count - self.expected
        self.expected = max(self.expected, last + 1)
        return beyond


class Pushers:
    """The worker's side: the accounts of all pushers that sent it something."""

    def __init__(self, attached: Container[int]) -> None:
        self._attached = attached
        self._accounts: dict[tuple[int, int], PusherAccount] = {}

    def account(self, sender: int, number: int) -> PusherAccount:
        """The account, opened if need be: a task may be faster than the news of its pusher.

        Raises `Malformed` if there are too many: those of pushers that left are forgotten first.
        """
        account = self._accounts.get((sender, number))
        if account is None:
            if len(self._accounts) >= limits.SIGHTINGS_MAX:
                self._forget_one()
            account = self._accounts[sender, number] = PusherAccount(sender, number)
        return account

    def of(self, sender: int) -> list[PusherAccount]:
        return [account for account in self._accounts.values() if account.sender == sender]

    def settle_all(self) -> list[PusherAccount]:
        """Nothing is in this worker's hands: settle what is said to be. Returns whose it was."""
        stuck = [account for account in self._accounts.values() if account.held]
        for account in stuck:
            account.held = 0
        return stuck

    def _forget_one(self) -> None:
        """The oldest of a pusher that left, else one that is settled and not its pusher's last."""
        last = {account.sender: key for key, account in self._accounts.items()}
        for key, account in self._accounts.items():
            gone = account.sender not in self._attached
            if gone or (not account.held and last[account.sender] != key):
                del self._accounts[key]
                return
        raise Malformed("too many pushers")


class Hand:
    """What one caller has taken and is not settled: the last `held` of it are in its hands, what
    came before is done with."""

    __slots__ = ("accounts", "held", "left")

    def __init__(self) -> None:
        self.accounts: list[PusherAccount | None] = []
        """Of each task its account, in order; None for one without."""
        self.held = 0
        self.left = 0
        """How many more it may take before what is done with is to be told."""

    def take_back(self) -> list[PusherAccount | None]:
        """All of it: the caller came back, or is over."""
        accounts, self.accounts, self.held = self.accounts, [], 0
        return accounts

    def take_done(self) -> list[PusherAccount | None]:
        """What is done with. Its caller may go on taking meanwhile, without a lock."""
        count = len(self.accounts) - self.held
        done = self.accounts[:count]
        del self.accounts[:count]
        return done


class Hands(Generic[C]):
    """Which caller (a thread, an asyncio task) works on tasks of which accounts.

    A caller holds what it was given until it comes back for more, or is over.
    """

    def __init__(self, over: Callable[[C], bool]) -> None:
        self._over = over
        self._hands: dict[weakref.ref[C], Hand] = {}

    def of(self, caller: C) -> Hand:
        """The hand of `caller`, which is made if need be."""
        return self._hands.setdefault(weakref.ref(caller), Hand())

    def hold_any(self) -> bool:
        """Whether any of them holds a task."""
        return any(hand.accounts for hand in list(self._hands.values()))

    def take_back_done(self) -> list[PusherAccount | None]:
        """What callers are done with: of those that are over that is all."""
        done = []
        for reference, hand in list(self._hands.items()):
            caller = reference()
            if caller is None or self._over(caller):
                del self._hands[reference]
                done += hand.take_back()
            else:
                done += hand.take_done()
        return done
