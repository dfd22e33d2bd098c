"""Every example runs, as its own docstring says to run it."""

from __future__ import annotations

import inspect
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh import Node

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RUNNERS = {
    "topic",
    "work_queue",
    "request_reply",
    "asyncio_service",
    "presence",
    "numpy_frames",
    "stream",
    "orders",
    "replay",
}


class Example:
    def __init__(self, name: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(EXAMPLES / f"{name}.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(self) -> list[str]:
        """All that it prints, once it has ended well."""
        out, err = self.process.communicate(timeout=30)
        assert (self.process.returncode, err) == (0, "")
        return out.splitlines()

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.communicate(timeout=10)


@pytest.fixture
def background() -> Iterator[list[Example]]:
    """Examples to be ended with the test."""
    running: list[Example] = []
    yield running
    for example in running:
        example.end()


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUNNERS


@pytest.mark.parametrize("name", sorted(RUNNERS))
def test_an_example_can_be_read_at_a_glance(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 55


def test_topic() -> None:
    publisher, subscriber = Example("topic", "publish"), Example("topic")
    lines = subscriber.lines()
    assert lines[0].endswith("sensors/kitchen/temp {'celsius': 20.0}")
    assert len(lines) == 11
    assert lines[-1] == "lost: 0"
    publisher.lines()


def test_work_queue(background: list[Example]) -> None:
    worker = Example("work_queue", "work")
    background.append(worker)
    Example("work_queue").lines()
    assert worker.process.stdout is not None
    done = [worker.process.stdout.readline() for _ in range(10)]
    assert done == [f"{n} squared is {n * n}\n" for n in range(10)]


def test_request_reply(background: list[Example]) -> None:
    background.append(Example("request_reply", "serve"))
    assert Example("request_reply").lines() == [
        "3.5",
        "the server said: ZeroDivisionError: division by zero",
    ]


def test_asyncio_service() -> None:
    assert Example("asyncio_service").lines() == ["4950"]


def test_numpy_frames() -> None:
    camera, viewer = Example("numpy_frames", "camera"), Example("numpy_frames")
    assert viewer.lines() == [f"{n} (480, 640, 3) uint8 {n}.0" for n in range(10)]
    camera.lines()


def test_presence(background: list[Example]) -> None:
    watcher = Example("presence")
    background.append(watcher)
    assert watcher.process.stdout is not None
    assert watcher.process.stdout.readline().startswith("I am ")
    other = Example("presence")
    background.append(other)
    pid = other.process.pid
    assert watcher.process.stdout.readline() == f"joined watcher {pid} \n"
    other.end()
    assert watcher.process.stdout.readline() == f"left watcher {pid} died\n"
    out, err = watcher.process.communicate("\n", timeout=10)
    assert (out, err) == ("here now: []\n", "")


def test_two_machines_names_things_that_exist() -> None:
    text = (EXAMPLES / "two_machines.md").read_text()
    options = re.findall(r"Node\([^)]*?(\w+)=", text)
    assert set(options) == {"port", "seeds", "interfaces"}
    assert set(options) <= set(inspect.signature(Node).parameters)
    assert "node.untrusted" in text
    assert hasattr(Node, "untrusted")
    variables = set(re.findall(r"MESH_[A-Z_]+", text))
    assert variables <= set(re.findall(r"MESH_[A-Z_]+", (ROOT / "mesh" / "node.py").read_text()))
    for example in re.findall(r"examples/\w+\.py", text):
        assert (ROOT / example).exists()


def test_stream(tmp_path: Path) -> None:
    for run in range(3):
        assert Example("stream", str(tmp_path)).lines() == [
            f"order {run} is fsynced",
            f"billing {run} {{'item': 'lamp'}}",
            f"orders so far: {list(range(run + 1))}",
        ]


def test_orders() -> None:
    assert Example("orders").lines() == [
        "300 orders are appended",
        "order 99 is billed, and billing is killed with -9",
        "order 199 is billed, and billing is killed with -9",
        "order 299 is billed, and billing is killed with -9",
        "300 bills for 300 orders",
    ]


def test_the_check_of_orders_can_fail(tmp_path: Path) -> None:
    """What is billed without a look at what was billed before, is billed twice."""
    source = (EXAMPLES / "orders.py").read_text()
    forgetful = source.replace("db.execute(NEW, record.position).rowcount", "True")
    assert forgetful != source
    (tmp_path / "orders.py").write_text(forgetful)
    command = [sys.executable, str(tmp_path / "orders.py")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (process.returncode, process.stderr) == (1, "")
    assert re.search(r"3\d\d bills for 300 orders$", process.stdout.strip())


def test_replay() -> None:
    assert Example("replay").lines() == [
        "all: [18.5, 19.0, 19.5, 20.0, 20.5]",
        "from noon on: [20.0, 20.5]",
        "offset 0 is 18.5",
        "offset 1 is 19.0",
        "offset 2 is 19.5",
        "offset 3 is 20.0",
        "offset 4 is 20.5",
        "offset 5 is 21.0",
    ]
