"""Pulling tasks from a queue.

Guarantee: each task is delivered at most once, in each pusher's order. Of any one pusher at most
`prefetch` tasks are in this worker's hands, the one it works on included: what it has not room for
stays with the pusher, where an idle worker can get it. Nothing is kept if this worker dies; every
pusher is told how many of its own went with it.

A task is in a worker's hands until the thread (or asyncio task) that received it comes back for
more, or ends; then credit goes back (`mesh.sockets.credit`). A puller that is closed settles
nothing more: it tells what was settled, and the rest is lost. A program that knows no credit may
push here too: it leaves the account number 0, and ZeroMQ's high-water mark is all that bounds it.
What came in one frame waits in the inbox; nothing more is read before that is taken.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import zmq

from mesh import limits
from mesh.message import Message, Messages, Origin, Run
from mesh.names import check_name
from mesh.options import PullerOptions, check_count, check_timeout
from mesh.sockets import codec
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.credit import (
    NO_ACCOUNT,
    PREFETCH_SMALL,
    Hand,
    Hands,
    PusherAccount,
    Pushers,
)
from mesh.sockets.frame import Frame, Kind, Malformed, decode, encode, wire_name
from mesh.sockets.handle import Receiving
from mesh.sockets.home import Counters, Home, node_text
from mesh.sockets.inbox import Inbox
from mesh.sockets.link import Link
from mesh.sockets.parts import parts_of, send_parts
from mesh.sockets.transport import Bound, Socket, endpoints_of
from mesh.sockets.turns import Turns

if TYPE_CHECKING:
    from asyncio import Task

    Caller = threading.Thread | Task[Any]

logger = logging.getLogger(__name__)

_FRAMES_PER_ATTEMPT = 256
"""Read at most so many before the deadline is looked at again: none of them may hold a task."""
_LINGER_MS = 200
"""Credit that was given just before the puller was closed gets this long to leave."""


class Intake:
    """The core of a puller: PULL sockets, what is read but not taken, and the credit it owes."""

    kind = "queue"
    seeks: OfferKind | None = "push"
    key = 0
    """Of its own offer; the node's business."""

    def __init__(self, home: Home, channel: str, options: PullerOptions) -> None:
        self.channel = check_name(channel)
        self.prefetch = options.prefetch
        self._views = options.views
        self.counters = Counters()
        self._home = home
        self._wire = wire_name(channel)
        self.inbox = Inbox()
        """What is read and was not taken. Whoever has a `Hand` that allows it may pop from `made`
        without the lock."""
        self.link = Link(f"puller {channel!r}", partial(bool, self.inbox))
        self.link.on_abandon = self.inbox.clear
        self._hands: Hands[Caller] = Hands(_is_over)
        self._sockets: dict[int, tuple[int, Socket]] = {}
        self._pushers = Pushers(self._sockets)
        self._owing: set[PusherAccount] = set()
        self._bound: list[Bound] = home.transport.bind(zmq.PULL, "pull")
        self._turns = Turns(self.link)
        with self.link:
            for bound in self._bound:
                self.link.add(bound.socket)
                self._turns.add(bound.socket)

    def endpoints(self) -> tuple[str, ...]:
        """Where pushers send their tasks."""
        return endpoints_of(self._bound)

    # -- Attempts: under the lock ------------------------------------------------------------

    def take(self, hand: Hand) -> Message | None:
        """What was in that hand is done with; here is its next task, or None if there is none."""
        self._settle(hand.take_back())
        while self._fill():
            if (message := self.inbox.pop()) is not None:
                self._put_in(hand, [message._origin.account])
                return message
        self._found_none()
        return None

    def take_many(self, hand: Hand, count_max: int) -> Messages | None:
        """Likewise: all there are, up to `count_max` and about `limits.RECV_MANY_BYTES`."""
        self._settle(hand.take_back())
        while self._fill(count_max, limits.RECV_MANY_BYTES):
            if messages := self.inbox.pop_many(count_max):
                self._put_in(hand, [origin.account for origin in messages.origins()])
                return messages
        self._found_none()
        return None

    def _put_in(self, hand: Hand, accounts: list[PusherAccount | None]) -> None:
        hand.accounts, hand.held = accounts, len(accounts)
        hand.left = self.prefetch // 2 if self.prefetch > PREFETCH_SMALL else 0

    def _found_none(self) -> None:
        self._settle(self._hands.take_back_done())
        self._reconcile()
        self._pay()

    def _reconcile(self) -> None:
        """A Ctrl-C between taking a task and noting whose it was would keep its credit for ever."""
        if not (len(self.inbox) or self._hands.hold_any()):
            for account in self._pushers.settle_all():
                self._owing.add(account)

    def hand(self, caller: Caller) -> Hand:
        """What that thread or asyncio task has taken. Under the lock."""
        return self._hands.of(caller)

    def give_back(self, hand: Hand, messages: Sequence[Message]) -> None:
        """The caller was cancelled before it saw them: they are for somebody else."""
        hand.take_back()
        self.inbox.put_back(messages, _order)

    # -- Reading: under the lock -------------------------------------------------------------

    def _fill(self, tasks: int = 1, bytes_max: float = math.inf) -> bool:
        """Read until so many tasks are there, or so many bytes were read; False if there is no task
        at all."""
        enough = self.counters.bytes_received + bytes_max
        for _ in range(_FRAMES_PER_ATTEMPT):
            if len(self.inbox) >= tasks or self.counters.bytes_received >= enough:
                return True
            read = self._turns.read_first()
            if read is None:
                return bool(self.inbox)
            try:
                self._accept(decode(parts_of(*read, views=self._views)))
            except Malformed as fault:
                self.counters.dropped[fault.reason] += 1
        self.link.wake_all()  # there may be more
        return bool(self.inbox)

    def _accept(self, frame: Frame) -> None:
        if frame.name != self._wire:
            raise Malformed("malformed")
        account = None
        if frame.remaining != NO_ACCOUNT:
            account = self._pushers.account(frame.sender, frame.remaining)
        if frame.kind == Kind.DATA:
            self._accept_tasks(frame, account)
        elif frame.kind == Kind.MARK and account is not None:
            self.counters.lost += account.stands_at(frame.seq, self.prefetch)
            self._tell(account)
        else:
            raise Malformed("malformed")

    def _accept_tasks(self, frame: Frame, account: PusherAccount | None) -> None:
        repeats = 0
        if account is not None:
            missed, repeats = account.arrive(frame.seq, frame.count, self.prefetch)
            self.counters.lost += missed
            if repeats:
                self.counters.dropped["repeat"] += repeats
            if missed:
                self._owing.add(account)
        try:
            payloads, headers = codec.unpack_frame(frame, self._home.transport.message_bytes_max)
        except Malformed:
            if account is not None:
                self._settle([account] * (frame.count - repeats))
            raise
        self.counters.received += len(payloads) - repeats
        self.counters.bytes_received += frame.size
        sender = node_text(frame.sender)
        origin = Origin(self.channel, sender, frame.seq, frame.time_ns, headers, account)
        del payloads[:repeats]
        self.inbox.add(Run(payloads, repeats, origin))

    # -- Credit: under the lock --------------------------------------------------------------

    def _settle(self, accounts: list[PusherAccount | None]) -> None:
        """These tasks are off this worker's hands."""
        for account, settled in Counter(accounts).items():
            if account is not None:
                account.settle(settled)
                if account.worth_telling(self.prefetch):
                    self._tell(account)
                else:
                    self._owing.add(account)

    def _pay(self) -> None:
        """Nothing to do here: tell every pusher what it does not know yet."""
        for account in list(self._owing):
            self._tell(account)

    def _tell(self, account: PusherAccount) -> None:
        """Send the count. A pusher that is not known yet is told when it is."""
        self._owing.discard(account)
        if account.sender not in self._sockets:
            return
        settled = account.settled
        credit = encode(
            self._wire,
            Kind.CREDIT,
            b"",
            sender=self._home.node_id,
            seq=settled,
            remaining=account.number,
        )
        if send_parts(self._sockets[account.sender][1], [credit]):
            account.told = settled
        else:
            self._owing.add(account)

    # -- Pushers -----------------------------------------------------------------------------

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        with self.link:
            self._close_credit(peer)
            try:
                socket = self._home.transport.connect(zmq.PUSH, endpoint)
            except zmq.ZMQError as error:
                self.counters.dropped["offer out of reach"] += 1
                logger.warning("%s: no way to pusher %s: %s", self.link.what, offer, error)
                return
            self._sockets[peer] = (offer.key, socket)
            for account in self._pushers.of(peer):
                self._tell(account)

    def detach(self, peer: int, key: int, reason: str) -> None:
        """Nothing more to tell it; what it has sent is delivered."""
        with self.link:
            if peer in self._sockets and self._sockets[peer][0] == key:
                self._close_credit(peer)
                self._owing -= set(self._pushers.of(peer))

    def _close_credit(self, peer: int) -> None:
        if peer in self._sockets:
            self._sockets.pop(peer)[1].close(linger=0)

    def tick(self) -> None:
        with self.link:
            self._home.transport.follow(self._bound)
            self._fill()
            self._settle(self._hands.take_back_done())
            self._pay()

    def close(self, linger_ms: int) -> None:
        """Tasks that are not settled are lost, and their pushers will hear of it."""
        self.link.close(first=partial(self._conclude, linger_ms))
        self._home.transport.release(self._bound)

    def _conclude(self, linger_ms: int) -> None:
        self.inbox.clear()
        self._settle(self._hands.take_back_done())
        self._pay()
        for _, socket in self._sockets.values():
            socket.close(linger=linger_ms)
        self._sockets.clear()


