"""mDNS for real, on the loopback interface: two processes, forged records, networks that fail."""

from __future__ import annotations

import asyncio
import queue
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zeroconf
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from mesh import limits
from mesh.discovery import mdns
from mesh.discovery.mdns import SERVICE_TYPE, MdnsSource, make_record, read_record
from mesh.discovery.source import Announcement, Sighting

ROOT = Path(__file__).parents[2]
LOOPBACK = ("127.0.0.1",)
WAIT_S = 5.0

OTHER_PROCESS = """
import sys
from mesh.discovery.mdns import MdnsSource
from mesh.discovery.source import Announcement

own = Announcement(id=sys.argv[1], name="other", realm="r", endpoints=("tcp://127.0.0.1:5555",))
source = MdnsSource(("127.0.0.1",))
source.start(own)
sys.stdin.readline()
"""


NETWORK = """
ip link add eth7 type veth peer name far
ip addr add 10.7.0.1/24 dev eth7
ip link set eth7 up
ip link set far up
ip route add default dev eth7
exec "$@"
"""

MOVE = """
import select, subprocess
from mesh.discovery.mdns import MdnsSource
from mesh.discovery.source import Announcement

def node(node_id, address):
    return Announcement(id=node_id * 16, name="n", realm="r", endpoints=(f"tcp://{address}:5555",))

here, there = MdnsSource(("eth7",)), MdnsSource(("eth7",))
here.start(node("a", "10.7.0.1"))
there.start(node("b", "10.7.0.1"))
assert select.select([here], [], [], 5)[0]
print(*(s.announcement.endpoints[0] for s in here.sightings()))
for command in ("addr del 10.7.0.1/24", "addr add 10.7.0.2/24", "route add default"):
    subprocess.run(["ip", *command.split(), "dev", "eth7"], check=True)
there.update(node("b", "10.7.0.2"))
assert select.select([here], [], [], 5)[0]
print(*(s.announcement.endpoints[0] for s in here.sightings()))
there.close()
here.close()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., MdnsSource]]:
    sources = []

    def start(
        own: Announcement | None = None, interfaces: tuple[str, ...] = LOOPBACK
    ) -> MdnsSource:
        source = MdnsSource(interfaces)
        source.start(own or announcement())
        sources.append(source)
        return source

    yield start
    for source in sources:
        source.close()


def announcement(
    name: str = "node", endpoints: tuple[str, ...] = ("tcp://10.77.0.1:5555",), node_id: str = ""
) -> Announcement:
    node_id = node_id or secrets.token_hex(8)
    return Announcement(id=node_id, name=name, realm="r", endpoints=endpoints, tag="0f" * 32)


def hear(source: MdnsSource, node_id: str, *, present: bool = True) -> list[Sighting]:
    """All that is told until it is of `node_id`."""
    deadline = time.monotonic() + WAIT_S
    heard: list[Sighting] = []
    while (node_id, present) not in [(s.announcement.id, s.present) for s in heard]:
        left = deadline - time.monotonic()
        assert left > 0, f"not among {heard}; {source.error=}"
        select.select([source], [], [], left)
        heard += source.sightings()
    return heard


@contextmanager
def other_process(node_id: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", OTHER_PROCESS, node_id]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_a_new_process_is_found_on_the_loopback_alone(start: Callable[..., MdnsSource]) -> None:
    source, node_id = start(), secrets.token_hex(8)
    start(other := announcement())
    hear(source, other.id)  # so that it is up, and what is measured is the other's start alone
    before = time.monotonic()
    with other_process(node_id):
        hear(source, node_id)
        took_ms = (time.monotonic() - before) * 1000
    print(f"from process start to being seen by mDNS: {took_ms:.0f} ms")  # noqa: T201
    assert took_ms < 1000, "ten times what it takes: has it asked whether its name is free?"


@pytest.mark.slow
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "at once"])
def test_a_program_that_does_not_close_its_node_ends_without_a_word(
    start: Callable[..., MdnsSource], seen: bool
) -> None:
    source, node_id = start(), secrets.token_hex(8)
    with other_process(node_id) as process:
        if seen:
            hear(source, node_id)
        out, err = process.communicate("end\n", timeout=WAIT_S)
    assert (out, err, process.returncode) == ("", "", 0)


@pytest.mark.slow
def test_nobody_pays_for_mdns_before_it_is_used() -> None:
    script = "import sys, mesh.discovery.mdns; print(*sorted(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {"zeroconf", "asyncio", "ifaddr"} & set(run.stdout.split()) == set()


def test_a_label_of_any_script_survives(start: Callable[..., MdnsSource]) -> None:
    label = "Küche ☕ 厨房=1; a.b"
    source, other = start(), announcement(label)
    start(other)
    assert other in [s.announcement for s in hear(source, other.id)]


def test_all_addresses_are_told_and_nothing_of_this_machine_alone(
    start: Callable[..., MdnsSource],
) -> None:
    endpoints = ("tcp://10.77.0.1:5555", "tcp://192.168.7.9:5555")
    source, other = start(), announcement("n", ("ipc:///run/mesh/x", *endpoints))
    start(other)
    told = [
        s.announcement.endpoints for s in hear(source, other.id) if s.announcement.id == other.id
    ]
    assert told == [endpoints]


def test_a_node_without_a_network_is_announced_once_it_has_one(
    start: Callable[..., MdnsSource],
) -> None:
    source, other = start(), announcement("n", ())
    late, witness = start(other), announcement()
    start(witness)
    heard = hear(source, witness.id)
    late.update(announcement("n", node_id=other.id))
    heard += hear(source, other.id)
    late.update(other)
    heard += hear(source, other.id, present=False)
    assert [s.present for s in heard if s.announcement.id == other.id] == [True, False]


@pytest.mark.slow
@pytest.mark.netns
def test_a_node_whose_address_changes_is_found_at_the_new_one() -> None:
    """The socket that mDNS was spoken from went with the old address."""
    command = ["unshare", "--net", "sh", "-ec", NETWORK, "sh", sys.executable, "-c", MOVE]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["tcp://10.7.0.1:5555", "tcp://10.7.0.2:5555"]


def test_an_interface_may_be_given_by_its_name(start: Callable[..., MdnsSource]) -> None:
    source, other = start(), announcement()
    start(other, ("lo",))
    hear(source, other.id)


@pytest.mark.slow
def test_an_announcement_that_was_replaced_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is sent three times within half a second; the first's must not follow the second's."""
    before = announcement()
    after = announcement("node", ("tcp://10.77.0.2:5555",), before.id)

    async def scenario() -> list[str]:
        sent: list[str] = []
        all_sent = asyncio.Event()

        async with AsyncZeroconf(list(LOOPBACK)) as here:
            broadcast = here.zeroconf.generate_service_broadcast

            def generate(info: zeroconf.ServiceInfo, *arguments: Any) -> Any:
                sent.extend(info.parsed_addresses())
                if sent.count("10.77.0.2") == 3:
                    all_sent.set()
                return broadcast(info, *arguments)

            monkeypatch.setattr(here.zeroconf, "generate_service_broadcast", generate)
            announcer = mdns._Announcer(here.zeroconf)
            await announcer.announce(before)
            await asyncio.sleep(0)
            await announcer.announce(after)
            async with asyncio.timeout(WAIT_S):
                await all_sent.wait()
        return sent

    assert asyncio.run(scenario()) == ["10.77.0.1", *["10.77.0.2"] * 3]


