"""Seeds: what may be written, and names that resolve late, never, or to something else."""

from __future__ import annotations

import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh import limits
from mesh.discovery.seeds import Seed, SeedsSource, parse_seed, resolve_ipv4
from mesh.discovery.source import Announcement
from mesh.errors import InvalidOption

ROOT = Path(__file__).parents[2]
WAIT_S = 5.0

UNANSWERED = """
import threading
from mesh.discovery.seeds import SeedsSource
from mesh.discovery.source import Announcement

asked = threading.Event()

def resolve(host):
    asked.set()
    threading.Event().wait()

source = SeedsSource(["hangs.test:1"], resolve=resolve)
source.start(Announcement(id="", name="", realm="", endpoints=()))
asked.wait()
print("asked", flush=True)
"""
OWN = Announcement(id="0123456789abcdef", name="own", realm="r", endpoints=())


@pytest.fixture
def start() -> Iterator[Callable[..., SeedsSource]]:
    sources = []

    def start(
        *seeds: str, resolve: Callable[[str], list[str]], own: Announcement = OWN
    ) -> SeedsSource:
        source = SeedsSource(seeds, resolve=resolve, resolve_interval_s=0.001)
        source.start(own)
        sources.append(source)
        return source

    yield start
    for source in sources:
        source.close()


def no_name(host: str) -> list[str]:
    raise AssertionError(f"{host} is no name to be resolved")


def own_at(*endpoints: str) -> Announcement:
    return Announcement(id=OWN.id, name=OWN.name, realm=OWN.realm, endpoints=endpoints)


def told(source: SeedsSource) -> list[tuple[str, bool]]:
    """(endpoint, present) of what is told, once there is something."""
    assert select.select([source], [], [], WAIT_S)[0], "nothing was told"
    return [
        (endpoint, sighting.present)
        for sighting in source.sightings()
        for endpoint in sighting.announcement.endpoints
    ]


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        ("10.0.0.7:5555", Seed("10.0.0.7", 5555)),
        ("tcp://10.0.0.7:1", Seed("10.0.0.7", 1)),
        ("robot.local:65535", Seed("robot.local", 65535)),
        ("tcp://robot:5555", Seed("robot", 5555)),
        ("a-b_c.example.org.:80", Seed("a-b_c.example.org.", 80)),
        ("4ever.example:80", Seed("4ever.example", 80)),
        ("127.0.0.1:80", Seed("127.0.0.1", 80)),
    ],
)
def test_a_seed_is_a_host_and_a_port(text: str, seed: Seed) -> None:
    assert parse_seed(text) == seed


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":5555",
        "robot",
        "robot:",
        "10.0.0.7",
        "robot:0",
        "robot:65536",
        "robot:-1",
        "robot:+1",
        "robot:٣",
        "robot:" + "9" * 5000,
        "robot: 5555",
        "robot:5555\n",
        "ro bot:5555",
        "-robot:5555",
        "robot..local:5555",
        "röbot:5555",
        "x" * 64 + ":5555",
        "x." * 127 + "x:5555",
        "10.0.0:5555",
        "10.0.0.256:5555",
        "0.0.0.0:5555",
        "224.0.0.1:5555",
        "[::1]:5555",
        "::1:5555",
        "udp://robot:5555",
        "tcp://tcp://robot:5555",
        "user@robot:5555",
        "robot:5555/path",
    ],
)
def test_anything_else_is_refused_at_once(text: str) -> None:
    with pytest.raises(InvalidOption, match="is not HOST:PORT"):
        SeedsSource([text])


def test_too_many_seeds_are_refused_with_the_numbers() -> None:
    most = [f"10.0.0.1:{port}" for port in range(1, limits.SEEDS_MAX + 1)]
    SeedsSource(most * 2)
    with pytest.raises(InvalidOption, match="65 seeds over the limit of 64"):
        SeedsSource([*most, "10.0.0.2:1"])


def test_addresses_are_told_at_once_and_once_each(start: Callable[..., SeedsSource]) -> None:
    source = start("10.0.0.1:5555", "tcp://10.0.0.1:5555", "10.0.0.2:5555", resolve=no_name)
    assert [s.announcement for s in source.sightings()] == [
        Announcement(id="", name="", realm="", endpoints=("tcp://10.0.0.1:5555",)),
        Announcement(id="", name="", realm="", endpoints=("tcp://10.0.0.2:5555",)),
    ]
    assert source.sightings() == []


