"""``mesh demo``: a small system of real processes on this machine, watched and checked.

Sensors publish this machine's readings and append them to a log, an aggregator keeps the totals of
that and answers queries about them, two workers hash the files of the Python standard library. One
of the workers is killed on the way, and so is the aggregator, which has its totals again from the
log. All of them find each other over mDNS on the loopback interface, with a secret that is made for
the occasion.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
import msgspec

from mesh.cli.demo_parts import LOG, READINGS, Totals, add, make_node
from mesh.errors import MeshError, PeerLost
from mesh.limits import PREFETCH
from mesh.message import PeerEvent, TasksLost
from mesh.node import Node
from mesh.sockets.subscriber import Subscriber

FILES = 1200
"""Files to hash: enough for the kill to come in the middle."""
JOIN_S = 15.0
WORKERS = ("hasher-1", "hasher-2")
AGGREGATOR = "aggregator"


class Children(msgspec.Struct):
    """The processes of the demo; leaving ends those that still run."""

    processes: dict[str, subprocess.Popen[bytes]] = msgspec.field(default_factory=dict)
    started: dict[str, float] = msgspec.field(default_factory=dict)

    def start(self, role: str, name: str) -> None:
        node_name = f"sensor-{name}" if role == "sensor" else name
        self.started[node_name] = time.monotonic()
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the demo's to handle
        try:
            self.processes[node_name] = subprocess.Popen(
                [sys.executable, "-m", "mesh.cli.demo_parts", role, name, str(os.getpid())]
            )
        finally:
            signal.signal(signal.SIGINT, interrupt)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Watcher(msgspec.Struct):
    """What happened, as told by the node; prints it as it comes."""

    children: Children
    began: float = msgspec.field(default_factory=time.monotonic)
    found_s: dict[str, float] = msgspec.field(default_factory=dict)
    left: dict[str, tuple[float, str]] = msgspec.field(default_factory=dict)
    tasks_lost: int = 0

    def say(self, text: str) -> None:
        click.echo(f"{time.monotonic() - self.began:6.2f} s  {text}")

    def on_peer(self, event: PeerEvent) -> None:
        name, now = event.peer.name, time.monotonic()
        if event.kind == "joined":
            after_s = now - self.children.started.get(name, now)
            self.found_s.setdefault(name, after_s)
            self.say(f"+ {name} joined, {after_s:.2f} s after its process was started")
        else:
            self.left[name] = (now, event.reason)
            self.say(f"- {name} left ({event.reason})")

    def on_tasks_lost(self, loss: TasksLost) -> None:
        self.tasks_lost += loss.count
        self.say(f"! a worker went away with {loss.count} files in its hands; they go out again")


def run(seconds: float) -> bool:
    """Run the demo for about `seconds` and a little; True if every check held."""
    os.environ["MESH_REALM"] = f"demo-{secrets.token_hex(4)}"
    os.environ["MESH_SECRET"] = secrets.token_urlsafe(24)
    with (
        tempfile.TemporaryDirectory(prefix="mesh-demo-") as log,
        Children() as children,
        make_node("demo", log) as node,
    ):
        watcher = Watcher(children)
        node.on_peer(watcher.on_peer)
        for name in READINGS:
            children.start("sensor", name)
        children.start(AGGREGATOR, AGGREGATOR)
        for name in WORKERS:
            children.start("hasher", name)
        watcher.say(f"{len(children.processes)} processes started; looking for them over mDNS")
        try:
            return _observe(node, watcher, seconds)
        except MeshError as error:
            watcher.say(f"the demo could not go on: {error}")
            return False


def _observe(node: Node, watcher: Watcher, seconds: float) -> bool:
    expected = len(watcher.children.processes)
    with node.subscriber("sensors/**") as subscriber:
        live = Live(subscriber)
        live.start()
        node.wait_for_peers(expected, timeout=JOIN_S)
        hashing = Hashing(node, watcher, standard_library()[:FILES], seconds * 0.7)
        hashing.start()
        round_trips = _query(node, watcher, seconds * 0.6)
        caught_up = _kill_the_aggregator(node, watcher)
        round_trips += _query(node, watcher, seconds * 0.4)
        hashing.join()
        sent = {
            f"sensors/{name}": node.client(f"stop/{name}").request(None, timeout=10)
            for name in READINGS
        }
        totals = _settled(node, live, sent)
    live.join()
    return _summary(node, watcher, hashing, round_trips, sent, live, totals, caught_up)


class Live(threading.Thread):
    """Counts what the sensors publish, as it comes."""

    def __init__(self, subscriber: Subscriber) -> None:
        super().__init__(name="demo live")
        self.counts: Counter[str] = Counter()
        self.lost = 0
        self._subscriber = subscriber

    def run(self) -> None:
        for message in self._subscriber:
            self.counts[message.channel] += 1
            self.lost = sum(self._subscriber.lost.values())


def standard_library() -> list[str]:
    """The source files of the Python that runs this, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(str(p) for p in root.rglob("*.py") if "site-packages" not in p.parts)


