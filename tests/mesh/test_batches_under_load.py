"""All kinds of channels of a node at full speed, with batches on: all accounts add up."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable

import pytest

from mesh import Forked, Node, Timeout
from mesh.sockets import dispatch as dispatch_module
from mesh.sockets import topics
from tests.support.processes import Programs
from tests.support.waiting import until

OTHER = """
    import json, sys, threading
    from mesh import Node, Timeout
    node = Node("other")
    drops, waits = node.subscriber("drops"), node.subscriber("waits")
    puller, client = node.puller("tasks", prefetch=1024), node.client("double")
    got = {"drops": [], "waits": [], "tasks": [], "answers": 0}
    ending = threading.Event()

    def receive(name, handle):
        while True:
            try:
                got[name].append(handle.recv(timeout=1.0).payload)
            except Timeout:
                if ending.is_set():
                    return

    def ask():
        while not ending.is_set():
            assert client.request(got["answers"], timeout=10) == 2 * got["answers"]
            got["answers"] += 1

    handles = {"drops": drops, "waits": waits, "tasks": puller}
    threads = [threading.Thread(target=receive, args=pair) for pair in handles.items()]
    threads.append(threading.Thread(target=ask))
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    ending.set()
    for thread in threads:
        thread.join()
    in_order = all(got[name] == sorted(got[name]) for name in handles)
    counts = {name: len(got[name]) for name in handles}
    lost = [sum(drops.lost.values()), sum(waits.lost.values())]
    print(json.dumps([in_order, counts, lost, got["answers"]]))
    node.close()
"""


@pytest.mark.slow
def test_all_accounts_add_up_after_two_seconds_at_full_speed(programs: Programs) -> None:
    with Node("busy") as node:
        drops = node.publisher("drops")
        waits = node.publisher("waits", when_full="wait")
        pusher = node.pusher("tasks")
        node.service("double")(lambda request: 2 * request)
        program = programs.start(OTHER)
        for publisher in (drops, waits):
            publisher.wait_for(1, timeout=15)
        pusher.wait_for(1, timeout=15)
        sent = {"drops": 0, "waits": 0, "tasks": 0}
        over = time.monotonic() + 2

        def send(name: str, call: Callable[..., None]) -> None:
            while time.monotonic() < over:
                for _ in range(100):
                    call(sent[name], timeout=20)
                    sent[name] += 1

        threads = [
            threading.Thread(target=send, args=("drops", drops.send)),
            threading.Thread(target=send, args=("waits", waits.send)),
            threading.Thread(target=send, args=("tasks", pusher.send)),
        ]
        for thread in threads:
            thread.start()
        visits = 0
        while time.monotonic() < over:
            with node.subscriber("*") as visitor:
                with contextlib.suppress(Timeout):  # it may come when all is over
                    visitor.recv(timeout=1)
                    visits += 1
                assert set(visitor.lost) <= {node.id}
        for thread in threads:
            thread.join()
        program.tell("end")
        in_order, counts, (lost, lost_waiting), answers = json.loads(program.line(30))
        assert visits > 1
        assert in_order
        assert counts["drops"] + lost == sent["drops"]
        assert (counts["waits"], lost_waiting) == (sent["waits"], 0)
        assert counts["tasks"] == sent["tasks"]
        assert answers > 10
        assert pusher.lost == {}
        assert min(sent.values()) > 100
        until(lambda: pusher.workers == 0)
        assert pusher.lost == {}, "the worker was done with all of them"


def forked(action: Callable[[], bool]) -> bool:
    """What `action` returns in a child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says so of any fork
        child = os.fork()
    if child == 0:
        result = 2
        with contextlib.suppress(BaseException):
            result = 0 if action() else 1
        os._exit(result)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except Forked:
        return True
    return False


@pytest.mark.slow
def test_a_child_of_a_busy_node_is_refused_and_its_parent_goes_on_unharmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its batches are open, and the inboxes full: nothing of that is the child's."""
    monkeypatch.setattr(topics, "BUSY_S", 3600.0)  # however slow this machine is
    monkeypatch.setattr(dispatch_module, "BUSY_S", 3600.0)
    with Node("busy", batch_window_ms=1000) as node, Node("other") as other:
        publisher, subscriber = node.publisher("t"), other.subscriber("t")
        pusher, puller = node.pusher("q"), other.puller("q", prefetch=4096)
        publisher.wait_for(1, timeout=15)
        pusher.wait_for(1, timeout=15)
        for round_ in range(5):
            first = round_ * 300
            while not publisher._batch.room or not pusher._batch.room:  # busy it has to be
                publisher.send("busy")
                pusher.send("busy")
            publisher.send_many(range(first, first + 300))
            pusher.send_many(range(first, first + 300))
            assert publisher._batch.items
            assert pusher._batch.items
            if round_:
                assert len(subscriber._core.inbox)
                assert len(puller._core.inbox)
            assert forked(
                lambda: all(
                    map(
                        is_refused,
                        (
                            lambda: publisher.send("child"),
                            lambda: pusher.send("child", timeout=1),
                            lambda: subscriber.recv(timeout=1),
                            lambda: puller.recv(timeout=1),
                        ),
                    )
                )
            )
            for _ in range(50):
                subscriber.recv(timeout=10)
                puller.recv(timeout=10)
        for handle, total in ((subscriber, 1500), (puller, 1500)):
            got: list[object] = []
            while not got or got[-1] != total - 1:
                got.append(handle.recv(timeout=10).payload)
            assert "child" not in got
            numbers = [each for each in got if each != "busy"]
            assert numbers == list(range(total - len(numbers), total))
        assert subscriber.lost == {}
        assert pusher.lost == {}
