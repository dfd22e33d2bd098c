"""The processes of ``mesh demo``: ``python -m mesh.cli.demo_parts ROLE NAME PARENT``.

Each is a small program of its own, as a user might write it. The realm and its secret come from the
environment; all of them speak over the loopback interface alone.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

from mesh.node import Node

LOG = "readings"
PERIOD_S = 0.1


Totals = dict[str, dict[str, Any]]
"""Of each channel how many readings there were, the mean of each value, and the last reading."""


def make_node(name: str, durable: str | None = None) -> Node:
    return Node(name, durable=durable, discovery=("mdns",), interfaces=("127.0.0.1",))


def sensor(name: str) -> None:
    """Every 100 ms publish one of this machine's readings, for whoever is there, and append it to
    the log, for whoever comes later, until asked to stop."""
    stop, stopped = threading.Event(), threading.Event()
    channel, sent = f"sensors/{name}", 0
    with make_node(f"sensor-{name}") as node, node.publisher(channel) as publisher:
        log = node.stream(LOG)

        @node.service(f"stop/{name}")
        def finish(_: Any) -> int:
            stop.set()
            stopped.wait(5)
            return sent

        publisher.wait_for(1, timeout=10)
        while not stop.wait(PERIOD_S):
            reading = READINGS[name]()
            publisher.send(reading)
            log.append([channel, reading])
            sent += 1
        stopped.set()
        threading.Event().wait()


def aggregator(name: str) -> None:
    """Keep the totals of what is in the log, from its beginning on; answer queries about them."""
    totals: Totals = {}
    caught_up = {"records": 0, "seconds": 0.0}
    lock = threading.Lock()
    with make_node(name) as node:
        log = node.stream(LOG)

        @node.service("aggregate")
        def aggregate(channel: str | None) -> Any:
            with lock:
                if channel is not None:
                    return deepcopy(totals.get(channel))
                return {"totals": deepcopy(totals), "caught_up": dict(caught_up)}

        past = sum(end for _, end in log.bounds().values())
        began = time.monotonic()
        for record in log.replay(follow=True):
            with lock:
                add(totals, *record.payload)
                if record.offset + 1 == past:
                    caught_up.update(records=past, seconds=time.monotonic() - began)


def add(totals: Totals, channel: str, reading: dict[str, float]) -> None:
    """Have that reading in `totals`, too."""
    entry = totals.setdefault(channel, {"count": 0, "means": {}, "last": {}})
    entry["count"] += 1
    entry["last"] = reading
    for key, value in reading.items():
        mean = entry["means"].get(key, 0.0)
        entry["means"][key] = mean + (value - mean) / entry["count"]


def hasher(name: str) -> None:
    """Take files from one queue, put their SHA-256 into another."""
    with make_node(name) as node, node.pusher("hashed") as results:
        for task in node.puller("files"):
            digest = hashlib.sha256(Path(task.payload).read_bytes()).hexdigest()
            results.send({"file": task.payload, "sha256": digest, "worker": name}, timeout=10)


def cpu() -> dict[str, float]:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    ticks = [int(field) for field in fields]
    return {"busy_ticks": sum(ticks) - ticks[3] - ticks[4], "idle_ticks": ticks[3] + ticks[4]}


def memory() -> dict[str, float]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}
    return {"total_kib": kib["MemTotal"], "available_kib": kib["MemAvailable"]}


def network() -> dict[str, float]:
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    fields = [line.partition(":")[2].split() for line in lines]
    return {"in_bytes": sum(int(f[0]) for f in fields), "out_bytes": sum(int(f[8]) for f in fields)}


def disk() -> dict[str, float]:
    fields = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    whole = [f for f in fields if not f[2].startswith(("loop", "ram"))]
    return {
        "read_sectors": sum(int(f[5]) for f in whole),
        "written_sectors": sum(int(f[9]) for f in whole),
    }


READINGS = {"cpu": cpu, "memory": memory, "network": network, "disk": disk}
ROLES = {"sensor": sensor, "aggregator": aggregator, "hasher": hasher}


def leave_with(parent: int) -> None:
    """End when the demo does, also if it is killed: no process of it stays behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    role, name, parent = sys.argv[1:4]
    leave_with(int(parent))
    ROLES[role](name)


if __name__ == "__main__":
    main()
