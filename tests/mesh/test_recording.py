"""Topics recorded into streams, and gaps filled from them: real nodes, real logs, real ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh import Node
from mesh.durable import recording
from mesh.durable.reading import Record
from mesh.errors import Closed, InvalidName, InvalidOption, NoSidecar, Timeout
from mesh.message import Loss, Message
from mesh.options import StreamOptions, WhenFull
from mesh.sockets.publisher import Publisher
from mesh.sockets.repairing import RepairingSubscription
from mesh.sockets.repairs import Repairs
from mesh.sockets.subscriber import Subscriber
from tests.support.processes import Programs
from tests.support.waiting import until

SIDECAR = """
    import sys
    from mesh import Node

    with Node("sidecar", durable=sys.argv[1]):
        print("ready")
        sys.stdin.read()
"""
TINY: dict[str, Any] = {"buffer_messages": 4, "buffer_bytes": 1 << 20}
"""So that whoever does not read soon misses something."""


@pytest.fixture(params=["embedded", "sidecar"])
def node(request: pytest.FixtureRequest, tmp_path: Path, programs: Programs) -> Iterator[Node]:
    """A publisher's, whose log is in its own process, or in another."""
    if request.param == "embedded":
        with Node("publisher", durable=tmp_path / "log", **TINY) as node:
            yield node
    else:
        programs.start(SIDECAR, str(tmp_path / "log")).expect("ready")
        with Node("publisher", **TINY) as node:
            node.wait_for_peers(1, timeout=5)
            yield node


@pytest.fixture
def reader() -> Iterator[Node]:
    with Node("reader", **TINY) as node:
        yield node


def flood(publisher: Publisher, count: int, first: int = 0) -> None:
    """More than the buffers take, in frames of one and of many."""
    for number in range(first, first + count):
        publisher.send({"n": number, "pad": b"x" * 3000})


def numbers(messages: list[Message]) -> list[int]:
    return [message.payload["n"] for message in messages]


def take(subscriber: Subscriber, count: int, timeout: float = 10) -> list[Message]:
    got: list[Message] = []
    while len(got) < count:
        got += subscriber.recv_many(timeout=timeout)
    return got


def no_thread(name: str) -> bool:
    return not any(thread.name.startswith(name) for thread in threading.enumerate())


# -- Recording


def test_what_is_published_is_in_the_stream_with_its_origin(node: Node) -> None:
    kept = node.record("sensors/**", into="readings")
    before = time.time_ns()
    kitchen, other = node.publisher("sensors/kitchen/temp"), node.publisher("motors/left")
    hall = node.publisher("sensors/hall", when_full="wait")
    kitchen.send(21.5, headers={"unit": "C"})
    other.send("not this")
    kitchen.send_many(range(2000))
    hall.send(b"x" * 200_000)
    kept.flush()
    records = list(node.stream("readings").replay())
    of: dict[str, list[Record]] = {"sensors/kitchen/temp": [], "sensors/hall": []}
    for record in records:
        assert record.origin is not None
        assert record.origin.sender == node.id
        assert before <= record.origin.time_ns <= time.time_ns()
        of[record.origin.channel].append(record)
    assert [each.payload for each in of["sensors/kitchen/temp"]] == [21.5, *range(2000)]
    assert [each.payload for each in of["sensors/hall"]] == [b"x" * 200_000]
    assert [each.origin.seq for each in of["sensors/kitchen/temp"] if each.origin] == list(
        range(1, 2002)
    )
    assert dict(records[0].headers) == {"unit": "C"}
    assert (kept.recorded, kept.lost) == (2002, 0)
    assert node.stream("readings").append("by hand").offset == 2002
    assert list(node.stream("readings").replay())[-1].origin is None


def test_a_recording_begins_with_what_comes_and_ends_with_what_came(node: Node) -> None:
    publisher = node.publisher("a")
    publisher.send_many(["before"] * 3)
    with contextlib.closing(node.record("*", into="s")) as recording:
        publisher.send_many(["during"] * 3)
    publisher.send_many(["after"] * 3)
    recording.close()
    recording.flush()
    assert [(r.payload, r.origin.seq) for r in node.stream("s").replay() if r.origin] == [
        ("during", seq) for seq in (4, 5, 6)
    ]
    until(lambda: no_thread("mesh record"))


