"""What the browser tells of records, what it asks, and that it remembers nothing: no network."""

from __future__ import annotations

import asyncio
import secrets
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from zeroconf import (  # type: ignore[attr-defined]
    DNSAddress,
    DNSCache,
    DNSIncoming,
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    DNSService,
    DNSText,
    RecordUpdate,
    ServiceStateChange,
    current_time_millis,
)

from mesh.discovery import browser as browsing
from mesh.discovery.browser import Browser
from mesh.discovery.mdns import SERVICE_TYPE

PTR, SRV, TXT, A, IN, UNIQUE = 12, 33, 16, 1, 1, 0x8001
TTL_S = 4500
WAIT_S = 5.0


class Air:
    """What the browser needs of zeroconf, with the real cache: what is heard and what was sent."""

    def __init__(self) -> None:
        self.cache = DNSCache()
        self.sent: asyncio.Queue[DNSIncoming] = asyncio.Queue()
        self.listener: Browser | None = None

    def async_add_listener(self, listener: Browser, question: DNSQuestion) -> None:
        self.listener = listener

    def async_remove_listener(self, listener: Browser) -> None:
        assert self.listener is listener
        self.listener = None

    async def async_wait_for_start(self) -> None:
        pass

    def async_send(self, packet: DNSOutgoing) -> None:
        for data in packet.packets():
            self.sent.put_nowait(DNSIncoming(data))

    def hear(self, *records: DNSAddress | DNSPointer | DNSService | DNSText) -> None:
        """As zeroconf does with one packet: tell of it, then put it in the cache."""
        assert self.listener is not None
        now = current_time_millis()
        updates = [RecordUpdate(each, self.cache.async_get_unique(each)) for each in records]
        gone = [each for each in records if each.is_expired(now)]
        self.listener.async_update_records(self, now, updates)  # type: ignore[arg-type]
        self.cache.async_add_records(each for each in records if each not in gone)
        self.cache.async_remove_records(gone)
        self.listener.async_update_records_complete()


class Ear:
    """Who is told."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str]] = []
        self.names: list[set[str]] = []

    def on_change(self, zc: Any, service_type: str, name: str, change: ServiceStateChange) -> None:
        assert service_type == SERVICE_TYPE
        self.changes.append((name.removesuffix(f".{SERVICE_TYPE}"), change.name))

    def on_names(self, zc: Any, service_type: str, names: set[str]) -> None:
        self.names.append({name.removesuffix(f".{SERVICE_TYPE}") for name in names})


def on_air(scenario: Callable[[Air, Ear, Browser], Any]) -> None:
    """Play `scenario` with a browser that has been started."""

    async def play() -> None:
        air, ear = Air(), Ear()
        zeroconf: Any = air
        browser = Browser(zeroconf, SERVICE_TYPE, ear)
        browser.start()
        async with asyncio.timeout(WAIT_S):
            if (result := scenario(air, ear, browser)) is not None:
                await result
        browser.cancel()
        assert air.listener is None

    asyncio.run(play())


def pointer(name: str, ttl_s: int = TTL_S, *, age_s: float = 0.0, of: str = SERVICE_TYPE) -> Any:
    created = current_time_millis() - age_s * 1000
    return DNSPointer(of, PTR, IN, ttl_s, f"{name}.{SERVICE_TYPE}", created)


def test_a_pointer_that_comes_is_told_once_and_again_when_it_goes() -> None:
    def scenario(air: Air, ear: Ear, browser: Browser) -> None:
        air.hear(pointer("a"), pointer("elsewhere", of="_http._tcp.local."))
        air.hear(pointer("a"))
        air.hear(pointer("elsewhere", 0, of="_http._tcp.local."))
        assert ear.changes == [("a", "Added")]
        assert browser.names() == {f"a.{SERVICE_TYPE}"}
        air.hear(pointer("a", 0))
        assert ear.changes[1:] == [("a", "Removed")]
        assert browser.names() == set()

    on_air(scenario)


def test_whatever_changes_of_a_service_is_told_when_the_packet_was_read() -> None:
    def scenario(air: Air, ear: Ear, browser: Browser) -> None:
        full, host = f"a.{SERVICE_TYPE}", "a-0.local."
        service = DNSService(full, SRV, UNIQUE, 120, 0, 0, 5555, host)
        air.hear(
            pointer("a"),
            service,
            DNSText(full, TXT, UNIQUE, TTL_S, b"\x03v=1"),
            DNSAddress(host, A, UNIQUE, 120, b"\x0a\x00\x00\x01"),
        )
        assert ear.changes == [("a", "Added")], "one thing for one packet"
        for changed in (
            DNSText(full, TXT, UNIQUE, TTL_S, b"\x03v=2"),
            DNSService(full, SRV, UNIQUE, 120, 0, 0, 5556, host),
            DNSAddress(host, A, UNIQUE, 120, b"\x0a\x00\x00\x02"),
        ):
            ear.changes.clear()
            air.hear(changed)
            assert ear.changes == [("a", "Updated")], changed
        ear.changes.clear()
        air.hear(service, DNSAddress("other.local.", A, UNIQUE, 120, b"\x0a\x00\x00\x03"))
        air.hear(DNSText(f"a.x{SERVICE_TYPE}", TXT, UNIQUE, TTL_S, b""))
        assert ear.changes == []

    on_air(scenario)


def test_names_without_end_leave_nothing_behind() -> None:
    """zeroconf's own browser keeps a timer for each name, and another for each change of a TTL."""

    def scenario(air: Air, ear: Ear, browser: Browser) -> None:
        now = current_time_millis()
        ear.on_change = lambda *_: None  # type: ignore[method-assign]

        def flood(count: int) -> None:
            for ttl_s in range(count):
                forged = pointer(secrets.token_hex(8), TTL_S + ttl_s)
                for update in (RecordUpdate(forged, None), RecordUpdate(forged, forged)):
                    browser.async_update_records(air, now, [update])  # type: ignore[arg-type]
                    browser.async_update_records_complete()

        flood(10)
        tracemalloc.start()
        try:
            flood(1000)
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert grown < 1000 * 10

    on_air(scenario)


def test_the_first_question_wants_answers_for_this_node_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(browsing, "_START_S", (0.0,))

    async def scenario(air: Air, ear: Ear, browser: Browser) -> None:
        asked = [await air.sent.get() for _ in range(2)]
        assert [[(q.name, q.type, q.unicast) for q in packet.questions] for packet in asked] == [
            [(SERVICE_TYPE, PTR, True)],
            [(SERVICE_TYPE, PTR, False)],
        ]
        browser.ask()
        assert (await air.sent.get()).questions[0].unicast, "as if for the first time"

    on_air(scenario)


def test_later_questions_name_those_that_need_not_answer_and_not_those_that_grow_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever's record is past half of its life has to renew it."""
    monkeypatch.setattr(browsing, "_START_S", ())
    monkeypatch.setattr(browsing, "_REFRESH_S", 0.01)

    async def scenario(air: Air, ear: Ear, browser: Browser) -> None:
        air.hear(pointer("fresh"), pointer("old", age_s=0.6 * TTL_S))
        await air.sent.get()
        later = await air.sent.get()
        assert later.answers() == [pointer("fresh")]
        assert not later.questions[0].unicast
        assert ear.names[0] == {"fresh", "old"}

    on_air(scenario)
