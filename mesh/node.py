"""The node: what a program makes to take part, and where its handles come from.

The roof over everything, and only that: each method checks its arguments and asks the parts
(`mesh.assembly`). It decides nothing about peers or messages.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from mesh import limits
from mesh.assembly import Assembly, too_few
from mesh.errors import InvalidOption, Timeout
from mesh.message import PeerEvent, PeerInfo, Stats, Untrusted
from mesh.names import check_name, check_node_name
from mesh.options import (
    DiscoveryName,
    NodeOptions,
    PublisherOptions,
    PullerOptions,
    ServiceOptions,
    StreamOptions,
    SubscriberOptions,
    WhenFull,
    check_count,
    check_function,
    check_strings,
    check_timeout,
)
from mesh.sockets.calls import Requests
from mesh.sockets.client import Client
from mesh.sockets.control import Offer
from mesh.sockets.publisher import Publisher
from mesh.sockets.puller import Intake, Puller
from mesh.sockets.pusher import Pusher
from mesh.sockets.repairing import RepairingSubscription
from mesh.sockets.server import Server
from mesh.sockets.subscriber import Subscriber
from mesh.sockets.subscription import Subscription

if TYPE_CHECKING:
    from mesh.durable.recording import Recording
    from mesh.durable.stream import Stream

Handler = TypeVar("Handler", bound=Callable[[Any], Any])


class InsecureWarning(UserWarning):
    """A node speaks plain text on the network, because it was told to."""


class Node:
    """One participant of the mesh, usually one for each process.

    ``Node("camera-1")`` reaches nodes on this machine; with ``secret=`` also those on the network
    that know it. Every option is described in `mesh.options.NodeOptions`. Making one does not wait
    for peers. Safe from several threads; use it as a context manager, or call `close`.

    Raises `InvalidName`, `InvalidOption`, `UnsafeRuntimeDir`; `LogLocked`, `LogDamaged` or
    `StorageFailed` if there cannot be a log in the directory `durable`; `OSError` (``EADDRINUSE``)
    for a `port` that is taken.
    """

    def __init__(
        self,
        name: str,
        *,
        realm: str | None = None,
        secret: str | None = None,
        durable: str | os.PathLike[str] | None = None,
        seeds: Iterable[str] | None = None,
        discovery: Iterable[DiscoveryName] | None = None,
        interfaces: Iterable[str] | None = None,
        port: int = 0,
        insecure_lan: bool = False,
        heartbeat_s: float = 1.0,
        buffer_messages: int = limits.BUFFER_MESSAGES,
        buffer_bytes: int = limits.BUFFER_BYTES,
        message_bytes_max: int = limits.MESSAGE_BYTES_MAX,
        batch_window_ms: float = limits.BATCH_WINDOW_MS,
        compress: bool = True,
    ) -> None:
        self._name = check_node_name(name)
        self._options = NodeOptions(
            realm=check_node_name(
                os.environ.get("MESH_REALM") or "default" if realm is None else realm, "realm"
            ),
            secret=secret if secret is not None else os.environ.get("MESH_SECRET") or None,
            durable=os.fspath(durable) if isinstance(durable, os.PathLike) else durable,
            seeds=_strings(seeds, "seeds", os.environ.get("MESH_SEEDS")),
            discovery=None if discovery is None else _strings(discovery, "discovery"),  # type: ignore[arg-type]
            interfaces=None if interfaces is None else _strings(interfaces, "interfaces"),
            port=port,
            insecure_lan=insecure_lan,
            heartbeat_s=heartbeat_s,
            buffer_messages=buffer_messages,
            buffer_bytes=buffer_bytes,
            message_bytes_max=message_bytes_max,
            batch_window_ms=batch_window_ms,
            compress=compress,
        )
        if insecure_lan:
            warnings.warn(
                f"node {name!r} speaks plain text on the network: anybody there can read its "
                "messages and send their own",
                InsecureWarning,
                stacklevel=2,
            )
        self._parts = Assembly(self, self._name, self._options)

    # -- Who it is, and who is there ---------------------------------------------------------

    @property
    def name(self) -> str:
        """The label it was made with; need not be unique."""
        return self._name

    @property
    def id(self) -> str:
        """16 hexadecimal digits, new for each run of a node."""
        return self._parts.id

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a forked child of the node's process."""
        return self._parts.closed

    @property
    def peers(self) -> Mapping[str, PeerInfo]:
        """The nodes this one is connected with, by node id, as of now. Does not block."""
        return self._parts.peers

    @property
    def untrusted(self) -> Mapping[str, Untrusted]:
        """Who was seen but does not share this node's secret or protocol, by id or address."""
        return self._parts.on_loop(lambda: MappingProxyType(dict(self._parts.membership.untrusted)))

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
            with contextlib.suppress(RuntimeError):  # the loop was closed under its coroutines
                loop.call_soon_threadsafe(arrived.set)

        self._parts.presence.observers.append(tell)
        try:
            async with asyncio.timeout(timeout):
                while len(self.peers) < count:
                    self._parts.check_open()
                    await arrived.wait()
                    arrived.clear()
        except TimeoutError:
            raise Timeout(too_few(count, len(self.peers), timeout)) from None
        finally:
            self._parts.presence.observers.remove(tell)

    def on_peer(self, hook: Callable[[PeerEvent], object]) -> Callable[[PeerEvent], object]:
        """Have `hook` called with a `PeerEvent` for each peer that is here already, as ``joined``,
        and for each that joins or leaves from now on, in this node's hook thread. Returns `hook`,
        so that it serves as a decorator. Raises `InvalidOption`, `Closed`."""
        check_function(hook, "on_peer")
        hooks = self._parts.hooks

        def tell(event: PeerEvent | None) -> None:
            if event is not None:
                hooks.run(hook, event)

        self._parts.on_loop(lambda: self._parts.presence.observe(tell))
        return hook

    def stats(self) -> Stats:
        """The node's counters since it was made: an immutable snapshot."""
        return self._parts.on_loop(self._parts.stats)

    # -- Channels ----------------------------------------------------------------------------

    def publisher(
        self, topic: str, *, when_full: WhenFull = "drop", keep_last: bool = False
    ) -> Publisher:
        """A handle to publish on `topic`. Handles to one topic share its sequence and options.

        `when_full`: ``"drop"`` (a subscriber without room loses the message, and counts it)
        or ``"wait"`` (the publisher waits). `keep_last`: newcomers get the last message. Raises
        `InvalidName`, `InvalidOption`, `OptionsDiffer`, `Closed`. Does not block.
        """
        check_name(topic)
        parts = self._parts
        parts.check_open()
        opened = parts.topic(topic, PublisherOptions(when_full=when_full, keep_last=keep_last))
        return Publisher(parts.topics[when_full], opened, self, lambda: parts.release(opened))

    def subscriber(
        self,
        pattern: str,
        *,
        latest_only: bool = False,
        views: bool = False,
        repair: bool = False,
        repair_timeout: float = 5.0,
    ) -> Subscriber:
        """A handle that receives from all topics that `pattern` matches, of all peers and of this
        node. `latest_only`: keep only the newest message of each sender and topic. `views`: large
        payloads of `bytes` arrive as a read-only `memoryview`, without a copy.

        `repair`: what was missed is fetched from where its publisher's node has recorded it
        (`record`), and comes in its place; a sender's later messages on that topic wait for it. A
        gap of which nothing was found for `repair_timeout` seconds is counted as lost. Not together
        with `latest_only`. Raises `InvalidName`, `InvalidOption`, `Closed`. Does not block.
        """
        parts = self._parts
        options = SubscriberOptions(
            latest_only=latest_only, views=views, repair=repair, repair_timeout_s=repair_timeout
        )
        core: Subscription
        if repair:
            repairer = parts.logs.repairer()
            core = RepairingSubscription(
                parts.home(), pattern, options, repairer.wanted, repairer.room
            )
        else:
            core = Subscription(parts.home(), pattern, options)
        parts.add(core)
        return Subscriber(core, self, parts.release_of(core))

    def pusher(self, queue: str) -> Pusher:
        """A handle to put tasks into `queue`. Raises `InvalidName`, `Closed`. Does not block."""
        check_name(queue)
        parts = self._parts
        core = parts.workers(queue)
        return Pusher(core, self, lambda: parts.loop.post(lambda: parts.release_workers(core)))

    def puller(self, queue: str, *, prefetch: int = limits.PREFETCH, views: bool = False) -> Puller:
        """A handle that takes tasks from `queue`, each exclusively. `prefetch`: how many tasks of
        any one pusher may be in its hands, the one it works on included. `views`: large payloads of
        `bytes` arrive as a read-only `memoryview`, without a copy. Raises `InvalidName`,
        `InvalidOption`, `Closed`. Does not block.
        """
        parts = self._parts
        options = PullerOptions(prefetch=prefetch, views=views)
        core = Intake(parts.home(), queue, options)
        core.key = parts.next_key()
        parts.add(core, Offer(core.key, "pull", core.channel, core.endpoints(), options.prefetch))
        return Puller(core, self, parts.release_of(core))

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
        check_name(name)
        options = ServiceOptions(concurrency=concurrency, backlog=backlog)

        def register(handler: Handler) -> Handler:
            check_function(handler, f"service {name!r}")
            core = Server(parts.home(), name, handler, options)
            key = parts.next_key()
            core.on_end = parts.release_of(core)
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

    def stream(
        self,
        name: str,
        *,
        producer: str | None = None,
        home: str | None = None,
        when_full: Literal["refuse", "wait"] = "refuse",
        options: StreamOptions | None = None,
    ) -> Stream:
        """A handle to the stream `name`: to append to it, replay it and consume it. The stream is
        made by its first append, at the sidecar that gets that.

        `producer`: the name that its sequence is kept under across runs; one run at a time may
        write under it. None: a new producer. `home`: the sidecar that all appends go to, by its
        partition or by the name of its node; the first append settles which, for good. None: the
        nearest. `when_full`: whether an append that the log has no room for is refused (`LogFull`),
        or waits until there is some. `options`: how the stream is kept, where it is made; where it
        is there already they have to be the same. Raises `InvalidName`, `InvalidOption`, `Closed`.
        Does not block.
        """
        from mesh.durable.stream import Stream  # programs without a stream do without its parts

        check_name(name)
        if home is not None:
            check_node_name(home, "home")
        parts = self._parts
        parts.check_open()
        if when_full not in ("refuse", "wait"):
            raise InvalidOption(f"when_full must be 'refuse' or 'wait', not {when_full!r}")
        if not isinstance(options, StreamOptions | None):
            raise InvalidOption(f"options must be StreamOptions or None, not {options!r}")
        waits = when_full == "wait"
        return Stream(
            parts.logs.streams(), name, options, producer, home, waits, self, lambda: None
        )

    def record(self, pattern: str, *, into: str) -> Recording:
        """Record what this node publishes from now on, on topics that `pattern` matches, in the
        stream `into`, at the nearest sidecar (this node's own, if it has one). What is recorded
        says which message it was: `Record.origin`. It goes on until the `Recording` is closed, or
        the node; forgetting it ends nothing.

        Publishing does not wait for that. Messages that there is no room for, 64 MiB of them
        waiting or the log being full, are counted as `Recording.lost`; topics with
        ``when_full="wait"`` wait instead. Subscribers with ``repair=True`` fill their gaps from it.
        Raises `InvalidName`, `InvalidOption` (too many), `Closed`. Does not block.
        """
        return self._parts.logs.recordings().record(pattern, into, self)

    # -- Its end -----------------------------------------------------------------------------

    def close(self, *, timeout: float = 1.0) -> None:
        """Answer the requests that are running, send what was accepted, have it recorded where it
        is to be, finish what streams have under way (appends that nobody waits for, and what was
        said of records), say goodbye, give the subscribers on this host that time to read what was
        published, and end: within about `timeout` seconds, always. What is not finished by then is
        logged.

        Whoever waits on a handle gets `Closed`. Called again, also after a Ctrl-C, it waits for the
        end again, with the earlier of the deadlines. Safe from any thread. Raises `InvalidOption`
        for a `timeout` of None: closing does not wait for ever.
        """
        if (deadline := check_timeout(timeout)) is None:
            raise InvalidOption("close takes a timeout in seconds, not None: it always ends")
        self._parts.close(deadline)
        self._parts.forgotten.detach()

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


def _strings(
    values: Iterable[str] | None, option: str, default: str | None = None
) -> tuple[str, ...]:
    if values is None:
        return tuple(part.strip() for part in (default or "").split(",") if part.strip())
    return check_strings(values, option)