def test_of_two_recordings_into_one_stream_one_records(node: Node) -> None:
    wide, narrow = node.record("a/**", into="s"), node.record("a/b", into="s")
    also = node.record("a/*", into="t")
    publisher = node.publisher("a/b")
    publisher.send(1)
    wide.flush()
    wide.close()
    publisher.send(2)
    for each in (wide, narrow, also):
        each.flush()
    assert (wide.recorded, narrow.recorded, also.recorded) == (1, 1, 2)
    assert [record.payload for record in node.stream("s").replay()] == [1, 2]
    assert [record.payload for record in node.stream("t").replay()] == [1, 2]


@pytest.mark.slow
def test_what_was_published_before_the_node_closes_is_recorded(
    tmp_path: Path, programs: Programs
) -> None:
    programs.start(SIDECAR, str(tmp_path / "log")).expect("ready")
    with Node("publisher") as node:
        node.wait_for_peers(1, timeout=5)
        recording = node.record("a", into="s")
        node.publisher("a").send_many(range(3000))
    assert (recording.recorded, recording.lost) == (3000, 0)
    assert no_thread("mesh record")
    with Node("reader") as reader:
        assert [record.payload for record in reader.stream("s").replay()] == list(range(3000))


def test_what_waited_for_a_window_as_the_node_closed_is_recorded(tmp_path: Path) -> None:
    with Node("publisher", durable=tmp_path / "log", batch_window_ms=1000) as node:
        kept = node.record("a", into="s")
        publisher = node.publisher("a")
        for number in range(100):
            publisher.send(number)
        assert kept.recorded < 100
    assert (kept.recorded, kept.lost) == (100, 0)


def test_a_node_that_closes_still_finds_the_sidecar_for_what_it_records(
    tmp_path: Path, programs: Programs
) -> None:
    programs.start(SIDECAR, str(tmp_path / "log")).expect("ready")
    with Node("publisher") as node:
        node.wait_for_peers(1, timeout=5)
        gate = threading.Event()
        node._parts.loop.post(gate.wait)  # it has to find it through its control thread
        kept = node.record("a", into="s")
        node.publisher("a").send("x")
        closing = threading.Thread(target=node.close)
        closing.start()
        until(lambda: node.closed)
        gate.set()
        closing.join(10)
    assert (kept.recorded, kept.lost) == (1, 0)


def test_bad_options_are_refused(reader: Node) -> None:
    with pytest.raises(InvalidName):
        reader.record("a//b", into="s")
    with pytest.raises(InvalidName):
        reader.record("a", into="s/*")
    with pytest.raises(InvalidOption, match="latest_only=True keeps no message"):
        reader.subscriber("a", repair=True, latest_only=True)
    with pytest.raises(InvalidOption, match="repair_timeout takes seconds, not None"):
        reader.subscriber("a", repair=True, repair_timeout=None)  # type: ignore[arg-type]


