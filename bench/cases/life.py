"""What does it cost to start a node, to have one, and to lose one? Beside the design's budgets.

Starting: from exec of a program to its first message from a publisher that runs already, in fresh
processes, which find everything compiled, as an installed package is.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bench.case import Case, Selection
from bench.floors import BUDGET, budget_of
from bench.processes import START_S, Failed, Process
from bench.rows import Result, Row, Skipped, Unit, better, quartiles

if TYPE_CHECKING:
    from mesh import PeerEvent

OPTIONS = 'dict(discovery=("mdns",), interfaces=("127.0.0.1",)) if sys.argv[1:] == ["mdns"] else {}'
PUBLISHER = f"""
    import sys, time
    from mesh import Node
    node = Node("publisher", **{OPTIONS})
    publisher = node.publisher("t", keep_last=True)
    publisher.send(0)
    print("ready", flush=True)
    sys.stdin.read()
"""
SUBSCRIBER = f"""
    import sys
    from mesh import Node
    node = Node("subscriber", **{OPTIONS})
    with node.subscriber("t") as subscriber:
        subscriber.recv(timeout=20)
        print("received", flush=True)
        sys.stdin.read()
"""
IMPORT = """
    import time
    start = time.perf_counter()
    import mesh
    print(time.perf_counter() - start, flush=True)
"""
IDLE = """
    import sys, time
    from mesh import Node
    node = Node("idle")
    print("ready", flush=True)
    time.sleep(min(1, float(sys.argv[1])))  # it may still be starting
    start, cpu = time.perf_counter(), time.process_time()
    time.sleep(float(sys.argv[1]))
    percent = (time.process_time() - cpu) / (time.perf_counter() - start) * 100
    rss = [line for line in open("/proc/self/status") if line.startswith("VmRSS")][0].split()[1]
    print(percent, int(rss) * 1024 / 1e6, flush=True)
"""


@contextlib.contextmanager
def place() -> Iterator[str]:
    """A directory for nodes that nobody else meets in."""
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as directory:
        yield directory


def started(directory: str, source: str, *arguments: str, secret: str = "") -> Process:
    env = {
        "MESH_RUNTIME_DIR": f"{directory}/run",
        "MESH_REALM": "bench",
        "MESH_SEEDS": "",
        "MESH_SECRET": secret,
        "PYTHONDONTWRITEBYTECODE": "",
    }
    command = [sys.executable, "-c", textwrap.dedent(source), *arguments]
    return Process(command, directory=directory, env=env)


def against_budget(case: str, values: Sequence[float], unit: Unit) -> Row:
    budget, value = budget_of(case), statistics.median(values)
    low, high = quartiles([better(value, budget, unit) for value in values])
    return Row(
        case=case,
        transport="ipc",
        size=0,
        peer=BUDGET,
        ours=value,
        theirs=budget,
        ratio=better(value, budget, unit),
        low=low,
        high=high,
        unit=unit,
        rounds=len(values),
        lost=0,
    )


def guarded(case: str, results: Iterator[Result]) -> Iterator[Result]:
    """The results, and what failed named as such."""
    try:
        yield from results
    except Failed as error:
        yield Skipped(
            case=case, transport="ipc", size=0, peer=BUDGET, skipped=str(error), failed=True
        )


def joining(source: str, rounds: int) -> list[float]:
    secret = secrets.token_urlsafe(24) if source == "mdns" else ""
    times = []
    with place() as directory, contextlib.ExitStack() as ending:
        publisher = started(directory, PUBLISHER, source, secret=secret)
        ending.callback(publisher.kill)
        publisher.line(START_S)
        for _ in range(rounds):
            start = time.perf_counter()
            subscriber = started(directory, SUBSCRIBER, source, secret=secret)
            ending.callback(subscriber.kill)
            subscriber.line(START_S)
            times.append(time.perf_counter() - start)
            subscriber.kill()
    return times


def importing(rounds: int) -> list[float]:
    times = []
    with place() as directory:
        for _ in range(rounds + 1):  # the first may compile
            process = started(directory, IMPORT)
            try:
                times.append(float(process.line(START_S)))
            finally:
                process.kill()
    return times[1:]


def start(selection: Selection) -> Iterator[Result]:
    rounds = selection.scale.fresh

    def results() -> Iterator[Result]:
        yield against_budget("join-local", joining("local", rounds), "s")
        yield against_budget("join-mdns", joining("mdns", rounds), "s")
        yield against_budget("import", importing(rounds), "s")

    return guarded("start", results())


def noticing(rounds: int) -> list[float]:
    """Seconds from SIGKILL of a peer until the hook is told."""
    from mesh import Node

    times = []
    with place() as directory, mesh_environment(directory), Node("watcher") as node:
        events: queue.Queue[PeerEvent] = queue.Queue()
        node.on_peer(events.put)
        for _ in range(rounds):
            victim = started(directory, PUBLISHER)
            try:
                victim.line(START_S)
                expect(events, "joined")
                start = time.perf_counter()
                victim.kill()
                expect(events, "left")
                times.append(time.perf_counter() - start)
            finally:
                victim.kill()
    return times


def expect(events: queue.Queue[PeerEvent], kind: str) -> None:
    try:
        event = events.get(timeout=10)
    except queue.Empty:
        raise Failed(f"no peer {kind} within 10 s") from None
    if event.kind != kind:
        raise Failed(f"a peer {event.kind}, instead of {kind}")


@contextlib.contextmanager
def mesh_environment(directory: str) -> Iterator[None]:
    """For a node in this process."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("MESH_")}
    for name in kept:
        del os.environ[name]
    os.environ |= {"MESH_RUNTIME_DIR": f"{directory}/run", "MESH_REALM": "bench"}
    try:
        yield
    finally:
        for name in ("MESH_RUNTIME_DIR", "MESH_REALM"):
            os.environ.pop(name, None)
        os.environ |= kept


def death(selection: Selection) -> Iterator[Result]:
    def results() -> Iterator[Result]:
        yield against_budget("death", noticing(selection.scale.fresh), "s")

    return guarded("death", results())


def idle(selection: Selection) -> Iterator[Result]:
    seconds = selection.scale.idle_s

    def results() -> Iterator[Result]:
        with place() as directory:
            process = started(directory, IDLE, str(seconds))
            try:
                process.line(START_S)
                cpu, rss = map(float, process.line(seconds + START_S).split())
            finally:
                process.kill()
        yield against_budget("idle-rss", [rss], "MB")
        yield against_budget("idle-cpu", [cpu], "%")

    return guarded("idle", results())


CASES = (
    Case("start", "exec of a program to its first message; import mesh", start),
    Case("death", "SIGKILL of a peer until the others are told, same host", death),
    Case("idle", "memory and processor time of a node that does nothing", idle),
)
