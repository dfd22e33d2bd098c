"""What a node is made of, put together in the order in which the parts need each other.

Apart from `mesh.node.Node`, so that a node that is forgotten can be collected: nothing here refers
to it. Also the ends that nobody asks for: the interpreter's exit, and a fork.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from mesh import host
from mesh.control_loop import ControlLoop
from mesh.discovery.interfaces import addresses_of
from mesh.discovery.local import (
    LocalSource,
    remove_socket,
    runtime_directory,
    share,
    socket_path,
)
from mesh.discovery.source import Source
from mesh.errors import Closed, Forked, OptionsDiffer, Timeout
from mesh.hooks import Hooks
from mesh.membership import Membership
from mesh.message import PeerEvent, PeerInfo, Stats
from mesh.options import NodeOptions, PublisherOptions, WhenFull
from mesh.sockets.control import Card, Marked, Offer
from mesh.sockets.control_link import ControlLink
from mesh.sockets.curve import Keys, derive_keys
from mesh.sockets.home import Core, Counters, Home, node_text
from mesh.sockets.pusher import Dispatch
from mesh.sockets.topics import Topic, Topics
from mesh.sockets.transport import Transport

logger = logging.getLogger(__name__)

T = TypeVar("T")

MODES: tuple[WhenFull, ...] = ("drop", "wait")

_CALL_S = 10.0
"""How long a control thread may take to answer: many times what it ever needs."""


class Assembly:
    """A node's parts, joined. It outlives a forgotten `Node` just long enough to be closed."""

    def __init__(self, name: str, options: NodeOptions) -> None:
        self.name = name
        self.options = options
        self.hooks = Hooks(name)
        self.observers: list[Callable[[PeerEvent | None], object]] = []
        self.peers: Mapping[str, PeerInfo] = MappingProxyType({})
        self._closing: Closed | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._keys = itertools.count(1)
        self._topic_keys: dict[str, int] = {}
        self._queues: dict[str, tuple[Dispatch, int]] = {}
        self._retired: list[tuple[str, Counters]] = []
        self._started_ticks = host.start_ticks(os.getpid())
        number = secrets.randbits(63) | 1
        self.id = node_text(number)
        directory = runtime_directory()
        keys = None if options.secret is None else derive_keys(options.realm, options.secret)
        self._transport = self._make_transport(directory, keys)
        self._sources = self._make_sources(directory)
        try:
            self._control = ControlLink(self._transport, number, options.port)
            self._home = Home(number, self._transport, self._acknowledge, self.hooks.run)
            self.topics = {mode: Topics(self._home, mode) for mode in MODES}
            self.membership = Membership(
                self._card(),
                realm=options.realm,
                key=None if keys is None else keys.realm_key,
                heartbeat_s=options.heartbeat_s,
                nonce=lambda: secrets.token_bytes(16),
                same_host=_same_host,
                now=time.monotonic(),
            )
            self.loop = ControlLoop(
                name=name,
                membership=self.membership,
                control=self._control,
                topics=tuple(self.topics.values()),
                sources=self._sources,
                card=self._card,
                on_peer=self._on_peer,
            )
            self.loop.start()
        except BaseException:
            for source in self._sources:
                source.close()
            self._transport.context.destroy(linger=0)
            raise
        _alive.add(self)

    def _make_transport(self, directory: Path, keys: Keys | None) -> Transport:
        options = self.options
        return Transport(
            socket_path=lambda label: socket_path(directory, self.id, label),
            share_path=lambda path: share(path, directory),
            remove_path=remove_socket,
            networked=options.networked,
            addresses=addresses_of(options.interfaces) if options.networked else (),
            interfaces_named=options.interfaces is not None,
            keys=keys,
            buffer_messages=options.buffer_messages,
            message_bytes_max=options.message_bytes_max,
        )

    def _make_sources(self, directory: Path) -> list[Source]:
        sources: list[Source] = []
        if "local" in self.options.sources:
            sources.append(LocalSource(directory))
        if "mdns" in self.options.sources:
            from mesh.discovery.mdns import MdnsSource

            sources.append(MdnsSource(self.options.interfaces))
        if self.options.seeds:
            from mesh.discovery.seeds import SeedsSource

            sources.append(SeedsSource(self.options.seeds))
        return sources

    def _card(self) -> Card:
        """Who this node is, as of now: its addresses may change."""
        if self.options.networked:
            self._transport.addresses = addresses_of(self.options.interfaces)
            self._control.follow()
        return Card(
            id=self.id,
            name=self.name,
            endpoints=self._control.endpoints(),
            topics=self.topics["drop"].endpoints(),
            boot=host.boot_id(),
            pid=os.getpid(),
            pid_space=host.pid_space(),
            started=self._started_ticks,
        )

    # -- Cores -------------------------------------------------------------------------------

    def home(self) -> Home:
        self.check_open()
        return self._home

    def next_key(self) -> int:
        return next(self._keys)

    def add(self, core: Core, *offers: Offer) -> None:
        """A core that a handle was made for; with what it offers to others."""

        def action() -> None:
            self.loop.add_core(core)
            if offers:
                self.loop.offer(*offers)

        self.loop.post(action)
        if self.closed:
            core.close(0)  # the action may have come too late for the loop to know of the core

    def release_of(self, core: Core, *keys: int) -> Callable[[], None]:
        """What a handle calls when it is given back. Neither locks nor blocks."""

        def retire() -> None:
            if keys:
                self.loop.withdraw(*keys)
            self.loop.remove_core(core, 1000)
            self._retired.append((core.kind, core.counters))

        return lambda: self.loop.post(retire)

    def topic(self, name: str, options: PublisherOptions) -> Topic:
        """The topic of that name, among those that drop or those that wait. `OptionsDiffer`."""
        for mode, topics in self.topics.items():
            if mode != options.when_full and topics.is_open(name):
                raise OptionsDiffer(f"topic {name!r} is open with when_full={mode!r}")
        topic = self.topics[options.when_full].topic(name, options)
        self.loop.post(lambda: self._offer_topic(topic))
        return topic

    def _offer_topic(self, topic: Topic) -> None:
        if topic.name not in self._topic_keys:
            key = self._topic_keys[topic.name] = self.next_key()
            waiting = topic.options.when_full == "wait"
            endpoints = self.topics["wait"].endpoints() if waiting else ()
            self.loop.offer(Offer(key, "publish", topic.name, endpoints))

    def release(self, topic: Topic) -> None:
        if self.topics[topic.options.when_full].release(topic) and topic.name in self._topic_keys:
            self.loop.withdraw(self._topic_keys.pop(topic.name))

    def workers(self, queue: str) -> Dispatch:
        """The core that all of this node's pushers to that queue share."""
        with self._lock:
            core, handles = self._queues.get(queue) or (None, 0)
            if core is None:
                core = Dispatch(self.home(), queue)
                core.key = self.next_key()
                self.add(core, Offer(core.key, "push", core.channel, core.endpoints()))
            self._queues[queue] = (core, handles + 1)
            return core

    def release_workers(self, core: Dispatch) -> None:
        with self._lock:
            _, handles = self._queues[core.channel]
            if handles > 1:
                self._queues[core.channel] = (core, handles - 1)
                return
            del self._queues[core.channel]
        self.release_of(core, core.key)()

    # -- Peers -------------------------------------------------------------------------------

    def _on_peer(self, event: PeerEvent) -> None:
        peers = dict(self.peers)
        if event.kind == "joined":
            peers[event.peer.id] = event.peer
        else:
            peers.pop(event.peer.id, None)
        self.peers = MappingProxyType(peers)
        self._tell(event)

    def _tell(self, event: PeerEvent | None) -> None:
        with self._changed:
            self._changed.notify_all()
        for observer in tuple(self.observers):
            observer(event)

    def wait_for_peers(self, count: int, timeout: float | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.closed or len(self.peers) >= count, timeout)
        self.check_open()
        if len(self.peers) < count:
            raise Timeout(too_few(count, len(self.peers), timeout))

    def _acknowledge(self, peer: int, address: str, waits: bool) -> None:
        """A subscriber of this node has its mark: tell the publisher's node."""
        self.loop.post(lambda: self.loop.send(node_text(peer), Marked(address, waits)))

    def stats(self) -> Stats:
        by_kind = [(core.kind, core.counters) for core in self.loop.wiring.cores]
        by_kind += [("topic", topics.counters) for topics in self.topics.values()]
        by_kind += self._retired
        sent: Counter[str] = Counter()
        received: Counter[str] = Counter()
        dropped = self.loop.dropped() + Counter({"hook events": self.hooks.dropped})
        for kind, counters in by_kind:
            sent[kind] += counters.sent
            received[kind] += counters.received
            dropped += counters.dropped
        return Stats(
            sent=MappingProxyType(dict(sent)),
            received=MappingProxyType(dict(received)),
            bytes_sent=sum(counters.bytes_sent for _, counters in by_kind),
            bytes_received=sum(counters.bytes_received for _, counters in by_kind),
            lost=sum(counters.lost for _, counters in by_kind),
            dropped=MappingProxyType({k: v for k, v in dropped.items() if v}),
            round_trip_s=MappingProxyType(dict(self.membership.round_trip_s)),
            peers=len(self.peers),
        )

    # -- Its end -----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closing is not None

    def check_open(self) -> None:
        if self._closing is not None:
            raise type(self._closing)(*self._closing.args)

    def on_loop(self, action: Callable[[], T]) -> T:
        self.check_open()
        return self.loop.call(action, _CALL_S)

    def close(self, timeout: float) -> None:
        with self._lock:
            if self._closing is not None:
                return
            self._closing = Closed(f"node {self.name!r} is closed")
        _alive.discard(self)
        self._tell(None)
        linger_ms = round(timeout * 1000)
        self.loop.post(lambda: self.loop.leave(linger_ms))
        self.hooks.close(timeout)
        if not self.loop.join(timeout + 2.0):
            logger.error("node %r: its control thread did not end within %g s", self.name, timeout)
            return
        ending = threading.Thread(
            target=self._transport.close, name=f"mesh close {self.name}", daemon=True
        )
        ending.start()
        ending.join(timeout + 0.5)
        if ending.is_alive():
            logger.error("node %r: sockets still open %g s after closing", self.name, timeout)

    def abandon(self) -> None:
        """In a forked child: everything here is the parent's."""
        self._closing = Forked(
            f"node {self.name!r} belongs to the parent of this process; "
            "make a new Node after fork()"
        )
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        for core in self.loop.wiring.cores:
            core.link.abandon()
        for topics in self.topics.values():
            topics.link.abandon()
        self.loop.abandon()


_alive: weakref.WeakSet[Assembly] = weakref.WeakSet()
_abandoned: list[Assembly] = []
"""Kept for the life of a forked child: collecting a parent's sockets there would touch them."""


def _close_all() -> None:
    for parts in list(_alive):
        parts.close(0.5)


def _abandon_all() -> None:
    for parts in list(_alive):
        parts.abandon()
        _abandoned.append(parts)
    _alive.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_abandon_all)


def _same_host(card: Card) -> bool:
    """Whether a peer's ipc sockets are there to connect to."""
    if not card.boot or card.boot != host.boot_id():
        return False
    paths = [e.removeprefix("ipc://") for e in card.endpoints if e.startswith("ipc://")]
    return any(os.path.exists(path) for path in paths)


def too_few(count: int, have: int, timeout: float | None) -> str:
    """The text of a `Timeout` of waiting for peers."""
    return f"no {count} peers within {timeout:g} s, only {have}"
