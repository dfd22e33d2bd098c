"""Nodes that end, in every way that a process can: nobody hangs, nobody believes in a ghost."""

from __future__ import annotations

import os
import queue
import signal
import socket
import time

import pytest

from mesh import Node, PeerEvent, PeerLost, TasksLost, Timeout
from tests.support.processes import Programs
from tests.support.waiting import until

IDLE = """
    import sys, threading
    from mesh import Node
    node = Node(sys.argv[1] if len(sys.argv) > 1 else "idle")
    print(node.id)
    threading.Event().wait()
"""


def watch(node: Node) -> queue.Queue[PeerEvent]:
    events: queue.Queue[PeerEvent] = queue.Queue()
    node.on_peer(events.put)
    return events


def test_a_killed_peer_is_noticed_at_once(programs: Programs) -> None:
    """The figure is in docs/performance.md; here only that it is the kernel that tells, long before
    silence (10 heartbeats) could."""
    with Node("watcher") as node:
        events = watch(node)
        program = programs.start(IDLE)
        assert events.get(timeout=10).kind == "joined"
        killed = time.monotonic()
        program.kill()
        event = events.get(timeout=5)
        assert (event.kind, event.reason) == ("left", "died")
        assert time.monotonic() - killed < 2


def test_a_node_started_again_is_seen_to_leave_and_to_arrive(programs: Programs) -> None:
    with Node("watcher") as node:
        events = watch(node)
        ids = []
        for _ in range(2):
            program = programs.start(IDLE, "same-name")
            joined = events.get(timeout=10)
            assert (joined.kind, joined.peer.name, joined.peer.id) == (
                "joined",
                "same-name",
                program.line(),
            )
            ids.append(joined.peer.id)
            program.kill()
            left = events.get(timeout=5)
            assert (left.kind, left.peer.id) == ("left", joined.peer.id)
        assert ids[0] != ids[1]
        assert node.peers == {}


def test_nothing_of_an_old_run_is_taken_for_the_new(programs: Programs) -> None:
    """The second run's sequence starts at 1 again: that is neither a repeat nor a gap."""
    source = """
        import sys
        from mesh import Node
        node = Node("publisher")
        publisher = node.publisher("t")
        publisher.wait_for(1, timeout=10)
        publisher.send_many(range(int(sys.argv[1])))
        print("sent")
        sys.stdin.read()
    """
    with Node("subscriber") as node, node.subscriber("t") as subscriber:
        for count in (20, 5):
            program = programs.start(source, str(count))
            got = [subscriber.recv(timeout=10) for _ in range(count)]
            assert [message.seq for message in got] == list(range(1, count + 1))
            assert len({message.sender for message in got}) == 1
            program.kill()
            program.finish()
        assert subscriber.lost == {}


def test_a_child_that_outlives_its_killed_parent_does_not_keep_it_alive(
    programs: Programs,
) -> None:
    source = """
        import os, sys, threading
        from mesh import Node
        node = Node("parent")
        publisher = node.publisher("t", when_full="wait")
        subscriber = node.subscriber("back")
        child = os.fork()
        if child != 0:
            print(child)
        threading.Event().wait()
    """
    with Node("watcher") as node:
        events = watch(node)
        program = programs.start(source)
        child = int(program.line())
        try:
            assert events.get(timeout=10).kind == "joined"
            program.kill()
            event = events.get(timeout=5)
            assert (event.kind, event.reason) == ("left", "died")
            os.kill(child, 0)  # it does live
            with Node("newcomer") as newcomer:
                newcomer.wait_for_peers(1, timeout=5)
                assert set(newcomer.peers) == {node.id}, "nor does a newcomer find the dead"
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_child_is_refused_with_a_clear_error_and_may_make_its_own(
    programs: Programs,
) -> None:
    source = """
        import gc, os, sys, warnings
        from mesh import Forked, Node
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says so of any fork
        node = Node("parent")
        publisher, subscriber = node.publisher("t"), node.subscriber("t")
        pusher, puller, client = node.pusher("q"), node.puller("q"), node.client("s")
        publisher.wait_for(1, timeout=5)
        child = os.fork()
        if child == 0:
            calls = [lambda: publisher.send(1), lambda: subscriber.recv(timeout=1),
                     lambda: pusher.send(1, timeout=1), lambda: puller.recv(timeout=1),
                     lambda: client.request(1, timeout=1), lambda: node.publisher("x"),
                     node.stats]
            for call in calls:
                try:
                    call()
                    os._exit(3)
                except Forked as error:
                    assert "make a new Node after fork()" in str(error)
            del publisher, subscriber, pusher, puller, client, calls, call
            node.close()
            del node
            gc.collect()
            with Node("child") as own:
                own.wait_for_peers(1, timeout=5)
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        print("child ended with", os.waitstatus_to_exitcode(status))
        publisher.send("still here")
        print(subscriber.recv(timeout=5).payload)
        node.close()
    """
    program = programs.start(source)
    status, out, err = program.finish()
    assert (status, out.splitlines(), err) == (0, ["child ended with 0", "still here"], "")


