"""What a reader that stops must not cost: run by ``make test-long``."""

from __future__ import annotations

import signal

import pytest

from tests.support.processes import Programs

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(120)]

BUFFER_BYTES = 16 << 20
SLACK_BYTES = 16 << 20
"""What Python and malloc keep beside: 0 to 13 MiB were seen, the same after 4 s and after 30."""
STOPPED_S = 30

PUBLISHER = """
    import sys, time
    from mesh import Node
    size, buffer_bytes, stopped_s = map(int, sys.argv[1:])
    def rss():
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    node = Node("publisher", buffer_bytes=buffer_bytes, heartbeat_s=10)
    publisher = node.publisher("t")
    publisher.wait_for(1, timeout=20)
    def publish(seconds):
        end, most, count = time.monotonic() + seconds, 0, 0
        while time.monotonic() < end:
            for _ in range(max(1, 100_000 // size)):
                publisher.send(bytes(size))
                count += 1
            most = max(most, rss())
        return most, count
    before, count = publish(1)
    print("running", flush=True)
    sys.stdin.readline()
    most, more = publish(stopped_s)
    print(most - before, flush=True)
    sys.stdin.readline()
    time.sleep(1)
    publisher.send("end")
    print(count + more + 1, flush=True)
    sys.stdin.readline()
"""
SUBSCRIBER = """
    import sys, time
    from mesh import Node
    buffer_bytes, pause_s = map(int, sys.argv[1:])
    def rss():
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    node = Node("subscriber", buffer_bytes=buffer_bytes, heartbeat_s=10)
    subscriber = node.subscriber("t")
    received, started, before = 0, time.monotonic(), 0
    for message in subscriber:
        received += 1
        if pause_s and time.monotonic() > started + 1:
            before = rss()
            time.sleep(pause_s)
            print(rss() - before, flush=True)
            pause_s = 0
        if message.payload == "end":
            print(received, sum(subscriber.lost.values()), flush=True)
            break
"""


@pytest.mark.parametrize("size", [100, 1 << 20])
@pytest.mark.parametrize("how", ["stopped", "not reading"])
def test_a_reader_that_stops_for_half_a_minute_costs_no_more_than_the_buffers(
    programs: Programs, how: str, size: int
) -> None:
    """And finds what it missed counted when it goes on."""
    pause_s = STOPPED_S + 3 if how == "not reading" else 0
    subscriber = programs.start(SUBSCRIBER, str(BUFFER_BYTES), str(pause_s))
    publisher = programs.start(PUBLISHER, str(size), str(BUFFER_BYTES), str(STOPPED_S))
    publisher.expect("running")
    if not pause_s:
        subscriber.kill(signal.SIGSTOP)
    publisher.tell()
    assert int(publisher.line(STOPPED_S + 15)) < BUFFER_BYTES + SLACK_BYTES
    if pause_s:
        assert int(subscriber.line()) < BUFFER_BYTES + SLACK_BYTES
    else:
        subscriber.kill(signal.SIGCONT)
    publisher.tell()
    sent = int(publisher.line())
    received, lost = map(int, subscriber.line().split())
    assert lost > 0
    assert received + lost == sent
    publisher.tell()