def record(node_id: str, **changed: object) -> AsyncServiceInfo:
    """A record as a node makes it, but for what is `changed`."""
    text = {b"v": b"1", b"name": b"forged", b"realm": b"r", b"tag": b""}
    arguments: dict[str, object] = {
        "port": 5555,
        "server": f"{node_id}-0.local.",
        "parsed_addresses": ["10.77.0.1"],
        "properties": text,
    }
    arguments |= {k: text | v if isinstance(v, dict) else v for k, v in changed.items()}
    return AsyncServiceInfo(SERVICE_TYPE, f"{node_id}.{SERVICE_TYPE}", **arguments)  # type: ignore[arg-type]


MALFORMED: dict[str, dict[str, object]] = {
    "no version": {"properties": {b"v": None}},
    "another version": {"properties": {b"v": b"2"}},
    "no name": {"properties": {b"name": b""}},
    "a name with control characters": {"properties": {b"name": b"a\nb"}},
    "a name of 64 bytes": {"properties": {b"name": b"x" * 64}},
    "a name that is not UTF-8": {"properties": {b"name": b"\xff\xfe"}},
    "no realm": {"properties": {b"realm": None}},
    "a tag that is not hexadecimal": {"properties": {b"tag": b"<script>"}},
    "a tag too long": {"properties": {b"tag": b"0" * 129}},
    "no port": {"port": 0},
    "no address of IPv4": {"parsed_addresses": ["fd00::1"]},
    "an address nobody has": {"parsed_addresses": ["0.0.0.0", "224.0.0.1", "255.255.255.255"]},
}