@pytest.mark.parametrize(
    "ending", ["pass", "sys.exit(0)", "del node, handles", "node.close()", "gc.disable()"]
)
def test_an_interpreter_ends_at_once_whatever_was_left_open(
    programs: Programs, ending: str
) -> None:
    source = f"""
        import gc, sys, time
        from mesh import Node
        node = Node("left-open")
        handles = [node.publisher("t"), node.subscriber("t"), node.pusher("q"), node.puller("q"),
                   node.client("s")]
        node.service("s")(lambda request: request)
        node.on_peer(print)
        assert handles[4].request(1, timeout=5) == 1
        handles[0].send(b"x")
        handles[2].send(b"x", timeout=5)
        {ending}
    """
    program = programs.start(source)
    status, out, err = program.finish(timeout=10)
    assert (status, out, err) == (0, "", "")


def test_control_c_leaves_no_traceback_of_ours(programs: Programs) -> None:
    source = """
        from mesh import Node
        try:
            with Node("interrupted") as node, node.subscriber("t") as subscriber:
                node.service("s")(lambda request: request)
                print("ready")
                for message in subscriber:
                    pass
        except KeyboardInterrupt:
            print("interrupted")
    """
    program = programs.start(source)
    program.expect("ready")
    program.kill(signal.SIGINT)
    assert program.finish() == (0, "interrupted\n", "")


def test_a_dead_workers_tasks_are_told_to_whoever_sent_them(programs: Programs) -> None:
    source = """
        import threading
        from mesh import Node
        node = Node("worker")
        puller = node.puller("q", prefetch=3)
        puller.recv(timeout=10)
        print("working")
        threading.Event().wait()
    """
    losses: queue.Queue[TasksLost] = queue.Queue()
    with Node("pusher") as node, node.pusher("q") as pusher:
        pusher.on_loss(losses.put)
        program = programs.start(source)
        for _ in range(3):
            pusher.send("task", timeout=10)
        program.expect("working")
        with pytest.raises(Timeout, match=r"within 0\.05 s"):
            pusher.send("one too many", timeout=0.05)
        program.kill()
        loss = losses.get(timeout=5)
        assert (loss.channel, loss.count) == ("q", 3)
        assert pusher.lost == {loss.worker: 3}


def test_a_request_to_a_server_that_dies_fails_at_once(programs: Programs) -> None:
    source = """
        import threading
        from mesh import Node
        node = Node("server")
        @node.service("s")
        def s(request):
            print("started")
            threading.Event().wait()
        threading.Event().wait()
    """
    with Node("caller") as node, node.client("s") as client:
        program = programs.start(source)

        import threading

        def kill() -> None:
            program.expect("started")
            program.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        started = time.monotonic()
        with pytest.raises(PeerLost):
            client.request(1, timeout=30)
        assert time.monotonic() - started < 15
        killer.join()


def test_a_stopped_process_is_no_dead_one(programs: Programs) -> None:
    """On the same host the kernel tells death; being stopped for a while is none."""
    with Node("watcher", heartbeat_s=0.1) as node:
        events = watch(node)
        program = programs.start(IDLE)
        assert events.get(timeout=10).kind == "joined"
        program.kill(signal.SIGSTOP)
        with pytest.raises(queue.Empty):
            events.get(timeout=0.5)  # five heartbeats: silence on another host
        program.kill(signal.SIGCONT)
        program.kill(signal.SIGTERM)
        assert events.get(timeout=5).reason in ("bye", "died")


def test_closing_is_quick_also_with_seeds_that_nobody_answers() -> None:
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    seeds = [f"127.0.0.1:{s.getsockname()[1]}" for s in (silent, closed)]
    closed.close()
    node = Node("a", secret="x" * 20, seeds=seeds, interfaces=["127.0.0.1"], discovery=["local"])
    publisher = node.publisher("t")
    publisher.send(1)
    dialled, _ = silent.accept()
    started = time.monotonic()
    node.close(timeout=0.2)
    assert time.monotonic() - started < 2
    silent.close()
    dialled.close()


def test_the_files_of_a_killed_node_are_cleaned_up_by_the_next(programs: Programs) -> None:
    directory = os.environ["MESH_RUNTIME_DIR"]
    program = programs.start(IDLE)
    dead = program.line()
    assert [name for name in os.listdir(directory) if name.startswith(dead)]
    program.kill()
    program.finish()
    with Node("next"):
        until(
            lambda: not [name for name in os.listdir(directory) if name.startswith(dead)],
            "the removal of the dead node's files",
        )
    assert os.listdir(directory) == []
