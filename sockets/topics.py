"""The publishing side of a node: all its topics, on few sockets.

The topics of a node share few XPUB sockets: those that drop have one for ipc and on a network one
for tcp, those that wait have others (`Topics`). A message goes out in the caller's own thread.
Sequences count per topic, from 1. A subscriber subscribes to an address of its own besides its
pattern (`frame.subscriber_address`), and is answered there, in band, with what it needs to tell a
gap: the mark. A lost tail is exposed twice over: a topic that fell quiet marks itself, and a
subscriber that has read all there is asks where its publishers stand, since the first may have been
dropped with the rest.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import zmq

from mesh import limits
from mesh.errors import Closed, InvalidOption, OptionsDiffer
from mesh.names import check_name
from mesh.options import PublisherOptions, WhenFull
from mesh.sockets.batch import BUSY_S, Batch, Item
from mesh.sockets.compression import Compression
from mesh.sockets.connections import Draining
from mesh.sockets.control import Offer
from mesh.sockets.frame import Flag, Kind, Part, encode
from mesh.sockets.home import Counters, Home
from mesh.sockets.link import Link
from mesh.sockets.outgoing import Outgoing, encode_batch
from mesh.sockets.parts import has_input, send_parts
from mesh.sockets.readers import Readers
from mesh.sockets.topic import Tap, Topic
from mesh.sockets.transport import Bound, Socket, endpoints_of

logger = logging.getLogger(__name__)

LOOK_S: Final = 0.001
"""A publisher that sends again within that leaves reading subscriptions to the flusher."""
LOOK_S_MAX: Final = 0.005
"""Which does so at least that often."""
_UNCOUNTED_BYTES: Final = 4096
"""Of a large frame: so that its name and header do not make it one slot larger."""


class Topics:
    """The core of a node's publishers: one for those that drop, and one for those that wait.

    They cannot share sockets. Once libzmq has dropped a message for a full subscriber, it takes
    all that follows as sent to it, until that subscriber has read on: also what must not be lost.
    """

    kind = "topic"
    seeks = None
    channel = ""

    def __init__(self, home: Home, when_full: WhenFull) -> None:
        self.waits = when_full == "wait"
        self.message_bytes_max = home.transport.message_bytes_max
        self.counters = Counters()
        self.link = Link("publisher")
        self._home = home
        self._looked_at = -math.inf
        self._flags = Flag.WAITS if self.waits else 0
        self._topics: dict[str, Topic] = {}
        self._draining = Draining()
        self.link.on_abandon = partial(_abandon, self._topics, self._draining)
        self._readers = Readers(
            self._topics, self.counters.dropped, node_id=home.node_id, flags=self._flags
        )
        self._taps_of: Callable[[str], tuple[Tap, ...]] = lambda name: ()
        self._dirty: dict[Topic, int] = {}
        self._open: dict[Topic, int] = {}
        """Topics with an open batch, and how many frames of each were sent when last looked at."""
        self._bound: list[Bound] = home.transport.bind(
            zmq.XPUB, when_full, bytes_max=limits.SMALL_FRAME_BYTES_MAX
        )
        with self.link:
            for bound in self._bound:
                bound.socket.setsockopt(zmq.XPUB_VERBOSER, 1)
                bound.socket.setsockopt(zmq.XPUB_NODROP, 1)
                self.link.add(bound.socket)

    def endpoints(self) -> tuple[str, ...]:
        return endpoints_of(self._bound)

    def topic(self, name: str, options: PublisherOptions) -> Topic:
        """The topic of that name, made if need be. Raises `InvalidName`, `InvalidOption` (too
        many), `OptionsDiffer`, `Closed`."""
        with self.link.lock:
            self.link.check_open()
            topic = self._topics.get(check_name(name))
            if topic is None:
                if len(self._topics) >= limits.CHANNELS_PER_NODE_MAX:
                    raise InvalidOption(
                        f"{len(self._topics):,} topics are open, which is the limit"
                    )
                batch = Batch(message_bytes_max=self.message_bytes_max)
                compression = self._home.compression()
                topic = Topic(name, options, batch, compression=compression)
                topic.taps = self._taps_of(name)
                self._topics[name] = topic
            elif topic.options != options and not topic.handles:
                topic.options, topic.last = options, None
            elif topic.options != options:
                raise OptionsDiffer(f"topic {name!r} is open with {topic.options}, not {options}")
            topic.handles.append(None)
            return topic

    def tap(self, taps_of: Callable[[str], tuple[Tap, ...]]) -> None:
        """From now on what is published goes to the taps that `taps_of` names for a topic, too, and
        to no others; not what was sent before, if there is room for that. Under the lock."""
        self.flush()
        self._taps_of = taps_of
        for topic in self._topics.values():
            topic.taps, topic.tapped = taps_of(topic.name), topic.seq

    def flush(self) -> None:
        """Send what waits for a window, if there is room. Under the lock."""
        for topic in list(self._open):
            self._flush(topic)

    def is_open(self, name: str) -> bool:
        """Whether handles to a topic of that name are open here."""
        with self.link.lock:
            topic = self._topics.get(name)
            return topic is not None and bool(topic.handles)

    def release(self, topic: Topic) -> None:
        """A handle is gone. The sequence stays, for a later one. Takes no lock."""
        topic.handles.pop()

    # -- Sending: under the lock -------------------------------------------------------------

    def send(self, topic: Topic, message: Outgoing) -> bool | None:
        """An attempt to send one message; None if the publisher has to wait for room.

        The first one after a pause leaves at once. What follows it closely shares frames.
        """
        batch = topic.batch
        now = time.monotonic()
        item = message.item
        if item is not None and (
            topic in self._open or (now - topic.sent_at < BUSY_S and self._open_batch(topic))
        ):
            if len(batch.items) >= batch.room and not self._flush(topic):
                return None
            batch.items.append(item)
            return True
        if message.detached is None:
            self._look_by_and_by(now)
        else:
            self._look_now_and_then(now)
        if (batch.items and not self._flush(topic)) or not self._send(topic, message):
            return None
        topic.sent_at = now
        return True

    def send_frame(self, topic: Topic, frame: Outgoing, last: Item) -> bool | None:
        """An attempt to send a frame that is full already; `last` is the last item in it."""
        self._look_by_and_by(time.monotonic())
        return (self._flush(topic) and self._send(topic, frame, last=last)) or None

    def close_batches(self) -> bool:
        """Send what has been waiting for a window; a topic of which nothing was sent in one goes
        back to sending each message at once. False if none of them has room."""
        if self._all_young():
            return True
        blocked = 0
        with contextlib.suppress(Closed), self.link:
            self._looked_at = time.monotonic()
            self.read_subscriptions()
            for topic, frames in list(self._open.items()):
                if frames == topic.frames and not self._flush(topic):
                    blocked += frames == topic.frames  # its senders wait, and it is tried again
                elif frames == topic.frames:
                    self._shut_batch(topic)
                else:
                    self._open[topic] = topic.frames
            if not self._open:
                self._home.flusher.forget(self)
        return not blocked or blocked < len(self._open)

    def _all_young(self) -> bool:
        """Whether all that are open were closed by their senders in the last window, so that there
        is no need for the lock, which they fight for."""
        if not self._open or time.monotonic() - self._looked_at > LOOK_S_MAX:
            return False
        for topic, frames in list(self._open.items()):
            if frames == topic.frames:
                return False
            self._open[topic] = topic.frames
        return True

    def settle(self, topic: Topic, item: Item) -> None:
        """A sender appended to a batch that was shut meanwhile. Takes the lock. Raises `Closed` if
        that was too late."""
        with self.link.lock:
            if not self.link.closed:
                if topic not in self._open and not self._flush(topic):
                    self._open_batch(topic)
            elif topic.batch.withdraw(item):
                self.link.check_open()

    def _open_batch(self, topic: Topic) -> bool:
        if not self._home.flusher.watch(self):
            return False
        self._open[topic] = topic.frames
        topic.batch.begin()
        return True

    def _shut_batch(self, topic: Topic) -> None:
        topic.batch.shut()
        if self._flush(topic):  # what came until then
            del self._open[topic]
        else:
            topic.batch.begin()

    def _flush(self, topic: Topic) -> bool:
        """Send what the batch holds; False if there is no room for all of it."""
        batch = topic.batch
        while batch.items:
            items = batch.next()
            message = encode_batch(items)
            items = items[: message.count]
            if not self._send(topic, message, items, last=items[-1]):
                return False
        return True

    def _send(
        self,
        topic: Topic,
        message: Outgoing,
        items: Sequence[Item] = (),
        *,
        last: Item | None = None,
    ) -> bool:
        """Send one frame, which may hold `items` of the batch, to every transport; False if there
        is no room for it. `last`: of a frame of several messages, the last one."""
        if not self._pay(topic) or (topic.taps and self.waits and not topic.has_room()):
            return False
        seq, now, taken, held = topic.seq, time.time_ns(), False, len(items)
        for bound in self._bound:
            parts = message.parts(
                topic.wire,
                Kind.DATA,
                sender=self._home.node_id,
                seq=seq + 1,
                time_ns=now,
                flags=self._flags,
                compression=self._compression(topic, bound),
            )
            # Before it is sent: a KeyboardInterrupt between the two then shows as a gap; a number
            # given twice would make a repeat of the next message.
            topic.seq = seq + message.count
            if held:
                topic.batch.remove(held, len(message))
                held = 0
            if send_parts(bound.socket, parts):
                taken = True
                self._pad(topic, bound.socket, sum(map(len, parts)))
            elif not self.waits:
                self._send_dropping(bound.socket, parts)
                self._pad(topic, bound.socket, sum(map(len, parts)))
                self.counters.dropped["subscriber full"] += message.count
            elif taken:
                topic.owed.append((bound.socket, parts, message.count))
            else:
                topic.batch.put_back(items)  # first: interrupted between, they show as a gap
                topic.seq = seq
                return False
        if topic.taps:
            topic.tell(seq, now, message, self.waits)
        topic.frames += 1
        if topic.options.keep_last:
            topic.last = message if last is None else encode_batch([last])
            topic.last_time_ns = now
        if not topic.dirty:
            topic.dirty = True
            self._dirty[topic] = -1
        self.counters.sent += message.count
        self.counters.bytes_sent += len(message)
        return True

    def _compression(self, topic: Topic, bound: Bound) -> Compression | None:
        """None also where no subscriber is known: a networked node's topics mostly stay at home."""
        there = bound.scheme == "tcp" and self._readers.at(bound.socket)
        return topic.compression if there else None

    def _pad(self, topic: Topic, socket: Socket, size: int) -> None:
        """A frame of `size` bytes was sent: have it take the slots that it weighs."""
        pad: list[Part] = [topic.pad]
        for _ in range((size - _UNCOUNTED_BYTES) // self._home.transport.slot_bytes):
            if not send_parts(socket, pad):
                if self.waits:
                    topic.owed.append((socket, pad, 0))
                else:
                    self._send_dropping(socket, pad)

    def _send_dropping(self, socket: Socket, parts: Sequence[Part]) -> None:
        """To all who have room; the others will see the gap."""
        try:
            socket.setsockopt(zmq.XPUB_NODROP, 0)
            send_parts(socket, parts)
        finally:
            socket.setsockopt(zmq.XPUB_NODROP, 1)

    def _pay(self, topic: Topic) -> bool:
        while topic.owed:
            socket, parts, _ = topic.owed[0]
            if not send_parts(socket, parts):
                return False
            del topic.owed[0]
        return True

    # -- Subscribers -------------------------------------------------------------------------

    def look(self) -> None:
        """The sockets want to be looked at."""
        with self.link:
            self.read_subscriptions()

    def _look_by_and_by(self, now: float) -> None:
        """Looking costs more than sending, so a busy node has its flusher do that. It must not be
        left out altogether: sending swallows the descriptor's edge."""
        if now - self._looked_at < LOOK_S and self._home.flusher.watch(self):
            return
        self._looked_at = now
        self.read_subscriptions()

    def _look_now_and_then(self, now: float) -> None:
        """The same before a large message, where to wake the flusher would cost more than to look.
        Whose subscription came within a millisecond of the last look is found with the next
        message, or by the next tick."""
        if now - self._looked_at > LOOK_S:
            self._looked_at = now
            self.read_subscriptions()

    def read_subscriptions(self) -> None:
        """Take notice of who subscribed and who left, and answer the newcomers. Under the lock."""
        for bound in self._bound:
            if not has_input(bound.socket):
                continue
            while (message := _receive(bound.socket)) is not None:
                self._readers.accept(bound.socket, message)

    def marked(self, peer: int, address: str) -> None:
        """The subscriber of `peer` said over the control link that its mark has arrived."""
        with self.link:
            if self._readers.marked(peer, address.encode()):
                self.link.wake_all()

    def lost(self, peer: int) -> None:
        """That node is gone, though its connections may look alive: its host fell silent, or a
        child holds what its dead parent had. It is waited for no more."""
        with self.link:
            self.read_subscriptions()
            self._readers.lost(peer)
            self.link.wake_all()

    def subscribers(self, topic: Topic) -> int:
        """How many subscribers have their mark. Under the lock."""
        self.read_subscriptions()
        return self._readers.of(topic.name)

    # -- The rest of a core ------------------------------------------------------------------

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        raise AssertionError("subscribers connect here; this side connects to nobody")

    def detach(self, peer: int, key: int, reason: str) -> None:
        raise AssertionError("subscribers connect here; this side connects to nobody")

    def tick(self) -> None:
        """Answer whom there was no room to answer; mark the topics that were quiet for a tick."""
        with self.link:
            self._home.transport.follow(self._bound)
            self.read_subscriptions()
            self._readers.go_on_answering()
            for topic, seq in list(self._dirty.items()):
                if seq != topic.seq:
                    self._dirty[topic] = topic.seq
                elif self._pay(topic) and self._mark(topic):
                    del self._dirty[topic]
                    topic.dirty = False

    def _mark(self, topic: Topic, *, last_chance: bool = False) -> bool:
        """Tell all subscribers of a quiet topic where it stands; False if some had no room, and
        none was told (but for a `last_chance`, of those that may lose something)."""
        sender = self._home.node_id
        mark = [encode(topic.wire, Kind.MARK, b"", flags=self._flags, sender=sender, seq=topic.seq)]
        complete = True
        for bound in self._bound:
            if not send_parts(bound.socket, mark):
                complete = False
                if last_chance and not self.waits:
                    self._send_dropping(bound.socket, mark)
        return complete

    def close(self, linger_ms: int) -> None:
        """What was sent goes on its way for `linger_ms`, and where the sequences stand."""
        self.link.close(linger_ms, first=self._conclude)
        self._home.transport.release(self._bound)

    def wait_drained(self, until: Callable[[], float]) -> None:
        """Closed, and with all sent: block until the subscribers on this host have read that from
        the kernel, or that time of the monotonic clock."""
        left = self._draining.wait(until)
        if left:
            logger.warning("%d connections closed before all was read that was published", left)

    def _conclude(self) -> None:
        for topic in self._topics.values():
            topic.batch.shut()
            self._pay(topic)
            self._flush(topic)
            if left := topic.batch.give_up():
                self.counters.dropped["not sent when closed"] += left
                logger.warning("topic %r: %d messages had no room to leave", topic.name, left)
        self._home.flusher.forget(self)
        for topic in self._dirty:
            self._mark(topic, last_chance=True)
        self.read_subscriptions()
        self._draining.hold(self._readers.connections())


def _abandon(topics: dict[str, Topic], draining: Draining) -> None:
    """In a forked child: nothing is sent here, and no connection is held up."""
    for topic in topics.values():
        topic.batch.shut()
    draining.release()


def _receive(socket: Socket) -> zmq.Frame | None:
    """One subscription, which knows the connection it came by; None if there is none."""
    try:
        return socket.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
