"""The node: what a program makes to take part, and where its handles come from.

The roof over everything: it puts the parts together in the order in which they need each other, and
takes them apart again within a deadline. It decides nothing about peers or messages.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import secrets
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

from mesh import host, limits
from mesh.control_loop import ControlLoop
from mesh.discovery.interfaces import addresses_of
from mesh.discovery.local import LocalSource, runtime_directory, socket_path
from mesh.discovery.source import Source
from mesh.errors import Closed, Forked, InvalidOption, Timeout
from mesh.hooks import Hooks
from mesh.membership import Membership
from mesh.message import PeerEvent, PeerInfo, Stats, Untrusted
from mesh.names import check_node_name
from mesh.options import (
    DiscoveryName,
    NodeOptions,
    PublisherOptions,
    PullerOptions,
    ServiceOptions,
    SubscriberOptions,
    WhenFull,
    check_count,
    check_timeout,
)
from mesh.sockets.client import Client, Requests
from mesh.sockets.control import Card, Marked, Offer
from mesh.sockets.control_link import ControlLink
from mesh.sockets.curve import Keys, derive_keys
from mesh.sockets.home import Core, Counters, Home, node_text
from mesh.sockets.publisher import Publisher, Topic, Topics
from mesh.sockets.puller import Puller, Tasks
from mesh.sockets.pusher import Pusher, Workers
from mesh.sockets.server import Server
from mesh.sockets.subscriber import Subscriber, Subscription
from mesh.sockets.transport import Transport

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=Core)
Handler = TypeVar("Handler", bound=Callable[[Any], Any])

_CALL_S = 10.0
"""How long a control thread may take to answer: many times what it ever needs."""


class InsecureWarning(UserWarning):
    """A node speaks plain text on the network, because it was told to."""


class Node:
    """One participant of the mesh, usually one for each process.

    ``Node("camera-1")`` reaches nodes on this machine; with ``secret=`` also those on the network
    that know it. Every option is described in `mesh.options.NodeOptions`. Making one does not wait
    for peers. Safe from several threads; use it as a context manager, or call `close`.

    Raises `InvalidName`, `InvalidOption`, `UnsafeRuntimeDir`; `OSError` for a taken address.
    """

    def __init__(
        self,
        name: str,
        *,
        realm: str | None = None,
        secret: str | None = None,
        durable: str | None = None,
        seeds: Iterable[str] | None = None,
        discovery: Iterable[DiscoveryName] | None = None,
        interfaces: Iterable[str] | None = None,
        port: int = 0,
        insecure_lan: bool = False,
        heartbeat_s: float = 1.0,
        buffer_messages: int = limits.BUFFER_MESSAGES,
        message_bytes_max: int = limits.MESSAGE_BYTES_MAX,
    ) -> None:
        self._name = check_node_name(name)
        self._options = NodeOptions(
            realm=check_node_name(realm or os.environ.get("MESH_REALM") or "default"),
            secret=secret if secret is not None else os.environ.get("MESH_SECRET") or None,
            durable=durable,
            seeds=_strings(seeds, "seeds", os.environ.get("MESH_SEEDS")),
            discovery=None if discovery is None else _strings(discovery, "discovery"),  # type: ignore[arg-type]
            interfaces=None if interfaces is None else _strings(interfaces, "interfaces"),
            port=port,
            insecure_lan=insecure_lan,
            heartbeat_s=heartbeat_s,
            buffer_messages=buffer_messages,
            message_bytes_max=message_bytes_max,
        )
        if insecure_lan:
            warnings.warn(
                f"node {name!r} speaks plain text on the network: anybody there can read its "
                "messages and send their own",
                InsecureWarning,
                stacklevel=2,
            )
        self._parts = _Parts(self._name, self._options)
        self._finalizer = weakref.finalize(self, self._parts.close, 0.5)
        self._finalizer.atexit = False

    # -- Who it is, and who is there ---------------------------------------------------------

    @property
    def name(self) -> str:
        return self._name

    @property
    def id(self) -> str:
        """16 hexadecimal digits, new for each run of a node."""
        return self._parts.id

    @property
    def closed(self) -> bool:
        return self._parts.closed

    @property
    def peers(self) -> Mapping[str, PeerInfo]:
        """The nodes this one is connected with, by node id, as of now. Does not block."""
        return self._parts.peers

    @property
    def untrusted(self) -> Mapping[str, Untrusted]:
        """Who was seen but does not share this node's secret or protocol, by id or address."""
        return self._parts.on_loop(
            lambda: MappingProxyType({str(k): v for k, v in self._parts.untrusted().items()})
        )

    def wait_for_peers(self, count: int, *, timeout: float | None = None) -> None:
        """Block until at least `count` peers are connected. Raises `Timeout`, `Closed`."""
        self._parts.wait_for_peers(
            check_count(count, "count", 0, limits.PEERS_MAX), check_timeout(timeout)
        )

    async def await_for_peers(self, count: int, *, timeout: float | None = None) -> None:
        """`wait_for_peers` for asyncio."""
        import asyncio

        check_count(count, "count", 0, limits.PEERS_MAX)
        check_timeout(timeout)
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def tell(event: PeerEvent | None) -> None:
            loop.call_soon_threadsafe(arrived.set)

        self._parts.observers.append(tell)
        try:
            async with asyncio.timeout(timeout):
                while len(self.peers) < count:
                    self._parts.check_open()
                    await arrived.wait()
                    arrived.clear()
        except TimeoutError:
            raise Timeout(_too_few(count, len(self.peers), timeout)) from None
        finally:
            self._parts.observers.remove(tell)

    def on_peer(self, hook: Callable[[PeerEvent], object]) -> Callable[[PeerEvent], object]:
        """Have `hook` called with a `PeerEvent` for each peer that joins or leaves from now on, in
        this node's hook thread. Returns `hook`, so that it serves as a decorator."""
        self._parts.check_open()
        hooks = self._parts.hooks
        self._parts.observers.append(lambda event: event and hooks.run(hook, event))
        return hook

    def stats(self) -> Stats:
        """The node's counters since it was made: an immutable snapshot."""
        return self._parts.on_loop(self._parts.stats)

    # -- Channels ----------------------------------------------------------------------------

    def publisher(
        self, topic: str, *, when_full: WhenFull = "drop", keep_last: bool = False
    ) -> Publisher:
        """A handle to publish on `topic`. Handles to one topic share its sequence and options.

        `when_full`: ``"drop"`` (a subscriber without room loses the message, counted on both sides)
        or ``"wait"`` (the publisher waits). `keep_last`: newcomers get the last message. Raises
        `InvalidName`, `InvalidOption`, `OptionsDiffer`, `Closed`. Does not block.
        """
        parts = self._parts
        parts.check_open()
        opened = parts.topics.open(
            topic, PublisherOptions(when_full=when_full, keep_last=keep_last)
        )
        parts.loop.post(lambda: parts.offer_topic(opened))
        return Publisher(
            parts.topics, opened, self, lambda: parts.loop.post(lambda: parts.release(opened))
        )

    def subscriber(self, pattern: str, *, latest_only: bool = False) -> Subscriber:
        """A handle that receives from all topics that `pattern` matches, of all peers and of this
        node. `latest_only`: keep only the newest message of each sender and topic. Raises
        `InvalidName`, `Closed`. Does not block.
        """
        parts = self._parts
        core = Subscription(parts.home(), pattern, SubscriberOptions(latest_only=latest_only))
        parts.add(core)
        return Subscriber(core, self, parts.release_of(core))

    def pusher(self, queue: str) -> Pusher:
        """A handle to put tasks into `queue`. Raises `InvalidName`, `Closed`. Does not block."""
        parts = self._parts
        core = parts.workers(queue)
        return Pusher(core, self, lambda: parts.loop.post(lambda: parts.release_workers(core)))

    def puller(self, queue: str, *, prefetch: int = limits.PREFETCH) -> Puller:
        """A handle that takes tasks from `queue`, each exclusively. `prefetch`: how many tasks of
        any one pusher may be in its hands, the one it works on included. Raises `InvalidName`,
        `InvalidOption`, `Closed`. Does not block.
        """
        parts = self._parts
        options = PullerOptions(prefetch=prefetch)
        core = Tasks(parts.home(), queue, options, key=parts.next_key())
        parts.add(core, Offer(core.key, "pull", core.channel, core.endpoints(), options.prefetch))
        return Puller(core, self, parts.release_of(core, core.key))

    def service(
        self, name: str, *, concurrency: int = 1, backlog: int = limits.BACKLOG
    ) -> Callable[[Handler], Handler]:
        """A decorator that serves requests to `name` with the function under it, until the node is
        closed. The function takes the payload and returns the answer; it may be ``async def``, and
        then runs in the event loop that is running here, if there is one. `concurrency`: how many
        may run at once. `backlog`: how many requests may wait. Raises `InvalidName`,
        `InvalidOption`, `Closed`.
        """
        parts = self._parts
        parts.check_open()
        options = ServiceOptions(concurrency=concurrency, backlog=backlog)

        def register(handler: Handler) -> Handler:
            core = Server(parts.home(), name, handler, options)
            key = parts.next_key()
            parts.add(core, Offer(key, "serve", core.channel, core.endpoints()))
            return handler

        return register

    def client(self, service: str) -> Client:
        """A handle to call `service`; threads and tasks may share it. Raises `InvalidName`,
        `Closed`. Does not block."""
        parts = self._parts
        core = Requests(parts.home(), service)
        parts.add(core)
        return Client(core, self, parts.release_of(core))

    # -- Its end -----------------------------------------------------------------------------

    def close(self, *, timeout: float = 1.0) -> None:
        """Say goodbye, send what was accepted, and end: within about `timeout` seconds, always.

        Whoever waits on a handle gets `Closed`. Idempotent; safe from any thread.
        """
        self._parts.close(check_timeout(timeout) or 0.0)
        self._finalizer.detach()

    async def aclose(self, *, timeout: float = 1.0) -> None:
        """`close` for asyncio."""
        import asyncio

        await asyncio.to_thread(self.close, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Node {self._name!r} {self.id}{' closed' if self.closed else ''}>"


class _Parts:
    """What a node is made of. Apart from `Node`, so that a forgotten node can be collected."""

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
        self._queues: dict[str, tuple[Workers, int]] = {}
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
            self.topics = Topics(self._home)
            self.membership = Membership(
                self._card(),
                realm=options.realm,
                key=keys and keys.realm_key,
                heartbeat_s=options.heartbeat_s,
                nonce=lambda: secrets.token_bytes(16),
                same_host=_same_host,
                now=time.monotonic(),
            )
        except BaseException:
            self._transport.context.destroy(linger=0)
            raise
        self.loop = ControlLoop(
            name=name,
            membership=self.membership,
            control=self._control,
            topics=self.topics,
            sources=self._sources,
            card=self._card,
            on_peer=self._on_peer,
        )
        _alive.add(self)
        self.loop.start()

    def _make_transport(self, directory: Any, keys: Keys | None) -> Transport:
        options = self.options
        self._addresses_of = lambda: addresses_of(options.interfaces)
        return Transport(
            socket_path=lambda label: socket_path(directory, self.id, label),
            networked=options.networked,
            addresses=self._addresses_of() if options.networked else (),
            interfaces_named=options.interfaces is not None,
            keys=keys,
            heartbeat_s=options.heartbeat_s,
            buffer_messages=options.buffer_messages,
            message_bytes_max=options.message_bytes_max,
        )

    def _make_sources(self, directory: Any) -> list[Source]:
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
            self._transport.addresses = self._addresses_of()
        return Card(
            id=self.id,
            name=self.name,
            endpoints=self._control.endpoints(),
            topics=self.topics.endpoints(),
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

    def release_of(self, core: Core, *keys: int) -> Callable[[], None]:
        """What a handle calls when it is given back. Neither locks nor blocks."""

        def retire() -> None:
            if keys:
                self.loop.withdraw(*keys)
            self.loop.remove_core(core, 1000)
            self._retired.append((core.kind, core.counters))

        return lambda: self.loop.post(retire)

    def offer_topic(self, topic: Topic) -> None:
        if topic.name not in self._topic_keys:
            key = self._topic_keys[topic.name] = self.next_key()
            self.loop.offer(Offer(key, "publish", topic.name))

    def release(self, topic: Topic) -> None:
        if self.topics.release(topic) and topic.name in self._topic_keys:
            self.loop.withdraw(self._topic_keys.pop(topic.name))

    def workers(self, queue: str) -> Workers:
        """The core that all of this node's pushers to that queue share."""
        with self._lock:
            core, handles = self._queues.get(queue) or (None, 0)
            if core is None:
                core = Workers(self.home(), queue)
                core.key = self.next_key()
                self.add(core, Offer(core.key, "push", core.channel, core.endpoints()))
            self._queues[queue] = (core, handles + 1)
            return core

    def release_workers(self, core: Workers) -> None:
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
            raise Timeout(_too_few(count, len(self.peers), timeout))

    def _acknowledge(self, peer: int, address: str) -> None:
        """A subscriber of this node has its mark: tell the publisher's node."""
        self.loop.post(lambda: self.loop.send(node_text(peer), Marked(address)))

    def untrusted(self) -> Mapping[Any, Untrusted]:
        return self.membership.untrusted

    def stats(self) -> Stats:
        by_kind = [(core.kind, core.counters) for core in self.loop.wiring.cores]
        by_kind += [("topic", self.topics.counters), *self._retired]
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
            round_trip_s=MappingProxyType(dict(self.membership.round_trips())),
            peers=len(self.peers),
        )

    # -- Its end -----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closing is not None

    def check_open(self) -> None:
        if self._closing is not None:
            raise type(self._closing)(*self._closing.args)

    def on_loop(self, action: Callable[[], Any]) -> Any:
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
        for core in (*self.loop.wiring.cores, self.topics):
            core.link.abandon()
        self.loop.abandon()


_alive: weakref.WeakSet[_Parts] = weakref.WeakSet()
_abandoned: list[_Parts] = []
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


def _strings(
    values: Iterable[str] | None, option: str, default: str | None = None
) -> tuple[str, ...]:
    if values is None:
        return tuple(part.strip() for part in (default or "").split(",") if part.strip())
    if isinstance(values, str):
        raise InvalidOption(f"{option} takes several strings, not one: ({values!r},)")
    return tuple(values)


def _too_few(count: int, have: int, timeout: float | None) -> str:
    return f"no {count} peers within {timeout:g} s, only {have}"
