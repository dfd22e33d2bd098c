"""What mDNS hears of one type of service: its records as they come, change and go.

In place of the browser of zeroconf 0.154, which keeps a timer for every name it ever heard, made up
or not: 50,000 forged ones cost 14 MiB within 16 s, and there was no end to it. This one remembers
nothing. What was heard is in zeroconf's cache, which is bounded, and one question from time to time
keeps all of it fresh (RFC 6762, section 5.2).

Only the thread of `mesh.discovery.mdns` imports this, since it imports zeroconf.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from itertools import islice
from typing import Final, Protocol

from zeroconf import (  # type: ignore[attr-defined]  # all it exports, but not all in __all__
    DNSAddress,
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    RecordUpdate,
    RecordUpdateListener,
    ServiceStateChange,
    Zeroconf,
    current_time_millis,
)

from mesh import limits

_PTR: Final = 12
_IN: Final = 1
_QUERY: Final = 0
"""RFC 1035: section 3.2.2, section 3.2.4, and the header of section 4.1.1."""

_FIRST_S: Final = (0.02, 0.12)
"""Before the first question: nodes that start together must not ask together."""
_START_S: Final = (1.0, 4.0, 9.0)
"""Before each of the next, in case packets were lost."""
_REFRESH_S: Final = 900.0
"""Before each of the others. A pointer lives for 4500 s, and its owner answers once half of that is
over, so two answers may be lost."""


class Hearer(Protocol):
    """Who is told. Called in the event loop."""

    def on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """A record of the service `name` came, changed or went."""

    def on_names(self, zeroconf: Zeroconf, service_type: str, names: set[str]) -> None:
        """All there are, from time to time: a flood may have cost a change of which to tell."""


class Browser(RecordUpdateListener):
    """Asks for services of `service_type` (``_TYPE._tcp.local.``), and tells of all it hears."""

    def __init__(self, zeroconf: Zeroconf, service_type: str, hearer: Hearer) -> None:
        self._zeroconf = zeroconf
        self._type = service_type
        self._hearer = hearer
        self._changes: dict[str, ServiceStateChange] = {}
        """Of the packet that is being read."""
        self._asking: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Tell of what the cache has, and of what comes."""
        self._zeroconf.async_add_listener(self, DNSQuestion(self._type, _PTR, _IN))
        self.ask()

    def ask(self) -> None:
        """Ask as if for the first time: there may be others to hear it than before."""
        if self._asking is not None:
            self._asking.cancel()
        self._asking = asyncio.ensure_future(self._ask())

    def cancel(self) -> None:
        """Neither ask nor tell any more."""
        if self._asking is not None:
            self._asking.cancel()
        self._zeroconf.async_remove_listener(self)

    def names(self) -> set[str]:
        """The services that the cache has."""
        return {pointer.alias for pointer in self._pointers()}

    # What zeroconf calls, in the event loop

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        """Records came, or are about to go. The cache does not have them yet."""
        for update in records:
            record, is_new = update.new, update.old is None
            if isinstance(record, DNSPointer):
                if record.name.lower() == self._type and record.is_expired(now):
                    self._changes.setdefault(record.alias, ServiceStateChange.Removed)
                elif record.name.lower() == self._type and is_new:
                    self._changes[record.alias] = ServiceStateChange.Added
            elif is_new and not record.is_expired(now):
                names = [record.name]
                if isinstance(record, DNSAddress):
                    services = zc.cache.async_entries_with_server(record.name)
                    names = [service.name for service in services]
                for name in names:
                    if name.lower().endswith(f".{self._type}"):
                        self._changes.setdefault(name, ServiceStateChange.Updated)

    def async_update_records_complete(self) -> None:
        """The cache has them now."""
        changes, self._changes = self._changes, {}
        for name, change in changes.items():
            self._hearer.on_change(self._zeroconf, self._type, name, change)

    # Asking

    async def _ask(self) -> None:
        await self._zeroconf.async_wait_for_start()
        await asyncio.sleep(random.uniform(*_FIRST_S))  # noqa: S311 - so as not to collide
        self._send_question(unicast=True)
        for pause in _START_S:
            await asyncio.sleep(pause)
            self._send_question(unicast=False)
        while True:
            await asyncio.sleep(_REFRESH_S * random.uniform(0.9, 1.1))  # noqa: S311
            self._hearer.on_names(self._zeroconf, self._type, self.names())
            self._send_question(unicast=False)

    def _send_question(self, *, unicast: bool) -> None:
        """Who knows that we know of it does not answer (RFC 6762, section 7.1)."""
        now = current_time_millis()
        packet = DNSOutgoing(_QUERY)
        question = DNSQuestion(self._type, _PTR, _IN)
        question.unicast = unicast
        packet.add_question(question)
        fresh = (pointer for pointer in self._pointers() if not pointer.is_stale(now))
        for pointer in islice(fresh, limits.PEERS_MAX):
            packet.add_answer_at_time(pointer, now)
        self._zeroconf.async_send(packet)

    def _pointers(self) -> Iterator[DNSPointer]:
        for record in self._zeroconf.cache.async_entries_with_name(self._type):
            if isinstance(record, DNSPointer):
                yield record
