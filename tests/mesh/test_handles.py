"""What handles leave behind when they are given back: nothing, and at once where somebody asks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesh import Node, OptionsDiffer, Timeout
from mesh.options import WhenFull
from tests.support.waiting import until


def offered(by: Node, to: Node) -> list[tuple[str, str]]:
    """What `to` knows of what `by` offers."""
    peers = to._parts.membership.peers
    offers = to._parts.on_loop(lambda: list(peers[by.id].offers.values()))
    return sorted((offer.kind, offer.channel) for offer in offers)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda node: node.publisher("c"), "publish"),
        (lambda node: node.publisher("c", when_full="wait"), "publish"),
        (lambda node: node.pusher("c"), "push"),
        (lambda node: node.puller("c"), "pull"),
    ],
)
@pytest.mark.parametrize("forgotten", [False, True])
def test_what_is_given_back_is_no_longer_offered(
    pair: tuple[Node, Node], make: Callable[[Node], Any], kind: str, forgotten: bool
) -> None:
    a, b = pair
    handle = make(a)
    until(lambda: offered(a, b) == [(kind, "c")])
    if not forgotten:
        handle.close()
    del handle
    until(lambda: offered(a, b) == [])


@pytest.mark.parametrize("make", [Node.publisher, Node.pusher])
def test_a_channel_is_offered_until_its_last_handle_is_given_back(
    pair: tuple[Node, Node], make: Callable[[Node, str], Any]
) -> None:
    a, b = pair
    first, last = make(a, "c"), make(a, "c")
    until(lambda: len(offered(a, b)) == 1)
    first.close()
    with a.puller("barrier"):
        until(lambda: ("pull", "barrier") in offered(a, b))  # and what was withdrawn before it
        assert len(offered(a, b)) == 2
    last.close()
    until(lambda: offered(a, b) == [])
    again = make(a, "c")
    until(lambda: len(offered(a, b)) == 1)
    again.close()


@pytest.mark.slow
def test_an_async_service_whose_event_loop_ended_is_no_longer_offered(
    pair: tuple[Node, Node],
) -> None:
    a, b = pair

    async def serve() -> None:
        @a.service("c")
        async def c(request: int) -> int:
            return request

        async with b.client("c") as client:
            assert await client.arequest(1, timeout=5) == 1

    asyncio.run(serve())
    until(lambda: offered(a, b) == [], "the withdrawal")
    with pytest.raises(Timeout, match="no server of 'c'"):
        b.client("c").request(2, timeout=0.01)
    assert a.stats().received["service"] == 1, "what it counted stays"


@pytest.mark.slow
@pytest.mark.parametrize(
    "lacking",
    [
        "mesh.sockets.transport.Transport.connecting",
        "mesh.sockets.subscription.Watch",
        "mesh.sockets.calls.Watch",
    ],
)
def test_what_could_not_be_connected_is_connected_once_it_can_be(
    pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """For want of descriptors, say."""
    a, b = pair
    publishers = [a.publisher("t/1"), a.publisher("t/2")]
    puller = a.puller("q")
    a.service("s")(lambda request: request)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(lacking, fail)
        subscriber, pusher, client = b.subscriber("t/*"), b.pusher("q"), b.client("s")
        until(lambda: b.stats().dropped.get("link failed", 0) > 0)
    for publisher in publishers:
        publisher.wait_for(1, timeout=5)
        publisher.send("hi")
        assert subscriber.recv(timeout=5).channel == publisher.channel
    pusher.send("task", timeout=5)
    assert puller.recv(timeout=5).payload == "task"
    assert client.request(1, timeout=5) == 1


def test_a_topic_that_was_closed_may_be_opened_with_other_options_at_once() -> None:
    with Node("a") as node:
        for when_full, keep_last in (("drop", True), ("wait", False), ("wait", True)) * 10:
            node.publisher("t", when_full=when_full, keep_last=keep_last).close()  # type: ignore[arg-type]


def test_of_two_that_open_a_topic_in_different_modes_at_once_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Node("a") as node:
        both_looked = threading.Barrier(2)
        for topics in node._parts.topics.values():

            def is_open(name: str, look: Callable[[str], bool] = topics.is_open) -> bool:
                found = look(name)
                with contextlib.suppress(threading.BrokenBarrierError):
                    both_looked.wait(0.1)
                return found

            monkeypatch.setattr(topics, "is_open", is_open)
        outcome = SimpleNamespace(opened=[], refused=[])

        def open_topic(when_full: WhenFull) -> None:
            try:
                outcome.opened.append(node.publisher("t", when_full=when_full))
            except OptionsDiffer:
                outcome.refused.append(when_full)

        modes: tuple[WhenFull, WhenFull] = ("drop", "wait")
        threads = [threading.Thread(target=open_topic, args=(mode,)) for mode in modes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert (len(outcome.opened), len(outcome.refused)) == (1, 1)


def test_a_handle_says_what_it_is(tmp_path: Path) -> None:
    with Node("shop", durable=tmp_path / "log") as node:
        orders = node.stream("orders")
        assert repr(orders) == "<stream 'orders'>"
        under_way = orders.append_nowait(1)
        under_way.wait(10)
        where = f"at {under_way.partition}"
        assert repr(under_way) == f"<append to stream 'orders' {where} done>"
        with orders.consumer("billing") as consumer:
            assert repr(consumer) == "<consumer 'billing' of stream 'orders'>"
            record = repr(consumer.recv(10))
            assert record.startswith("ConsumedRecord(payload=1, stream='orders'")
            assert record.endswith(", headers={}, deliveries=1)")
        assert repr(consumer) == "<consumer 'billing' of stream 'orders' closed>"
        replay = orders.replay()
        assert repr(replay) == "<replay of stream 'orders'>"
        replay.close()
        assert repr(replay) == "<replay of stream 'orders' closed>"
        recording = node.record("sensors/**", into="readings")
        assert repr(recording) == "<recording of 'sensors/**' into 'readings'>"