@pytest.mark.parametrize("changed", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_record_says_nothing(changed: dict[str, object]) -> None:
    node_id = secrets.token_hex(8)
    assert read_record(node_id, record(node_id)) is not None
    assert read_record(node_id, record(node_id, **changed)) is None


def test_what_is_written_is_what_is_read() -> None:
    own = announcement("Küche", ("tcp://10.77.0.1:5555", "tcp://10.77.0.2:5555"))
    made = make_record(own, 0)
    assert made is not None
    assert read_record(own.id, made) == own


def test_forged_records_are_ignored_and_counted_and_the_good_ones_heard(
    start: Callable[..., MdnsSource],
) -> None:
    source, last = start(), secrets.token_hex(8)
    start(witness := announcement())
    hear(source, witness.id)
    bad = [record(secrets.token_hex(8), **changed) for changed in MALFORMED.values()]
    bad += [record(name) for name in ("not-an-id", "ABCDEFABCDEFABCD", "0" * 17)]
    responder = zeroconf.Zeroconf(interfaces=list(LOOPBACK))
    try:
        for info in (*bad, record(last)):
            info.set_server_if_missing()
            responder.send(responder.generate_service_broadcast(info, None))
        heard = hear(source, last)
    finally:
        responder.close()
    assert [s for s in heard if s.announcement.name == "forged" and s.announcement.id != last] == []
    assert source.ignored >= len(bad)
    assert source.failures == 0


class Told:
    """What a listener has put, and when there are `count` of it."""

    def __init__(self) -> None:
        self.sightings: list[Sighting | None] = []
        self._more = asyncio.Event()

    def put(self, sighting: Sighting | None) -> bool:
        self.sightings.append(sighting)
        self._more.set()
        return True

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.sightings) < count:
                self._more.clear()
                await self._more.wait()


def added(listener: mdns._Listener, responder: AsyncZeroconf, node_id: str) -> None:
    listener.on_change(
        responder.zeroconf,
        SERVICE_TYPE,
        f"{node_id}.{SERVICE_TYPE}",
        zeroconf.ServiceStateChange.Added,
    )


@pytest.mark.slow
def test_a_record_that_came_without_its_address_is_asked_for() -> None:
    node_id = secrets.token_hex(8)

    async def scenario() -> list[Sighting | None]:
        here, there = AsyncZeroconf(list(LOOPBACK)), AsyncZeroconf(list(LOOPBACK))
        try:
            await there.zeroconf.async_wait_for_start()
            there.zeroconf.registry.async_add(record(node_id))
            told = Told()
            added(mdns._Listener("", told.put), here, node_id)
            await told.wait_for(1)
            return told.sightings
        finally:
            await here.async_close()
            await there.async_close()

    (sighting,) = asyncio.run(scenario())
    assert sighting is not None
    assert sighting.announcement.endpoints == ("tcp://10.77.0.1:5555",)


def test_a_record_nobody_answers_for_is_given_up_and_only_so_many_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mdns, "_ANSWER_MS", 20)
    monkeypatch.setattr(limits, "RESOLVING_MAX", 1)

    async def scenario() -> tuple[int, list[Sighting | None], int]:
        here, told = AsyncZeroconf(list(LOOPBACK)), Told()
        listener = mdns._Listener("", told.put)
        try:
            first = secrets.token_hex(8)
            added(listener, here, first)
            added(listener, here, first)
            assert told.sightings == []
            added(listener, here, secrets.token_hex(8))
            refused = len(told.sightings)
            await told.wait_for(2)
            await asyncio.sleep(0)
            return refused, told.sightings, len(listener._asking)
        finally:
            listener.close()
            await here.async_close()

    assert asyncio.run(scenario()) == (1, [None, None], 0)