class Hashing(threading.Thread):
    """Feeds the work queue and collects the answers; half way, one worker is killed."""

    def __init__(self, node: Node, watcher: Watcher, files: list[str], seconds: float) -> None:
        super().__init__(name="demo hashing")
        self.files = files
        self.digests: dict[str, str] = {}
        self.by_worker: dict[str, int] = {}
        self.sent = 0
        self.answered = 0
        self.noticed_s: float | None = None
        self._node = node
        self._watcher = watcher
        self._pause_s = seconds / len(files)

    def run(self) -> None:
        with self._node.pusher("files") as pusher, self._node.puller("hashed") as results:
            pusher.on_loss(self._watcher.on_tasks_lost)
            pusher.wait_for(len(WORKERS), timeout=JOIN_S)
            collector = threading.Thread(target=self._collect, args=(results,))
            collector.start()
            for i, path in enumerate(self.files):
                pusher.send(path, timeout=10)
                self.sent += 1
                if i == len(self.files) // 2:
                    self._kill(WORKERS[0])
                time.sleep(self._pause_s)
            deadline = time.monotonic() + 20
            while len(self.digests) < len(self.files) and time.monotonic() < deadline:
                collector.join(1.0)
                for path in [p for p in self.files if p not in self.digests]:
                    pusher.send(path, timeout=10)
                    self.sent += 1
            results.close()
            collector.join()

    def _collect(self, results: Any) -> None:
        for result in results:
            found = result.payload
            self.answered += 1
            if found["file"] not in self.digests:
                self.digests[found["file"]] = found["sha256"]
                worker = found["worker"]
                self.by_worker[worker] = self.by_worker.get(worker, 0) + 1

    def _kill(self, worker: str) -> None:
        self._watcher.say(f"x killing {worker} with SIGKILL")
        killed = time.monotonic()
        self._watcher.children.processes[worker].kill()
        deadline = killed + 5
        while worker not in self._watcher.left and time.monotonic() < deadline:
            time.sleep(0.001)
        if worker in self._watcher.left:
            self.noticed_s = self._watcher.left[worker][0] - killed


def _query(node: Node, watcher: Watcher, seconds: float) -> list[float]:
    """Ask the aggregator every 10 ms; show a reading now and then. Returns round trips in s."""
    client = node.client("aggregate")
    round_trips: list[float] = []
    end = time.monotonic() + seconds
    shown = time.monotonic()
    while (now := time.monotonic()) < end:
        channel = f"sensors/{list(READINGS)[len(round_trips) % len(READINGS)]}"
        answer = client.request(channel, timeout=5)
        round_trips.append(time.monotonic() - now)
        if answer is not None and now - shown > 1.0:
            shown = now
            last = "  ".join(f"{key} {value:,}" for key, value in answer["last"].items())
            watcher.say(f"  {channel}: {answer['count']} readings, last {last}")
        time.sleep(0.01)
    return round_trips


