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
from mesh.logs import Logs
from mesh.membership import Membership
from mesh.message import PeerInfo, Stats
from mesh.options import NodeOptions, PublisherOptions, WhenFull
from mesh.presence import Presence
from mesh.sockets.control import Card, Marked, Offer
from mesh.sockets.control_link import ControlLink
from mesh.sockets.curve import Keys, derive_keys
from mesh.sockets.dispatch import Dispatch
from mesh.sockets.flusher import Flusher
from mesh.sockets.home import Core, Counters, Home, node_text
from mesh.sockets.topic import Topic
from mesh.sockets.topics import Topics
from mesh.sockets.transport import Transport

logger = logging.getLogger(__name__)

T = TypeVar("T")

MODES: tuple[WhenFull, ...] = ("drop", "wait")

_CALL_S = 10.0
"""How long a control thread may take to answer: many times what it ever needs."""
_FORGOTTEN_S = 0.5
"""The deadline of a node that nobody closed."""
_GRACE_S = 2.0
"""What closing may take over its deadline: mDNS takes up to a second to say goodbye."""

_NOBODY: Mapping[str, PeerInfo] = MappingProxyType({})


class Assembly:
    """A node's parts, joined. It outlives a forgotten `Node` just long enough to be closed."""

    def __init__(self, node: object, name: str, options: NodeOptions) -> None:
        """Begins to end once `node` is collected."""
        self.name = name
        self.options = options
        self.hooks = Hooks(name)
        self.presence = Presence()
        self._closing: Closed | None = None
        self._gone = False
        """Whether nothing of it is in use any more."""
        self._lock = threading.Lock()
        self._keys = itertools.count(1)
        self.logs = Logs(self)
        self._topic_keys: dict[str, int] = {}
        self._queues: dict[str, tuple[Dispatch, int]] = {}
        self._started_ticks = host.start_ticks(os.getpid())
        number = secrets.randbits(63) | 1
        self.id = node_text(number)
        directory = runtime_directory()
        keys = None if options.secret is None else derive_keys(options.realm, options.secret)
        self._transport = self._make_transport(directory, keys)
        undo: Callable[[], object] = self._transport.discard
        try:
            self._control = ControlLink(self._transport, number, options.port)
            self._flusher = Flusher(options.batch_window_ms / 1000)
            self._home = Home(
                number,
                self._transport,
                self._acknowledge,
                self.hooks.run,
                self._flusher,
                compress=options.compress,
            )
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
                sources=self._make_sources(directory),
                card=self._card,
                presence=self.presence,
                transport=self._transport,
                on_end=self._ended,
            )
            undo = self.loop.give_up
            _alive.add(self)
            self.loop.start()
            if options.durable is not None:
                self.logs.host(options.durable)
            self.forgotten = weakref.finalize(node, self.end, _FORGOTTEN_S)
            self.forgotten.atexit = False
        except BaseException:
            undo()
            raise

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
            buffer_bytes=options.buffer_bytes,
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

    def offer(self, offer: Offer) -> None:
        self.loop.post(lambda: self.loop.offer(offer))

    def withdraw(self, key: int) -> None:
        self.loop.post(lambda: self.loop.withdraw(key))

    # -- Cores -------------------------------------------------------------------------------

    def home(self) -> Home:
        self.check_open()
        return self._home

    def next_key(self) -> int:
        return next(self._keys)

    def add(self, core: Core, *offers: Offer) -> None:
        """A core that a handle is made for; with what it offers to others. Raises `Closed`."""
        self.loop.add(core, *offers)
        if self.closed:
            core.close(0)  # it may have come too late for the loop to close it
            self.check_open()

    def join(self, core: Core) -> None:
        """A core that something needs which is there already: also while the node closes, since
        what was begun is finished then. Raises `Closed`."""
        self.loop.add(core)
        if not self.loop.running:
            core.close(0)
            self.check_open()

    def release_of(self, core: Core) -> Callable[[], None]:
        """What a handle calls when it is given back. Neither locks nor blocks."""
        return lambda: self.loop.remove(core)

    def topic(self, name: str, options: PublisherOptions) -> Topic:
        """The topic of that name, among those that drop or those that wait. `OptionsDiffer`."""
        with self._lock:
            for mode, topics in self.topics.items():
                if mode != options.when_full and topics.is_open(name):
                    raise OptionsDiffer(f"topic {name!r} is open with when_full={mode!r}")
            topic = self.topics[options.when_full].topic(name, options)
        self.loop.post(lambda: self._offer_topic(topic))
        return topic

    def _offer_topic(self, topic: Topic) -> None:
        """Offer it while there are handles to it, and no longer."""
        waiting = topic.options.when_full == "wait"
        name = topic.name
        if topic.handles and name not in self._topic_keys:
            key = self._topic_keys[name] = self.next_key()
            endpoints = self.topics["wait"].endpoints() if waiting else ()
            self.loop.offer(Offer(key, "publish", name, endpoints))
        elif not topic.handles and name in self._topic_keys:
            self.loop.withdraw(self._topic_keys.pop(name))

    def release(self, topic: Topic) -> None:
        """A handle to it was given back. Neither locks nor blocks."""
        self.topics[topic.options.when_full].release(topic)
        self.loop.post(lambda: self._offer_topic(topic))

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

    def name_of(self, number: int) -> str:
        """What a node is called that is there, or this one."""
        peer = self.presence.peers.get(node_text(number))
        return self.name if peer is None else peer.name

    def release_workers(self, core: Dispatch) -> None:
        with self._lock:
            _, handles = self._queues[core.channel]
            if handles > 1:
                self._queues[core.channel] = (core, handles - 1)
                return
            del self._queues[core.channel]
        self.loop.remove(core)

    # -- Peers -------------------------------------------------------------------------------

    @property
    def peers(self) -> Mapping[str, PeerInfo]:
        return self.presence.peers if self._closing is None else _NOBODY

    def wait_for_peers(self, count: int, timeout: float | None) -> None:
        self.presence.wait_until(lambda: self.closed or len(self.peers) >= count, timeout)
        self.check_open()
        if len(self.peers) < count:
            raise Timeout(too_few(count, len(self.peers), timeout))

    def _acknowledge(self, peer: int, address: str, waits: bool) -> None:
        """A subscriber of this node has its mark: tell the publisher's node."""
        self.loop.post(lambda: self.loop.send(node_text(peer), Marked(address, waits)))

    def stats(self) -> Stats:
        by_kind = self.loop.counters()
        self.logs.count(by_kind)
        total = Counters()
        for counters in by_kind.values():
            total.add(counters)
        dropped = self.loop.dropped() + total.dropped
        dropped["hook events"] += self.hooks.dropped
        dropped += self.logs.dropped()
        return Stats(
            sent=MappingProxyType({kind: each.sent for kind, each in by_kind.items()}),
            received=MappingProxyType({kind: each.received for kind, each in by_kind.items()}),
            bytes_sent=total.bytes_sent,
            bytes_received=total.bytes_received,
            lost=total.lost,
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

    def end(self, timeout: float) -> None:
        """Begin to close, with that deadline. Neither locks nor blocks, so a finalizer may call it,
        in whichever thread it runs; the control thread does the rest."""
        if self._closing is None:
            self._closing = Closed(f"node {self.name!r} is closed")
        self.loop.hurry(timeout)
        self.loop.post(lambda: self._leave(timeout))

    def _leave(self, timeout: float) -> None:
        self.logs.leave()
        self.loop.leave(timeout)

    def close(self, timeout: float) -> None:
        """Begin to close, and wait until that is done. May be called again, to wait again."""
        deadline = time.monotonic() + timeout
        self.end(timeout)
        if self.loop.is_current:
            return  # some destructor of the user's was called there
        if not self.presence.wait_until(lambda: self._gone, timeout + _GRACE_S):
            logger.error("node %r: still closing after %g s", self.name, timeout + _GRACE_S)
        self.hooks.join(max(0.0, deadline - time.monotonic()))

    def _ended(self) -> None:
        """The loop has: the rest, before anybody is told."""
        try:
            self._flusher.close()
            self.logs.close()
            self.hooks.close()
            _alive.discard(self)
        finally:
            self._gone = True

    def abandon(self) -> None:
        """In a forked child: everything here is the parent's."""
        self._closing = Forked(
            f"node {self.name!r} belongs to the parent of this process; "
            "make a new Node after fork()"
        )
        self._lock = threading.Lock()
        self.logs.abandon()
        self._gone = True
        self.loop.abandon()


_alive: set[Assembly] = set()
"""Those that have not ended: their threads keep them anyway."""
_abandoned: list[Assembly] = []
"""Kept for the life of a forked child: collecting a parent's sockets there would touch them."""


def _close_all() -> None:
    """All at once, and then wait for each. No thread is started: a late interpreter has none."""
    alive = list(_alive)
    for parts in alive:
        parts.end(_FORGOTTEN_S)
    for parts in alive:
        parts.close(_FORGOTTEN_S)


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