class Ear:
    """Takes sightings while it has `room`."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.heard: list[Sighting] = []

    def put(self, sighting: Sighting | None) -> bool:
        assert sighting is not None
        if not self.room:
            return False
        self.room -= 1
        self.heard.append(sighting)
        return True


def test_a_flood_of_forged_records_does_not_hide_a_newcomer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", 3)
    ear = Ear()
    listener = mdns._Listener("", ear.put)
    flood = [secrets.token_hex(8) for _ in range(10)]
    for node_id in flood:
        listener._announced(node_id, record(node_id))
    assert [s.announcement.id for s in ear.heard] == flood
    assert list(listener._known) == flood[-3:]


def test_what_was_refused_is_told_again() -> None:
    ear, node_id = Ear(room=0), secrets.token_hex(8)
    listener = mdns._Listener("", ear.put)
    listener._announced(node_id, record(node_id))
    assert ear.heard == []
    ear.room = 5
    listener._announced(node_id, record(node_id))
    listener._announced(node_id, record(node_id))
    assert [(s.announcement.id, s.present) for s in ear.heard] == [(node_id, True)]


def test_a_goodbye_is_told_of_whom_a_flood_made_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was told of it still knows it, and dials it until it is withdrawn."""
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", 1)
    ear = Ear()
    listener = mdns._Listener("", ear.put)
    first, second = secrets.token_hex(8), secrets.token_hex(8)
    for node_id in (first, second):
        listener._announced(node_id, record(node_id))
    zc: Any = None
    removed = zeroconf.ServiceStateChange.Removed
    listener.on_change(zc, SERVICE_TYPE, f"{first}.{SERVICE_TYPE}", removed)
    assert (ear.heard[-1].announcement.id, ear.heard[-1].present) == (first, False)


def test_a_look_at_all_names_finds_who_went_unheard_and_who_came_unheard() -> None:
    ear, own, gone, there, new = Ear(), *(secrets.token_hex(8) for _ in range(4))
    listener = mdns._Listener(own, ear.put)
    for node_id in (gone, there):
        listener._announced(node_id, record(node_id))
    looked_at = []
    ear.heard.clear()
    listener._ask = lambda node_id, *_: looked_at.append(node_id)  # type: ignore[method-assign]
    zc: Any = SimpleNamespace(cache=zeroconf.DNSCache())  # type: ignore[attr-defined]
    listener.on_names(zc, SERVICE_TYPE, {f"{i}.{SERVICE_TYPE}" for i in (own, there, new)})
    assert [(s.announcement.id, s.present) for s in ear.heard] == [(gone, False)]
    assert looked_at == [new]


def test_a_network_that_fails_is_told_and_tried_again_when_it_changes(
    start: Callable[..., MdnsSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: queue.SimpleQueue[str] = queue.SimpleQueue()

    def no_network(interfaces: tuple[str, ...]) -> tuple[str, ...]:
        raise OSError("no such network")

    own = announcement()
    monkeypatch.setattr(mdns._log, "warning", lambda text, *parts: logged.put(text % parts))
    with monkeypatch.context() as patch:
        patch.setattr(mdns, "addresses_of", no_network)
        broken = start(own)
        text = logged.get(timeout=WAIT_S)
    assert text == "mDNS does not work here: OSError('no such network')"
    assert broken.failures == 1
    assert str(broken.error) == "no such network"
    source = start()
    broken.update(own)
    hear(source, own.id)
    assert broken.error is None


def test_a_source_that_failed_is_closed_at_once(
    start: Callable[..., MdnsSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = threading.Event()

    def no_network(interfaces: tuple[str, ...]) -> tuple[str, ...]:
        tried.set()
        raise OSError("no such network")

    monkeypatch.setattr(mdns, "addresses_of", no_network)
    broken = start()
    assert tried.wait(WAIT_S)
    before = time.monotonic()
    broken.close()
    assert time.monotonic() - before < 0.5
    assert "mesh-mdns" not in [thread.name for thread in threading.enumerate()]


def test_no_thread_is_left_behind(start: Callable[..., MdnsSource]) -> None:
    source, other = start(), start(own := announcement())
    hear(source, own.id)
    source.close()
    other.close()
    assert "mesh-mdns" not in [thread.name for thread in threading.enumerate()]