def test_a_name_server_that_does_not_answer_holds_nobody_up(
    start: Callable[..., SeedsSource],
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def hang(host: str) -> list[str]:
        if host == "hangs.test":
            asked.set()
            answer.wait(WAIT_S)
        return ["10.0.0.2"]

    before = time.monotonic()
    try:
        source = start("hangs.test:1", "10.0.0.1:1", "answers.test:1", resolve=hang)
        assert asked.wait(WAIT_S)
        heard = set(told(source))
        while len(heard) < 2:
            heard.update(told(source))
        assert heard == {("tcp://10.0.0.1:1", True), ("tcp://10.0.0.2:1", True)}
        source.close()
        assert time.monotonic() - before < 1.0
        assert source.sightings() == []
    finally:
        answer.set()


def test_a_program_does_not_wait_at_its_end_for_a_name_server() -> None:
    run = subprocess.run(
        [sys.executable, "-c", UNANSWERED],
        cwd=ROOT,
        capture_output=True,
        timeout=WAIT_S,
        check=True,
    )
    assert (run.stdout, run.stderr) == (b"asked\n", b"")


def test_a_name_that_does_not_resolve_is_logged_once_counted_and_tried_again(
    start: Callable[..., SeedsSource], caplog: pytest.LogCaptureFixture
) -> None:
    answers: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def resolve(host: str) -> list[str]:
        answer = answers.get()
        if isinstance(answer, OSError):
            raise answer
        return answer

    failure = OSError("no such name")
    for answer in failure, failure, failure, ["10.0.0.1"]:
        answers.put(answer)
    source = start("late.test:5555", resolve=resolve)
    try:
        assert told(source) == [("tcp://10.0.0.1:5555", True)]
        assert source.unresolved == 3
        assert [r.getMessage() for r in caplog.records] == [
            "seed late.test:5555 does not resolve: no such name"
        ]
    finally:
        answers.put(failure)


def test_an_address_is_kept_while_its_name_does_not_resolve(
    start: Callable[..., SeedsSource],
) -> None:
    answers: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def resolve(host: str) -> list[str]:
        if not (answer := answers.get()):
            raise OSError("no such name")
        return answer

    source = start("moves.test:1", resolve=resolve)
    try:
        answers.put(["10.0.0.1"])
        assert told(source) == [("tcp://10.0.0.1:1", True)]
        answers.put([])
        answers.put(["10.0.0.2"])
        heard = set(told(source))
        while len(heard) < 2:
            heard.update(told(source))
        assert heard == {("tcp://10.0.0.2:1", True), ("tcp://10.0.0.1:1", False)}
        assert source.unresolved == 1
    finally:
        answers.put(["10.0.0.2"])


def test_each_address_of_a_name_is_told_apart(start: Callable[..., SeedsSource]) -> None:
    """They may be different nodes, and one that is two names' goes only with the last."""
    names = {"a.test": ["10.0.0.1", "10.0.0.2"], "b.test": ["10.0.0.2"]}
    source = start("a.test:1", "b.test:1", resolve=lambda host: names[host])
    heard = dict(told(source))
    while len(heard) < 2:
        heard.update(told(source))
    assert heard == {"tcp://10.0.0.1:1": True, "tcp://10.0.0.2:1": True}
    names["a.test"] = []
    assert told(source) == [("tcp://10.0.0.1:1", False)]
    names["b.test"] = []
    assert told(source) == [("tcp://10.0.0.2:1", False)]


def test_ones_own_address_is_left_out_and_told_when_it_is_ones_own_no_longer(
    start: Callable[..., SeedsSource],
) -> None:
    source = start("10.0.0.1:1", "10.0.0.2:1", resolve=no_name, own=own_at("tcp://10.0.0.1:1"))
    assert told(source) == [("tcp://10.0.0.2:1", True)]
    source.update(own_at("tcp://10.0.0.2:1"))
    assert told(source) == [("tcp://10.0.0.1:1", True), ("tcp://10.0.0.2:1", False)]


def test_a_name_is_resolved_to_addresses_of_ipv4() -> None:
    assert resolve_ipv4("localhost") == ["127.0.0.1"]


def test_a_name_that_cannot_be_asked_for_is_one_that_does_not_resolve() -> None:
    """Python says `UnicodeError` for a level of more than 63 characters."""
    with pytest.raises(OSError, match="cannot be put as a question to DNS"):
        resolve_ipv4("x" * 64 + ".invalid")
