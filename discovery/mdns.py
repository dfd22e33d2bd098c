"""Nodes of one network find each other by multicast DNS (RFC 6762, RFC 6763).

One record per node, ``<id>._zmq-mesh._tcp.local.``: port and addresses in SRV and A, all else in
TXT. A thread of the source's own runs zeroconf and its event loop; nobody ever waits for it. What
it cannot do is logged and counted, since a node without mDNS still has its other sources.

Must not know: whom to believe. Every packet can be forged, so what is told here is a hint.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mesh import limits
from mesh.discovery.interfaces import addresses_of
from mesh.discovery.outbox import WATCHED_INTERVAL_S, Outbox
from mesh.discovery.plausible import is_node_id, is_plausible, parse_tcp
from mesh.discovery.source import Announcement, Sighting

if TYPE_CHECKING:
    # At run time only the source's thread imports these: 115 ms that no node waits for.
    import asyncio

    from zeroconf import ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

SERVICE_TYPE: Final = "_zmq-mesh._tcp.local."

_RECORD_VERSION: Final = b"1"
_CLOSE_S: Final = 0.9
_ANSWER_MS: Final = 3000
"""How long a record that came without its address is asked for it."""

_log = logging.getLogger(__name__)


class MdnsSource:
    """The source ``mdns``.

    `interfaces` holds names or IPv4 addresses; ``None``: all interfaces but the loopback.
    """

    name = "mdns"

    def __init__(self, interfaces: tuple[str, ...] | None = None) -> None:
        self.ignored = 0
        """Records that were malformed, or one too many at a time."""
        self.failures = 0
        """How often mDNS could not be spoken; `update` makes it try again."""
        self.error: Exception | None = None
        """Why, the last time; ``None`` while it works."""
        self._interfaces = interfaces
        self._outbox: Outbox | None = None
        self._thread: threading.Thread | None = None
        self._own: Announcement | None = None
        self._closing = False
        self._told = threading.Event()
        """The caller wants something: for while the thread has no event loop."""
        self._wake: Callable[[], object] | None = None
        """Tells the event loop the same."""
        self._lock = threading.Lock()
        """Guards `_wake`, so that it never reaches a loop that has ended."""

    def start(self, own: Announcement) -> None:
        """Begin to announce and to look, in a thread; returns at once."""
        self._outbox = Outbox()
        self._own = own
        self._thread = threading.Thread(target=self._run, name="mesh-mdns", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """A descriptor that is readable while there is something new."""
        return self._outbox.fileno() if self._outbox else -1

    @property
    def interval_s(self) -> float:
        """Seconds; the descriptor tells sooner."""
        return WATCHED_INTERVAL_S

    def sightings(self) -> list[Sighting]:
        """What was announced or withdrawn since the last call."""
        return self._outbox.take() if self._outbox else []

    def update(self, own: Announcement) -> None:
        """Announce `own` instead, on the interfaces there are now; returns at once."""
        self._own = own
        self._tell()

    def close(self) -> None:
        """Say goodbye on the network and end the thread, within a second."""
        self._closing = True
        self._tell()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
        if self._outbox is not None:
            self._outbox.close()

    def _tell(self) -> None:
        self._told.set()
        with self._lock:
            if self._wake is not None:
                self._wake()

    def _run(self) -> None:
        """What the thread does."""
        while not self._closing:
            self._told.clear()
            try:
                import asyncio

                asyncio.run(self._speak())
            except Exception as error:  # noqa: BLE001 - a node must survive its network
                self.failures += 1
                self.error = error
                _log.warning("mDNS does not work here: %r", error)
                # What is wrong is the network, so it is tried again when that has changed.
                self._told.wait()

    async def _speak(self) -> None:
        """Announce and look, until the source is closed."""
        import asyncio

        from zeroconf import IPVersion
        from zeroconf.asyncio import AsyncZeroconf

        loop, told = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._wake = lambda: loop.call_soon_threadsafe(told.set)
        try:
            if self._closing:  # before there was anything to wake
                return
            addresses = list(addresses_of(self._interfaces))
            zeroconf = AsyncZeroconf(interfaces=addresses, ip_version=IPVersion.V4Only)
            try:
                await self._announce_and_look(zeroconf, told)
            finally:
                await zeroconf.async_close()
        finally:
            with self._lock:
                self._wake = None

    async def _announce_and_look(self, zeroconf: AsyncZeroconf, told: asyncio.Event) -> None:
        from mesh.discovery.browser import Browser

        assert self._own is not None
        announcer, listener = _Announcer(zeroconf.zeroconf), _Listener(self._own.id, self._put)
        await announcer.announce(self._own)
        browser = Browser(zeroconf.zeroconf, SERVICE_TYPE, listener)
        browser.start()
        try:
            self.error = None
            while True:
                await told.wait()
                told.clear()
                if self._closing:
                    return
                # In this order, since a new interface is told at once what is announced by then.
                await announcer.announce(self._own)
                await zeroconf.async_update_interfaces(list(addresses_of(self._interfaces)))
                browser.ask()
        finally:
            browser.cancel()
            listener.close()
            announcer.withdraw()

    def _put(self, sighting: Sighting | None) -> bool:
        """Pass `sighting` on; None: a record that nothing could be made of. False: it is lost."""
        assert self._outbox is not None
        if sighting is not None and self._outbox.put(sighting.announcement.id, sighting):
            return True
        self.ignored += 1
        return False


class _Announcer:
    """Keeps this node's record on the network. Lives in the event loop."""

    def __init__(self, zeroconf: Zeroconf) -> None:
        self._zeroconf = zeroconf
        self._announced = False
        self._serials = itertools.count()
        self._repeating: asyncio.Future[object] | None = None

    async def announce(self, own: Announcement) -> None:
        """Put the record of `own` in place of the last one; without a tcp address there is none."""
        import asyncio

        record = make_record(own, next(self._serials))
        if record is None:
            self.withdraw()
            return
        self._stop_repeating()
        if self._announced:
            repeating = await self._zeroconf.async_update_service(record)
        else:
            # To ask first whether the name is free takes 1.6 s, and the id is random.
            repeating = await self._zeroconf.async_register_service(
                record, cooperating_responders=True
            )
        self._repeating = asyncio.ensure_future(repeating)
        self._announced = True

    def withdraw(self) -> None:
        """Say goodbye, once: to repeat it as zeroconf does would take 0.25 s of every `close`.

        Where it is lost, those who knew the node keep its address and dial it in vain.
        """
        self._stop_repeating()
        if goodbye := self._zeroconf.generate_unregister_all_services():
            self._zeroconf.async_send(goodbye)
        self._announced = False

    def _stop_repeating(self) -> None:
        """An announcement is sent three times; an older one must not follow a newer."""
        if self._repeating is not None:
            self._repeating.cancel()


