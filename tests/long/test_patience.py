"""What a pause of several seconds must not cost: run by ``make test-long``."""

from __future__ import annotations

import signal
import time

import pytest

from mesh import Node
from tests.support.processes import Programs

pytestmark = [pytest.mark.slow, pytest.mark.long]

SECRET = "correct horse battery staple"
TCP = {"secret": SECRET, "interfaces": ("127.0.0.1",), "discovery": ("mdns",)}

PUBLISHER = """
    import sys
    from mesh import Node
    node = Node("publisher", **eval(sys.argv[1]))
    publisher = node.publisher("t", when_full="wait")
    publisher.wait_for(1, timeout=20)
    publisher.send_many((i, b"x" * 1000) for i in range(int(sys.argv[2])))
    print("sent", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("options", [{}, TCP], ids=["ipc", "tcp"])
def test_a_subscriber_that_pauses_for_nine_seconds_loses_nothing_it_was_promised(
    programs: Programs, options: dict[str, object]
) -> None:
    """Its buffers are full all the time, so no heartbeat would come through to it."""
    count = 50_000
    with Node("subscriber", **options) as node, node.subscriber("t") as subscriber:  # type: ignore[arg-type]
        publisher = programs.start(PUBLISHER, repr(options), str(count))
        assert subscriber.recv(timeout=20).payload[0] == 0
        time.sleep(9)  # the pause itself is what is tested
        for i in range(1, count):
            assert subscriber.recv(timeout=10).payload[0] == i
        publisher.expect("sent")
        assert subscriber.lost == {}
        publisher.tell()


def test_what_connects_to_a_stopped_process_reaches_it_once_it_goes_on(programs: Programs) -> None:
    """Longer than libzmq waits for a handshake, not so long that membership gives the peer up."""
    server = programs.start("""
        import threading
        from mesh import Node
        node = Node("server")
        node.service("s")(lambda request: request + 1)
        puller = node.puller("q")
        publisher = node.publisher("t", keep_last=True)
        publisher.send("here")
        threading.Thread(target=lambda: [print("worked", flush=True) for _ in puller]).start()
    """)
    with Node("client") as node:
        node.wait_for_peers(1, timeout=10)
        server.kill(signal.SIGSTOP)
        client, pusher, subscriber = node.client("s"), node.pusher("q"), node.subscriber("t")
        time.sleep(5)  # the stop itself is what is tested
        server.kill(signal.SIGCONT)
        assert client.request(1, timeout=10) == 2
        pusher.send("task", timeout=10)
        server.expect("worked")
        assert subscriber.recv(timeout=10).payload == "here"
        assert len(node.peers) == 1
