"""All workers of a queue, as a pusher's node sees them: who has room, who holds what.

Every worker has a PUSH socket of its own, so that it is known who holds what, and credit
(`mesh.sockets.credit`) says who has room: a high-water mark does not. The credit of all workers
comes in at one PULL socket, the only one that is waited on. While a queue is busy its tasks share
frames: what has come together in a window is dealt out over the workers that have room.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial

import zmq

from mesh import limits
from mesh.errors import Closed
from mesh.message import TasksLost
from mesh.names import check_name
from mesh.sockets.batch import BUSY_S, MESSAGES_MAX, Batch, Item
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.credit import Ledger, WorkerAccount
from mesh.sockets.frame import Kind, Malformed, Part, decode, encode, wire_name
from mesh.sockets.home import Counters, Home, node_text
from mesh.sockets.link import Link
from mesh.sockets.outgoing import Outgoing, encode_batch
from mesh.sockets.parts import read_parts, send_parts
from mesh.sockets.transport import Bound, Socket, endpoints_of, scheme_of

logger = logging.getLogger(__name__)

BATCHED_ROOM_MIN = 64
"""With less room each task leaves by itself: no idle worker is kept waiting for the sake of a batch
that would be small anyway."""
_FRAMES_PER_ATTEMPT = 1024
"""Read at most so many before the deadline is looked at again."""
_MARKS = 64
"""Room for marks beyond the prefetch: they come at 1, 2, 4 … ticks, so these last for ever."""


class Dispatch:
    """All workers of one queue, as seen from a node: the core of every `Pusher` there."""

    kind = "queue"
    seeks: OfferKind | None = "pull"
    key = 0
    """Of its own offer; the node's business."""

    def __init__(self, home: Home, channel: str) -> None:
        self.channel = check_name(channel)
        self.counters = Counters()
        self.ledger = Ledger()
        self.link = Link(f"pusher {channel!r}", self.ledger.has_room)
        self.lost: dict[str, int] = {}
        self.loss_hooks: dict[object, Callable[[TasksLost], object]] = {}
        """Of each handle that has one."""
        self.watchers = 0
        """How many wait for workers to come: credit that wakes them is not meant for them."""
        self._home = home
        self._wire = wire_name(channel)
        self.batch = Batch(message_bytes_max=home.transport.message_bytes_max)
        self.link.on_abandon = self.batch.shut
        self._open = False
        """Whether the flusher looks after the batch."""
        self._frames = self._frames_seen = 0
        self._sent_at = -math.inf
        self._compression = home.compression()
        self._sockets: dict[int, tuple[Socket, str]] = {}
        self._bound: list[Bound] = home.transport.bind(
            zmq.PULL, "credit", bytes_max=limits.SMALL_FRAME_BYTES_MAX
        )
        with self.link:
            for bound in self._bound:
                self.link.add(bound.socket)

    def endpoints(self) -> tuple[str, ...]:
        """Where workers send their credit."""
        return endpoints_of(self._bound)

    # -- Attempts: under the lock ------------------------------------------------------------

    def send(self, task: Outgoing) -> bool | None:
        """An attempt to send to the worker with the fewest tasks; None if none has room.

        The first after a pause leaves at once. Of what follows it closely a batch is dealt out.
        """
        self.read_credit()
        item = task.item
        if item is not None and self._open:
            if len(self.batch.items) >= self.batch.room:
                self._flush()
                if len(self.batch.items) >= self.batch.room:
                    return None
            self.batch.items.append(item)
            return True
        if not self._flush():
            return None
        if item is not None:
            now = time.monotonic()
            if now - self._sent_at < BUSY_S and self._open_batch(BATCHED_ROOM_MIN):
                self.batch.items.append(item)
                return True
            self._sent_at = now
        return self._send_alone(task)

    def close_batches(self) -> bool:
        """Deal out what has been waiting for a window; a queue to which nothing was sent in one
        goes back to sending each task at once. False if no worker has room."""
        with contextlib.suppress(Closed), self.link:
            self.read_credit()
            if self._frames == self._frames_seen and not self._flush():
                return self._frames != self._frames_seen
            if self._frames == self._frames_seen:
                self._open = False
                self.batch.shut()
                self._open = not self._flush()  # what came until then
                self._set_room()
            if not self._open:
                self._home.flusher.forget(self)
            self._frames_seen = self._frames
        return True

    def settle(self, item: Item) -> None:
        """A sender appended to a batch that was shut meanwhile. Raises `Closed` if too late."""
        with self.link.lock:
            if self.link.closed and self.batch.withdraw(item):
                self.link.check_open()
            elif not (self.link.closed or self._flush() or self._open):
                self._open_batch()

    def _open_batch(self, room_min: int = 0) -> bool:
        if self.ledger.room < room_min or not self._home.flusher.watch(self):
            return False
        self._open = True
        self._frames_seen = self._frames
        self._set_room()
        return True

    def _set_room(self) -> None:
        """No more than the workers have room for, or their senders would not know."""
        self.batch.room = min(MESSAGES_MAX, self.ledger.room) if self._open else 0

    def _flush(self) -> bool:
        """Deal out what the batch holds; False if there is no room for all of it."""
        while self.batch.items:
            progress = False
            for account, count in self.ledger.deal(len(self.batch.items)):
                items = self.batch.next(count)
                task = encode_batch(items)
                progress |= self._send(account, task, items[: task.count])
            self._set_room()
            if not progress:
                return False
        return True

    def _send_alone(self, task: Outgoing) -> bool | None:
        full: tuple[WorkerAccount, ...] = ()
        while (account := self.ledger.choose(full)) is not None:
            if self._send(account, task):
                return True
            full = (*full, account)
        return None

    def _send(self, account: WorkerAccount, task: Outgoing, items: Sequence[Item] = ()) -> bool:
        """Send one frame, which may hold `items` of the batch; False if there is no room."""
        socket, scheme = self._sockets[account.number]
        parts = task.parts(
            self._wire,
            Kind.DATA,
            sender=self._home.node_id,
            seq=account.sent + 1,
            time_ns=time.time_ns(),
            remaining=account.number,
            compression=self._compression if scheme == "tcp" else None,
        )
        # Before it is sent: should a KeyboardInterrupt come between, the worker finds a gap.
        self.ledger.sent(account, task.count)
        self.batch.remove(len(items), len(task), self.ledger.room)
        if not send_parts(socket, parts):
            self.batch.put_back(items)  # first: interrupted between, they show as a gap
            self.ledger.not_sent(account, task.count)
            return False
        self._frames += 1
        self.counters.sent += task.count
        self.counters.bytes_sent += len(task)
        return True

    def read_credit(self) -> None:
        """Take notice of all that workers have said."""
        news = 0
        for bound in self._bound:
            for _ in range(_FRAMES_PER_ATTEMPT):
                if (parts := read_parts(bound.socket)) is None:
                    break
                try:
                    news += self._credit(parts)
                except Malformed as fault:
                    self.counters.dropped[fault.reason] += 1
            else:
                self.link.wake_all()  # there may be more
        if not news:
            return
        if self.batch.items and not self._open:
            self._flush()
        self._set_room()
        if self.watchers:
            self.link.wake_all()

    def _credit(self, parts: list[Part]) -> int:
        frame = decode(parts)
        if frame.kind != Kind.CREDIT or frame.name != self._wire:
            raise Malformed("malformed")
        return self.ledger.credit(frame.remaining, frame.sender, frame.seq)

    # -- Workers -----------------------------------------------------------------------------

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        with self.link:
            if self.ledger.knows(peer, offer.key):
                return  # a peer may say a thing twice
            prefetch = max(1, offer.prefetch)
            try:
                socket = self._home.transport.connect(zmq.PUSH, endpoint, hwm=prefetch + _MARKS)
            except zmq.ZMQError as error:
                self.counters.dropped["offer out of reach"] += 1
                logger.warning("%s: no way to worker %s: %s", self.link.what, offer, error)
                return
            account = None
            while account is None:
                account = self.ledger.join(secrets.randbits(32), peer, offer.key, prefetch)
            self._sockets[account.number] = (socket, scheme_of(endpoint))
            self._flush()
            self._set_room()
            self.link.wake_all()

    def detach(self, peer: int, key: int, reason: str) -> None:
        """Credit that came in before is counted; what is outstanding then is lost."""
        with self.link:
            self.read_credit()
            account = self.ledger.leave(peer, key)
            if account is None:
                return
            self._sockets.pop(account.number)[0].close(linger=0)
            self._set_room()
            if account.outstanding:
                self._missed(TasksLost(self.channel, node_text(peer), account.outstanding))

    def _missed(self, loss: TasksLost) -> None:
        self.counters.lost += loss.count
        if loss.worker in self.lost or len(self.lost) < limits.SIGHTINGS_MAX:
            self.lost[loss.worker] = self.lost.get(loss.worker, 0) + loss.count
        for hook in tuple(self.loss_hooks.values()):
            self._home.run_hook(hook, loss)

    def tick(self) -> None:
        """Ask the workers that have been quiet: a task or its credit may be lost on the way."""
        with self.link:
            self._home.transport.follow(self._bound)
            self.read_credit()
            for account in self.ledger.tick():
                mark = encode(
                    self._wire,
                    Kind.MARK,
                    b"",
                    sender=self._home.node_id,
                    seq=account.sent,
                    remaining=account.number,
                )
                send_parts(self._sockets[account.number][0], [mark])  # no room: then a later one

    def close(self, linger_ms: int) -> None:
        """What was sent goes on its way for `linger_ms`."""
        self.link.close(first=partial(self._dismiss, linger_ms))
        self._home.transport.release(self._bound)

    def _dismiss(self, linger_ms: int) -> None:
        self.batch.shut()
        self._open = False
        self._home.flusher.forget(self)
        self.read_credit()
        self._flush()
        if left := self.batch.give_up():
            self.counters.dropped["not sent when closed"] += left
            logger.warning("%s: no worker has room for the last %d tasks", self.link.what, left)
        for socket, _ in self._sockets.values():
            socket.close(linger=linger_ms)
        self._sockets.clear()