def _kill_the_aggregator(node: Node, watcher: Watcher) -> dict[str, float]:
    """With all that it knows, and start it again. Returns how many records it had to read for that,
    and the seconds it took."""
    watcher.say(f"x killing {AGGREGATOR} with SIGKILL, and its totals with it; starting it again")
    dead = watcher.children.processes[AGGREGATOR]
    dead.kill()
    dead.wait()
    watcher.children.start(AGGREGATOR, AGGREGATOR)
    client = node.client("aggregate")
    deadline = time.monotonic() + JOIN_S
    caught_up: dict[str, float] = {"records": 0}
    while not caught_up["records"] and time.monotonic() < deadline:
        with contextlib.suppress(PeerLost):  # it was asked the one that is dead
            caught_up = client.request(None, timeout=JOIN_S)["caught_up"]
    watcher.say(
        f"  {AGGREGATOR} has read {caught_up['records']} records of the log again, "
        f"in {caught_up['seconds'] * 1e3:.1f} ms"
    )
    return caught_up


def _settled(node: Node, live: Live, sent: dict[str, int]) -> Totals:
    """The aggregator's, once everybody has all that was sent, or two seconds have passed."""
    client = node.client("aggregate")
    deadline = time.monotonic() + 2
    while True:
        totals: Totals = client.request(None, timeout=5)["totals"]
        counts = {channel: entry["count"] for channel, entry in totals.items()}
        if counts == live.counts == sent or time.monotonic() > deadline:
            return totals
        time.sleep(0.05)


def _summary(
    node: Node,
    watcher: Watcher,
    hashing: Hashing,
    round_trips: list[float],
    sent: dict[str, int],
    live: Live,
    totals: Totals,
    caught_up: dict[str, float],
) -> bool:
    found = watcher.found_s
    direct = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in hashing.files}
    right = sum(hashing.digests.get(path) == digest for path, digest in direct.items())
    appended: Totals = {}
    for record in node.stream(LOG).replay():
        add(appended, *record.payload)
    ordered = sorted(round_trips)
    p50, p99 = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
    noticed = hashing.noticed_s
    click.echo("\nSummary")
    checks: list[tuple[bool, str]] = [
        (
            len(found) == len(watcher.children.processes),
            f"nodes found: {len(found)} of {len(watcher.children.processes)}, "
            f"{min(found.values()):.2f} to {max(found.values()):.2f} s after their start",
        )
    ]
    for channel, count in sent.items():
        got, logged = live.counts[channel], appended.get(channel, {"count": 0})["count"]
        text = f"{channel}: {count} sent, {got} received, {logged} in the log"
        checks.append((got == logged == count, text))
    checks += [
        (live.lost == 0, f"readings lost: {live.lost}"),
        (
            caught_up["records"] > 0 and totals == appended,
            f"the killed aggregator read {caught_up['records']} records again in "
            f"{caught_up['seconds'] * 1e3:.1f} ms; its totals are "
            f"{'' if totals == appended else 'NOT '}those of all {sum(sent.values())} in the log",
        ),
        (
            right == len(direct),
            f"files hashed: {len(hashing.digests)}, {right} of {len(direct)} equal to a direct run"
            f" ({', '.join(f'{k} {v}' for k, v in sorted(hashing.by_worker.items()))})",
        ),
        (
            hashing.sent - hashing.answered <= PREFETCH and watcher.tasks_lost <= PREFETCH,
            f"tasks sent: {hashing.sent}, of them {hashing.sent - len(direct)} again; answered: "
            f"{hashing.answered}; in the killed worker's hands: {watcher.tasks_lost} of at most "
            f"{PREFETCH}",
        ),
        (
            noticed is not None,
            "the killed worker was not noticed"
            if noticed is None
            else f"the killed worker was noticed after {noticed * 1000:.0f} ms",
        ),
        (
            bool(round_trips),
            f"queries answered: {len(round_trips)}, round trip p50 {p50 * 1e3:.2f} ms, "
            f"p99 {p99 * 1e3:.2f} ms",
        ),
    ]
    for held, text in checks:
        click.echo(f"  {'ok  ' if held else 'FAIL'}  {text}")
    dropped = node.stats().dropped
    if dropped:
        click.echo(
            f"        dropped here, none of it an error (docs/operations.md): {dict(dropped)}"
        )
    return all(held for held, _ in checks)