class _Listener:
    """Makes sightings of what others announce. Lives in the event loop, and never blocks it."""

    def __init__(self, own_id: str, put: Callable[[Sighting | None], bool]) -> None:
        self._own_id = own_id
        self._put = put
        self._known: dict[str, Announcement] = {}
        """What was passed on, by node id."""
        self._asking: dict[str, asyncio.Task[None]] = {}

    def on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """The browser's handler: a record came, changed or went."""
        from zeroconf import ServiceStateChange
        from zeroconf.asyncio import AsyncServiceInfo

        node_id = name.removesuffix(f".{service_type}")
        if node_id == self._own_id:
            return
        if not is_node_id(node_id):
            self._put(None)
        elif state_change is ServiceStateChange.Removed:
            self._withdrawn(node_id)
        else:
            record = AsyncServiceInfo(service_type, name)
            if record.load_from_cache(zeroconf):
                self._announced(node_id, record)
            elif node_id not in self._asking:
                self._ask(node_id, record, zeroconf)

    def on_names(self, zeroconf: Zeroconf, service_type: str, names: set[str]) -> None:
        """All there are: a goodbye may have gone unheard, or a sighting been refused."""
        from zeroconf import ServiceStateChange

        there = {name.removesuffix(f".{service_type}"): name for name in names}
        for node_id in self._known.keys() - there.keys():
            self._withdrawn(node_id)
        for node_id in there.keys() - self._known.keys():
            self.on_change(zeroconf, service_type, there[node_id], ServiceStateChange.Added)

    def close(self) -> None:
        """Stop asking."""
        for task in self._asking.values():
            task.cancel()

    def _withdrawn(self, node_id: str) -> None:
        if task := self._asking.pop(node_id, None):
            task.cancel()
        # Also of one that this has forgotten: whoever was told of it may not have.
        announcement = self._known.pop(node_id, None) or Announcement(node_id, "", "", ())
        self._put(Sighting(MdnsSource.name, announcement, False))

    def _announced(self, node_id: str, record: AsyncServiceInfo) -> None:
        announcement = read_record(node_id, record)
        if announcement is None:
            self._put(None)
        elif self._known.get(node_id) == announcement:
            return
        elif self._put(Sighting(MdnsSource.name, announcement, True)):
            self._known[node_id] = announcement
            if len(self._known) > limits.SIGHTINGS_MAX:
                # All that a flood costs older ones is to be told again.
                del self._known[next(iter(self._known))]

    def _ask(self, node_id: str, record: AsyncServiceInfo, zeroconf: Zeroconf) -> None:
        """Ask for what the record came without. Rare: nodes send all of it in one packet."""
        import asyncio

        async def ask() -> None:
            if await record.async_request(zeroconf, _ANSWER_MS):
                self._announced(node_id, record)
            else:
                self._put(None)

        def forget(asked: asyncio.Task[None]) -> None:
            if self._asking.get(node_id) is asked:
                del self._asking[node_id]

        if len(self._asking) >= limits.RESOLVING_MAX:
            self._put(None)
            return
        task = asyncio.get_running_loop().create_task(ask())
        task.add_done_callback(forget)
        self._asking[node_id] = task


