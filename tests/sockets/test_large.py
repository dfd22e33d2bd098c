"""Large payloads: bytes of one's own or views of what came, and memory that is not fetched anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from mesh.sockets import memory
from mesh.sockets.codec import DETACH_BYTES_MIN
from tests.support.homes import Homes
from tests.support.queues import Net as QueueNet
from tests.support.topics import Net

LARGE = bytes(range(256)) * (DETACH_BYTES_MIN // 256)


@pytest.mark.parametrize("views", [False, True])
def test_a_subscriber_gets_bytes_or_views_as_it_asked(net: Net, views: bool) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a", views=views)
    sent = [LARGE, LARGE[::-1], b"small", bytearray(LARGE), LARGE]
    for payload in sent:
        publisher.send(payload)
    publisher.send(LARGE, {"k": 1})
    got = [subscriber.recv(timeout=5) for _ in range(6)]
    assert [bytes(message.payload) for message in got] == [*map(bytes, sent), LARGE]
    large = memoryview if views else bytes
    assert [type(m.payload) for m in got] == [large, large, bytes, large, large, large]
    assert got[-1].headers == {"k": 1}
    assert not views or all(memoryview(got[i].payload).readonly for i in (0, 1, 3, 4, 5))


@pytest.mark.parametrize("views", [False, True])
def test_views_outlive_what_comes_after_them_and_their_subscriber(net: Net, views: bool) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a", views=views)
    got = []
    for n in range(20):
        publisher.send(bytes([n]) * DETACH_BYTES_MIN)
        got.append(subscriber.recv(timeout=5).payload)
    subscriber.close()
    assert [set(payload) for payload in got] == [{n} for n in range(20)]


@pytest.mark.parametrize("views", [False, True])
def test_a_puller_gets_bytes_or_views_as_it_asked(homes: Homes, views: bool) -> None:
    net = QueueNet(homes)
    try:
        pusher, puller = net.pusher(), net.puller(views=views)
        for payload in (LARGE, b"small"):
            pusher.send(payload, timeout=5)
        large, small = (puller.recv(timeout=5).payload for _ in range(2))
        assert (bytes(large), small) == (LARGE, b"small")
        assert type(large) is (memoryview if views else bytes)
        assert not views or memoryview(large).readonly
    finally:
        net.close()


FAULTS = """
import resource, sys
from mesh.sockets import memory
if sys.argv[1] == "expected":
    memory.expect(1 << 20)
def round():
    held = [bytes(b"x" * (1 << 20)) for _ in range(4)]
for _ in range(10):
    round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    round()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 200)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others do not learn")
def test_memory_of_large_payloads_is_kept_for_the_next() -> None:
    """Counted in a process of its own: page faults for each block of 1 MiB, which has 256 pages."""
    faults = {}
    for what in ("expected", "not"):
        ran = subprocess.run(
            [sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True
        )
        faults[what] = float(ran.stdout)
    assert faults["expected"] < 1
    assert faults["not"] > 50, "or there is nothing to do"


def test_the_allocator_is_told_of_larger_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_known", 0)
    asked: list[int] = []
    monkeypatch.setattr(memory, "bytes", asked.append, raising=False)
    for size in (1 << 20, 1 << 20, 1 << 19, 1 << 21, 1 << 40):
        memory.expect(size)
    assert asked == [8 << 20, 16 << 20, memory._LEARNED_BYTES_MAX]