class Puller(Receiving[Message]):
    """A handle to a queue's tasks, from `Node.puller`. Iterate it, or call `recv`. Safe from
    several threads, each task going to one of them.

    A task counts as done once the thread or asyncio task that received it receives again, or ends.
    So receive in the one that does the work, with `timeout=` and not with `asyncio.wait_for`, which
    on Python 3.11 receives in a task of its own.
    """

    def __init__(self, core: Intake, owner: object, release: Callable[[], None]) -> None:
        super().__init__(core.link.what, owner, release)
        self._core = core
        self._made = core.inbox.made
        self._own = _Own()

    @property
    def channel(self) -> str:
        """The name of the queue."""
        return self._core.channel

    @property
    def prefetch(self) -> int:
        """How many tasks of each pusher may be here at a time."""
        return self._core.prefetch

    def recv(self, timeout: float | None = None) -> Message:
        """The next task, blocking up to `timeout` seconds (None: for ever, 0: not at all).

        What this thread received before is done with, even if none comes. Raises `Timeout`,
        `Closed`.
        """
        hand = self._own.hand
        if hand is not None and hand.left > 0:
            try:
                message = self._made.popleft()
            except IndexError:
                pass
            else:
                hand.left -= 1
                hand.held = 1
                hand.accounts.append(message._origin.account)
                return message
        core, hand = self._core, hand or self._new_hand()
        return core.link.wait(lambda: core.take(hand), check_timeout(timeout), self._awaited)

    async def arecv(self, timeout: float | None = None) -> Message:
        """`recv` for asyncio. Cancelling it loses nothing."""
        core, hand = self._core, self._task_hand()
        return await core.link.wait_async(
            lambda: core.take(hand),
            check_timeout(timeout),
            self._awaited,
            give_back=lambda message: core.give_back(hand, [message]),
        )

    def recv_many(self, *, timeout: float | None = None, count_max: int = 1000) -> Messages:
        """Wait for one task, and return all that are there, at most `count_max`, and no more
        once about 1 MiB was read (`limits.RECV_MANY_BYTES`).

        Blocks for the first up to `timeout` seconds (None: for ever, 0: not at all). The result is
        a sequence that makes each `Message` as it is looked at; its `payloads` are the payloads
        alone. All of them are in this thread's hands until it receives
        again. Raises `Timeout`, `Closed`, `InvalidOption`.
        """
        core, hand = self._core, self._own.hand or self._new_hand()
        check_count(count_max, "count_max", 1, limits.RECV_MANY_MAX)
        return core.link.wait(
            lambda: core.take_many(hand, count_max), check_timeout(timeout), self._awaited
        )

    async def arecv_many(self, *, timeout: float | None = None, count_max: int = 1000) -> Messages:
        """`recv_many` for asyncio. Cancelling it loses nothing."""
        check_count(count_max, "count_max", 1, limits.RECV_MANY_MAX)
        core, hand = self._core, self._task_hand()
        return await core.link.wait_async(
            lambda: core.take_many(hand, count_max),
            check_timeout(timeout),
            self._awaited,
            give_back=lambda messages: core.give_back(hand, messages),
        )

    def _new_hand(self) -> Hand:
        """This thread's."""
        caller = threading.current_thread()
        hand = self._own.hand = self._core.link.run(lambda: self._core.hand(caller))
        return hand

    def _task_hand(self) -> Hand:
        """The running asyncio task's."""
        from asyncio import current_task  # blocking programs never import asyncio

        caller = current_task() or threading.current_thread()
        return self._core.link.run(lambda: self._core.hand(caller))

    def close(self) -> None:
        """Stop receiving; whoever waits gets `Closed`. What was received last, and what waits here,
        counts as lost. Does not block; idempotent."""
        self._core.close(_LINGER_MS)
        super().close()

    @property
    def _awaited(self) -> str:
        return f"task of queue {self._core.channel!r}"


class _Own(threading.local):
    """What a thread knows of its own hand."""

    hand: Hand | None = None


def _order(task: Message) -> tuple[object, int]:
    """Whose sequence a task is part of, and its place in it."""
    return task._origin.account or task.sender, task.seq


def _is_over(caller: Caller) -> bool:
    return not caller.is_alive() if isinstance(caller, threading.Thread) else caller.done()