def test_the_number_of_recordings_is_bounded(reader: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.limits.RECORDINGS_MAX", 2)
    first = reader.record("a", into="s")
    reader.record("a", into="t")
    with pytest.raises(InvalidOption, match="2 recordings are open, which is the limit"):
        reader.record("a", into="u")
    first.close()
    reader.record("a", into="u")


# -- What cannot be recorded


@pytest.mark.slow
def test_without_a_sidecar_the_publisher_goes_on_and_what_has_no_room_is_counted(
    reader: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.RECORDING_BYTES_MAX", 100_000)
    recording = reader.record("a", into="s")
    flood(reader.publisher("a"), 1000)
    with pytest.raises(
        Timeout, match=r"no answer for all that was published on 'a' within 0\.05 s"
    ):
        recording.flush(timeout=0.05)
    assert 0 < recording.lost < 1000
    assert reader.stats().dropped["not recorded"] == recording.lost
    reader.close()
    assert (recording.recorded, recording.lost) == (0, 1000)


@pytest.mark.slow
def test_a_recording_without_a_sidecar_says_so(
    reader: Node, caplog: pytest.LogCaptureFixture
) -> None:
    recording = reader.record("a", into="s")
    reader.publisher("a").send(1)
    text = r"no answer for all that was published on 'a' within 1 s: no sidecar was found .*mesh "
    with pytest.raises(NoSidecar, match=text):
        recording.flush(timeout=1)
    with pytest.raises(NoSidecar, match=r"0\.1 s: no sidecar was found"):
        asyncio.run(recording.aflush(timeout=0.1))
    reader.close()
    waits, ended = caplog.messages
    assert waits.startswith("recording of 'a' into 's' waits: no sidecar was found")
    assert "into 's' ended with 1 messages not recorded: no sidecar was found" in ended


def test_what_waits_for_a_sidecar_is_recorded_once_there_is_one(
    reader: Node, tmp_path: Path
) -> None:
    recording = reader.record("a", into="s")
    flood(reader.publisher("a"), 100)
    assert (recording.recorded, recording.lost) == (0, 0)
    with Node("sidecar", durable=tmp_path / "log"):
        recording.flush()
        assert (recording.recorded, recording.lost) == (100, 0)


@pytest.mark.slow
def test_a_log_that_is_gone_for_good_is_left_for_another(
    tmp_path: Path,
    programs: Programs,
    reader: Node,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was under way there is not known to be recorded."""
    monkeypatch.setattr("mesh.durable.recording._GONE_S", 0.5)
    first = programs.start(SIDECAR, str(tmp_path / "first"))
    first.expect("ready")
    recording, publisher = reader.record("t", into="kept"), reader.publisher("t")
    publisher.send("before")
    recording.flush()
    second = programs.start(SIDECAR, str(tmp_path / "second"))
    second.expect("ready")
    until(lambda: len(reader.peers) == 2)
    first.kill(signal.SIGSTOP)
    publisher.send(1)
    until(lambda: recording._core._under_way)
    first.kill()
    published = 2
    while recording.recorded < 10:
        publisher.send(published)
        published += 1
        until(lambda: recording._core.account.settled_to >= published - 3)  # noqa: B023
    recording.flush()
    assert recording.recorded + recording.lost == published
    assert recording.lost
    kept = [record.payload for record in reader.stream("kept").replay()]
    assert len(kept) == recording.recorded - 1, "and one is in the log that is gone"
    began = time.monotonic()
    reader.close(timeout=5)
    assert time.monotonic() - began < 2, "nothing is under way to the one that is gone"


def test_what_a_full_log_refuses_is_counted_and_the_publisher_goes_on(node: Node) -> None:
    node.stream("s", options=StreamOptions(bytes_max=20_000)).append("made")
    recording = node.record("a", into="s")
    publisher = node.publisher("a")
    for number in range(100):
        publisher.send(b"x" * 1000)
        publisher.send(number, headers={"alone": True})
    recording.flush()
    assert recording.lost > 50
    assert recording.recorded + recording.lost == 200
    assert node.stats().dropped["not recorded"] == recording.lost
    kept = [record for record in node.stream("s").replay() if record.origin]
    assert len(kept) == recording.recorded


def test_a_publisher_that_waits_waits_for_room_in_the_recording(
    reader: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mesh.limits.RECORDING_BYTES_MAX", 5_000)
    recording = reader.record("a", into="s")
    publisher = reader.publisher("a", when_full="wait")
    sent = 0
    with contextlib.suppress(Timeout):
        while sent < 1000:
            publisher.send([sent], headers={"alone": True}, timeout=0.05)
            sent += 1
    assert 0 < sent < 1000
    assert recording.lost == 0
    with Node("sidecar", durable=tmp_path / "log"):
        publisher.send([sent], headers={"alone": True}, timeout=10)
        recording.flush()
        assert (recording.recorded, recording.lost) == (sent + 1, 0)
        payloads = [record.payload for record in reader.stream("s").replay()]
        assert payloads == [[n] for n in range(sent + 1)]


def test_what_is_too_large_for_a_record_is_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    with Node("publisher", durable=tmp_path / "log", message_bytes_max=100_000) as node:
        kept, publisher = node.record("a", into="s"), node.publisher("a")
        publisher.send(b"x" * 100_000)
        publisher.send("small")
        kept.flush()
        assert (kept.recorded, kept.lost) == (1, 1)
        assert [record.payload for record in node.stream("s").replay()] == ["small"]


def test_a_producer_that_the_log_refuses_is_tried_again_as_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_AGAIN_S", 0.01)
    monkeypatch.setattr("mesh.limits.STREAMS_MAX", 0)
    with Node("publisher", durable=tmp_path / "log") as node:
        kept = node.record("a", into="s")
        publisher = node.publisher("a")
        publisher.send("refused")
        until(lambda: kept.lost == 1)
        monkeypatch.setattr("mesh.limits.STREAMS_MAX", 10)

        def recorded() -> bool:
            publisher.send("again")
            kept.flush()
            return kept.recorded > 0

        until(recorded)


# -- Repairing


@pytest.mark.slow
def test_a_subscriber_that_falls_behind_loses_nothing_with_repair(node: Node, reader: Node) -> None:
    recording = node.record("s/**", into="readings")
    one, two = node.publisher("s/1"), node.publisher("s/2")
    repairing, plain = reader.subscriber("s/*", repair=True), reader.subscriber("s/*")
    for publisher in (one, two):
        publisher.wait_for(2, timeout=5)
    flood(one, 4000)
    flood(two, 1000)
    two.send({"n": 1000}, headers={"last": True})
    got = take(repairing, 5001)
    for channel, count in (("s/1", 4000), ("s/2", 1001)):
        of = [message for message in got if message.channel == channel]
        assert numbers(of) == list(range(count))
        assert [message.seq for message in of] == list(range(1, count + 1))
        assert {message.sender for message in of} == {node.id}
    assert dict([m for m in got if m.channel == "s/2"][-1].headers) == {"last": True}
    repaired = repairing.repaired[node.id]
    assert 0 < repaired <= 5001
    assert dict(repairing.lost) == {}
    arrived = 0
    while arrived + plain.lost.get(node.id, 0) < 5001:
        with contextlib.suppress(Timeout):
            arrived += len(plain.recv_many(timeout=0.1))
    assert plain.lost[node.id] > 0, "or nothing was repaired above"
    assert dict(plain.repaired) == {}
    assert recording.lost == 0


@pytest.mark.slow
def test_a_lost_tail_is_repaired_too(node: Node, reader: Node) -> None:
    node.record("a", into="s")
    publisher = node.publisher("a")
    subscriber = reader.subscriber("a", repair=True)
    publisher.wait_for(1, timeout=5)
    flood(publisher, 3000)
    assert numbers(take(subscriber, 3000)) == list(range(3000))
    assert subscriber.repaired[node.id] > 0


@pytest.mark.parametrize("when_full", ["drop", "wait"])
def test_topics_that_wait_and_that_drop_are_told_apart(
    node: Node, reader: Node, when_full: WhenFull
) -> None:
    """Closed, a topic may go on as one of the other kind, whose sequence is another."""
    kept = node.record("a", into="s")
    kinds: list[WhenFull] = ["drop", "wait"]
    for kind in kinds:
        with node.publisher("a", when_full=kind) as publisher:
            for number in range(3):
                publisher.send([kind, number], headers={"alone": True})
    kept.flush()
    subscriber = reader.subscriber("a", repair=True)
    core = subscriber._core
    with core.link:  # as if it had been there
        owner = int(node.id, 16) << 1 | (when_full == "wait")
        core.arrivals._missed(owner, "a", 1, 3)
    got = [subscriber.recv(timeout=10).payload for _ in range(3)]
    assert got == [[when_full, number] for number in range(3)]


def test_a_gap_is_filled_though_the_clocks_differ_by_an_hour(
    node: Node, reader: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.durable.search.PATIENCE_S", 0.05)
    kept, publisher = node.record("a", into="s"), node.publisher("a")
    publisher.send_many(["x"] * 3)
    kept.flush()
    subscriber = reader.subscriber("a", repair=True)
    assert isinstance(subscriber._core, RepairingSubscription)
    arrivals = subscriber._core.arrivals
    arrivals._began_ns += 3600 * 10**9
    with subscriber._core.link:
        arrivals._missed(int(node.id, 16) << 1, "a", 1, 3)
    assert [subscriber.recv(timeout=10).seq for _ in range(3)] == [1, 2, 3]


@pytest.mark.slow
def test_one_who_is_too_slow_all_the_time_gets_all_at_its_own_pace(
    node: Node, reader: Node
) -> None:
    node.record("a/*", into="s")
    publishers = [node.publisher(f"a/{number}") for number in range(5)]
    subscriber = reader.subscriber("a/*", repair=True)
    publishers[0].wait_for(1, timeout=5)

    def publish() -> None:
        for number in range(6000):
            publishers[number % 5].send({"n": number, "pad": b"x" * 3000})

    thread = threading.Thread(target=publish)
    thread.start()
    got: dict[str, list[int]] = {publisher.channel: [] for publisher in publishers}
    while sum(map(len, got.values())) < 6000:
        for message in subscriber.recv_many(timeout=10, count_max=50):
            got[message.channel].append(message.payload["n"])
    thread.join()
    for number, of in enumerate(got.values()):
        assert of == list(range(number, 6000, 5))
    assert dict(subscriber.lost) == {}


@pytest.mark.slow
def test_asyncio_has_the_same(node: Node, reader: Node) -> None:
    async def main() -> None:
        recording = node.record("a", into="s")
        publisher = node.publisher("a")
        async with reader.subscriber("a", repair=True) as subscriber:
            publisher.wait_for(1, timeout=5)
            waiting = asyncio.create_task(subscriber.arecv(10))
            await asyncio.sleep(0)
            flood(publisher, 3000)
            got = [await waiting]
            with contextlib.suppress(TimeoutError):  # cancelled in the midst: nothing is lost
                await asyncio.wait_for(subscriber.arecv(10), 0.0)
            while len(got) < 1500:
                got.append(await subscriber.arecv(10))
            while len(got) < 3000:
                got += await subscriber.arecv_many(timeout=10)
            await recording.aflush()
            assert numbers(got) == list(range(3000))
            assert recording.recorded == 3000

    asyncio.run(main())


@pytest.mark.parametrize("begins", ["never", "too late"])
@pytest.mark.slow
def test_what_no_log_has_is_a_counted_gap_after_the_timeout(
    node: Node, reader: Node, begins: str
) -> None:
    publisher = node.publisher("a")
    subscriber = reader.subscriber("a", repair=True, repair_timeout=0.3)
    losses: list[Loss] = []
    subscriber.on_loss(losses.append)
    publisher.wait_for(1, timeout=5)
    flood(publisher, 3000)
    if begins == "too late":
        node.record("a", into="s")
        flood(publisher, 1000, 3000)
    sent = 3000 if begins == "never" else 4000
    got: list[Message] = []
    while len(got) + subscriber.lost.get(node.id, 0) < sent:
        with contextlib.suppress(Timeout):
            got += subscriber.recv_many(timeout=0.1)
    assert numbers(got) == sorted(set(numbers(got)))
    until(lambda: sum(loss.count for loss in losses) == subscriber.lost[node.id])
    missed = {seq for loss in losses for seq in range(loss.first, loss.last + 1)}
    assert missed | {message.seq for message in got} == set(range(1, sent + 1))
    assert max(missed) <= 3000, "what was recorded is not lost"
    if begins == "too late":
        assert numbers(got)[-1000:] == list(range(3000, 4000))


@pytest.mark.slow
def test_a_gap_of_a_killed_publisher_is_filled_from_the_log_that_lives_on(
    tmp_path: Path, programs: Programs, reader: Node
) -> None:
    sidecar = programs.start(SIDECAR, str(tmp_path / "log"))
    sidecar.expect("ready")
    program = programs.start(
        """
        import sys
        from mesh import Node

        node = Node("publisher", buffer_messages=4, buffer_bytes=1 << 20)
        node.wait_for_peers(2, timeout=10)
        recording = node.record("a", into="s")
        publisher = node.publisher("a")
        publisher.wait_for(1, timeout=10)
        for number in range(3000):
            publisher.send({"n": number, "pad": b"x" * 3000})
        recording.flush()
        print(recording.recorded)
        sys.stdin.read()
        """
    )
    subscriber = reader.subscriber("a", repair=True)
    program.expect("3000")
    (sender,) = {id for id, peer in reader.peers.items() if peer.name == "publisher"}
    sidecar.kill(signal.SIGSTOP)  # so that nothing is repaired before it is gone
    got: list[Message] = []
    last_wanted = 0
    while last_wanted < 3000:  # the publisher has fallen quiet, and its mark has come
        with contextlib.suppress(Timeout):
            got += subscriber.recv_many(timeout=0.05)
        last_wanted = max((want.last for want in _repairs(subscriber).wants()), default=0)
    program.kill()
    until(lambda: sender not in reader.peers)
    sidecar.kill(signal.SIGCONT)
    got += take(subscriber, 3000 - len(got))
    assert numbers(got) == list(range(3000))
    assert subscriber.repaired[sender] > 0


def test_other_topics_are_not_held_up_by_a_gap(node: Node, reader: Node) -> None:
    publisher, other = node.publisher("s/a"), node.publisher("s/b")
    subscriber = reader.subscriber("s/*", repair=True, repair_timeout=60)
    publisher.wait_for(1, timeout=5)
    other.send("first")
    flood(publisher, 2000)
    until(lambda: reader.stats().received and _gaps(subscriber, lambda: other.send("other")))
    got: list[Message] = []
    while not got:
        got = [m for m in take(subscriber, 1) if m.payload == "other"]
    assert _is_open(subscriber), "the gap is there still"


@pytest.mark.parametrize("how", ["subscriber", "node"])
def test_closing_in_the_midst_of_a_repair_leaves_nothing_behind(node: Node, how: str) -> None:
    with Node("reader", **TINY) as reader:
        publisher = node.publisher("a")
        subscriber = reader.subscriber("a", repair=True, repair_timeout=60)
        publisher.wait_for(1, timeout=5)
        flood(publisher, 2000)
        node.record("a", into="s")  # where none of it is
        until(lambda: _gaps(subscriber, lambda: None))
        raised: list[type[Exception]] = []

        def receive() -> None:
            try:
                while True:
                    subscriber.recv(timeout=30)
            except (Closed, Timeout) as error:
                raised.append(type(error))

        thread = threading.Thread(target=receive)
        thread.start()
        (subscriber if how == "subscriber" else reader).close()
        thread.join(5)
        assert raised == [Closed]
    assert no_thread("mesh repair")


def test_aclose_in_the_midst_of_a_repair_does_not_hang(node: Node) -> None:
    reader = Node("reader", **TINY)
    publisher = node.publisher("a")
    subscriber = reader.subscriber("a", repair=True, repair_timeout=60)
    publisher.wait_for(1, timeout=5)
    flood(publisher, 2000)
    until(lambda: _gaps(subscriber, lambda: None))

    async def receive() -> None:
        async for _ in subscriber:
            pass

    async def main() -> None:
        receiving = asyncio.create_task(receive())
        await asyncio.sleep(0)
        await reader.aclose()
        await asyncio.wait_for(receiving, 5)

    asyncio.run(main())
    assert no_thread("mesh repair")


def _repairs(subscriber: Subscriber) -> Repairs:
    assert isinstance(subscriber._core, RepairingSubscription)
    return subscriber._core.arrivals.repairs


def _is_open(subscriber: Subscriber) -> bool:
    return bool(_repairs(subscriber).flows)


def _gaps(subscriber: Subscriber, meanwhile: Callable[[], object]) -> bool:
    """Read on until there is a gap."""
    if not _is_open(subscriber):
        with contextlib.suppress(Timeout):
            subscriber.recv_many(timeout=0.05)
    if _is_open(subscriber):
        meanwhile()
        return True
    return False