def make_record(own: Announcement, serial: int) -> AsyncServiceInfo | None:
    """The record of `own`; None if it has no tcp endpoint.

    All addresses have one port, as SRV holds one. Each record of a node has another `serial`, and
    so another host name: listeners keep the old addresses of a name for a second after the new have
    come, and would take both for true.
    """
    from zeroconf.asyncio import AsyncServiceInfo

    reached = [pair for pair in map(parse_tcp, own.endpoints) if pair]
    if not reached:
        return None
    port = reached[0][1]
    return AsyncServiceInfo(
        SERVICE_TYPE,
        f"{own.id}.{SERVICE_TYPE}",
        port=port,
        server=f"{own.id}-{serial}.local.",
        parsed_addresses=[address for address, its_port in reached if its_port == port],
        properties={
            b"v": _RECORD_VERSION,
            b"name": own.name.encode(),
            b"realm": own.realm.encode(),
            b"tag": own.tag.encode(),
        },
    )


def read_record(node_id: str, record: AsyncServiceInfo) -> Announcement | None:
    """What a record from the network says; None if a part is missing or malformed."""
    from zeroconf import IPVersion

    text = record.properties
    if text.get(b"v") != _RECORD_VERSION:
        return None
    endpoints = [
        f"tcp://{address}:{record.port}"
        for address in record.parsed_addresses(IPVersion.V4Only)[: limits.ENDPOINTS_MAX]
    ]
    try:
        announcement = Announcement(
            id=node_id,
            name=(text.get(b"name") or b"").decode(),
            realm=(text.get(b"realm") or b"").decode(),
            endpoints=tuple(sorted(filter(parse_tcp, endpoints))),
            tag=(text.get(b"tag") or b"").decode(),
        )
    except UnicodeDecodeError:
        return None
    return announcement if announcement.endpoints and is_plausible(announcement) else None
