"""What a node costs: ``python -m bench.basics``. docs/measured.md quotes it.

Figures of starting are medians of seven fresh processes, which find everything compiled, as an
installed package is; that of a death is a median of seven; the round trip's is over 3,000 calls,
in blocks that alternate with raw pyzmq's; idleness is one span of 10 s. Absolute figures belong to
the machine they were taken on. With ``--json`` they come once more, as one object.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable

RUNS = 7

PUBLISHER = """
    import sys, time
    from mesh import Node
    options = dict(discovery=("mdns",), interfaces=("127.0.0.1",)) if sys.argv[1] == "mdns" else {}
    node = Node("publisher", **options)
    publisher = node.publisher("t", keep_last=True)
    publisher.send(0)
    print("ready", flush=True)
    while True:
        time.sleep(60)
"""
SUBSCRIBER = """
    import sys, time
    from mesh import Node
    options = dict(discovery=("mdns",), interfaces=("127.0.0.1",)) if sys.argv[1] == "mdns" else {}
    node = Node("subscriber", **options)
    with node.subscriber("t") as subscriber:
        subscriber.recv(timeout=30)
        print("received", flush=True)
"""
IDLE = """
    import time
    from mesh import Node
    node = Node("idle")
    print("ready", flush=True)
    time.sleep(1)
    cpu = time.process_time()
    time.sleep(10)
    rss = [line for line in open("/proc/self/status") if line.startswith("VmRSS")][0].split()[1]
    print((time.process_time() - cpu) / 10 * 100, int(rss) / 1024, flush=True)
"""
SERVER = """
    import sys, threading, zmq
    from mesh import Node
    node = Node("server")
    node.service("echo")(lambda request: request)
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(sys.argv[1])
    print("ready", flush=True)
    while True:
        router.send_multipart(router.recv_multipart())
"""


def start(source: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(source), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def first_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def importing(statement: str) -> float:
    """Seconds that `statement` takes in a fresh Python."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"

    def run() -> float:
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    run()
    return statistics.median(run() for _ in range(RUNS))


def joining(discovery: str) -> float:
    """Seconds from exec of a program to its first message from a running peer."""
    publisher = start(PUBLISHER, discovery)
    first_line(publisher)
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subscriber = start(SUBSCRIBER, discovery)
        assert first_line(subscriber) == "received"
        times.append(time.perf_counter() - started)
        end(subscriber)
    end(publisher)
    return statistics.median(times)


def noticing_death() -> float:
    """Seconds from SIGKILL of a peer on this host until the hook is told."""
    import queue

    from mesh import Node, PeerEvent

    times = []
    with Node("watcher") as node:
        events: queue.Queue[PeerEvent] = queue.Queue()
        node.on_peer(events.put)
        for _ in range(RUNS):
            victim = start(PUBLISHER, "local")
            first_line(victim)
            assert events.get(timeout=10).kind == "joined"
            started = time.perf_counter()
            victim.kill()
            assert events.get(timeout=10).kind == "left"
            times.append(time.perf_counter() - started)
            end(victim)
    return statistics.median(times)


def idling() -> tuple[float, float]:
    """(percent of a core, MiB of RSS) of an idle node."""
    process = start(IDLE)
    first_line(process)
    cpu, rss = first_line(process).split()
    end(process)
    return float(cpu), float(rss)


def round_trip() -> tuple[float, float]:
    """(p50 of ours, p50 of raw DEALER/ROUTER) for 16 bytes over ipc, in seconds."""
    import zmq

    from mesh import Node

    with tempfile.TemporaryDirectory() as directory, Node("caller") as node:
        endpoint = f"ipc://{directory}/raw"
        server = start(SERVER, endpoint)
        first_line(server)
        client = node.client("echo")
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.connect(endpoint)
        payload = b"x" * 16

        def raw() -> None:
            dealer.send(payload)
            dealer.recv()

        def ours() -> None:
            client.request(payload, timeout=5)

        for call in (raw, ours) * 50:
            call()
        times: dict[Callable[[], None], list[float]] = {raw: [], ours: []}
        for _ in range(60):
            for call in (raw, ours):
                for _ in range(50):
                    started = time.perf_counter()
                    call()
                    times[call].append(time.perf_counter() - started)
        dealer.close(linger=0)
        context.term()
        end(server)
        return statistics.median(times[ours]), statistics.median(times[raw])


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="mesh-") as directory:
        os.environ["MESH_RUNTIME_DIR"] = directory
        os.environ["MESH_REALM"] = "bench"
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        figures: dict[str, float] = {
            "import mesh, s": importing("import mesh"),
            "from mesh import Node, s": importing("from mesh import Node"),
            "exec to first message, same host, s": joining("local"),
            "SIGKILL noticed on the same host, s": noticing_death(),
        }
        cpu, rss = idling()
        figures |= {"idle CPU, % of a core": cpu, "idle RSS, MiB": rss}
        ours, raw = round_trip()
        figures |= {
            "round trip 16 B ipc p50, us": ours * 1e6,
            "raw DEALER/ROUTER p50, us": raw * 1e6,
            "ratio to raw": ours / raw,
        }
        os.environ["MESH_SECRET"] = secrets.token_urlsafe(24)
        figures["exec to first message, mDNS, s"] = joining("mdns")
    for name, value in figures.items():
        print(f"{name:40} {value:10.4f}")
    if "--json" in sys.argv:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
