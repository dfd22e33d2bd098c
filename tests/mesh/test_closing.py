"""A node's end: whole, and by its deadline, wherever it began and whatever came in between."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mesh import Closed, InvalidOption, Node, PeerLost, presence
from mesh.discovery import local
from mesh.discovery.seeds import SeedsSource
from mesh.options import WhenFull
from mesh.sockets.calls import Requests
from mesh.sockets.subscriber import Subscriber
from tests.support.homes import Homes
from tests.support.processes import Programs
from tests.support.waiting import until

SECRET = "x" * 20


def files() -> list[str]:
    return os.listdir(os.environ["MESH_RUNTIME_DIR"])


def threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("mesh control")]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


class Held:
    """A handler that runs until it is let go."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, request: Any) -> str:
        self.started.set()
        self.go_on.wait(20)
        return "answer"


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.go_on.set()


# -- Requests that are running


@pytest.mark.parametrize("in_asyncio", [False, True])
def test_a_handler_that_is_running_answers_before_the_node_is_gone(
    pool: ThreadPoolExecutor, held: Held, in_asyncio: bool
) -> None:
    async def handler(request: Any) -> str:
        return await asyncio.to_thread(held, request)

    with Node("caller") as caller, Node("server") as server:
        server.service("s")(handler if in_asyncio else held)
        answer = pool.submit(caller.client("s").request, 1, timeout=10)
        assert held.started.wait(10)
        closing = pool.submit(server.close, timeout=10)
        until(lambda: server.closed)
        held.go_on.set()
        assert answer.result(10) == "answer"
        closing.result(5)
        assert server._parts.loop.ended


@pytest.mark.slow
def test_a_handler_that_does_not_end_holds_up_nobody_beyond_the_deadline(
    pool: ThreadPoolExecutor, held: Held
) -> None:
    with Node("caller") as caller, Node("server") as server:
        server.service("s")(held)
        answer = pool.submit(caller.client("s").request, 1, timeout=10)
        assert held.started.wait(10)
        started = time.monotonic()
        server.close(timeout=0.2)
        assert 0.2 <= time.monotonic() - started < 2
        assert server._parts.loop.ended
        with pytest.raises(PeerLost):
            answer.result(10)


@pytest.mark.slow
@pytest.mark.parametrize("in_asyncio", [False, True])
def test_a_handler_may_close_its_own_node(pool: ThreadPoolExecutor, in_asyncio: bool) -> None:
    closed = threading.Event()

    def close(request: Any) -> None:
        server.close(timeout=0.2)
        closed.set()

    async def close_in_loop(request: Any) -> None:
        close(request)

    with Node("caller") as caller, Node("server") as server:
        server.service("s")(close_in_loop if in_asyncio else close)
        started = time.monotonic()
        with pytest.raises(PeerLost):
            caller.client("s").request(1, timeout=10)
        assert closed.wait(5)
        assert time.monotonic() - started < 5
        assert server._parts.loop.ended


@pytest.mark.slow
def test_whoever_closes_again_may_shorten_the_deadline(
    pool: ThreadPoolExecutor, held: Held
) -> None:
    node = Node("n")
    node.service("s")(held)
    request = pool.submit(node.client("s").request, 1, timeout=20)
    assert held.started.wait(10)
    patient = pool.submit(node.close, timeout=20)
    until(lambda: node.closed)
    node.close(timeout=0)
    patient.result(2)
    with pytest.raises(Closed):
        request.result(2)


# -- What comes in between


def test_a_loop_that_was_closed_under_its_coroutine_holds_up_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Node("a") as a:
        loop = asyncio.new_event_loop()
        task = loop.create_task(a.await_for_peers(5))
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.close()
        with Node("b") as b:
            subscriber, publisher = a.subscriber("t"), b.publisher("t")
            publisher.wait_for(1, timeout=5)
            publisher.send(1)
            assert subscriber.recv(timeout=5).payload == 1
        until(lambda: not a.peers, "the goodbye")
    assert a._parts.loop.ended
    assert not caplog.records
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # as was meant


@pytest.mark.slow
def test_control_c_while_it_closes_leaves_a_node_that_ends_all_the_same(
    programs: Programs,
) -> None:
    source = """
        import os, threading
        from mesh import Node
        node = Node("n")
        started = threading.Event()
        @node.service("s")
        def s(request):
            started.set()
            threading.Event().wait()
        threading.Thread(target=node.client("s").request, args=(1,), daemon=True).start()
        started.wait()
        node._parts.presence.observers.append(lambda event: print("leaving"))
        threading.excepthook = lambda *arguments: None  # of the caller, who gets Closed
        try:
            node.close(timeout=30)
        except KeyboardInterrupt:
            print("interrupted")
        node.close(timeout=0.1)
        print(node._parts.loop.ended, os.listdir(os.environ["MESH_RUNTIME_DIR"]))
    """
    program = programs.start(source)
    program.expect("leaving")
    program.kill(signal.SIGINT)
    program.expect("interrupted", timeout=5)
    status, out, err = program.finish(timeout=10)
    assert (status, out.splitlines()[-1], err) == (0, "True []", "")


# -- Nodes that nobody closes


def test_a_node_that_is_forgotten_ends() -> None:
    node = Node("forgotten")
    node.subscriber("t")
    del node
    gc.collect()
    until(lambda: not files() and not threads(), "its end")


def test_collecting_a_node_does_not_wait_for_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """It may happen anywhere, under a lock that the control thread needs, say."""
    node, collected = Node("n"), threading.Event()
    loop = node._parts.loop
    loop.post(lambda: collected.wait(5))
    del node
    gc.collect()
    collected.set()
    until(lambda: loop.ended)
    assert not caplog.records, "still closing"


def test_a_node_that_is_collected_in_its_own_control_thread_ends() -> None:
    class Box:
        """Of an application that refers to itself, and so waits for the collector."""

        def __init__(self) -> None:
            self.node, self.me = Node("boxed"), self

    gc.disable()
    try:
        parts = Box().node._parts
        parts.loop.post(gc.collect)
        until(lambda: parts.loop.ended, "its end")
    finally:
        gc.enable()
    assert (parts._transport.context.closed, files()) == (True, [])
    until(lambda: not threads())


def test_a_destructor_may_close_a_node_in_its_own_control_thread() -> None:
    node = Node("n")
    started = time.monotonic()
    node._parts.loop.call(lambda: node.close(timeout=5), 10)
    assert time.monotonic() - started < 2
    until(lambda: node._parts.loop.ended)


@pytest.mark.slow
def test_an_interpreter_that_has_no_more_threads_to_give_ends_nodes_whole(
    programs: Programs,
) -> None:
    """Python 3.12 and later, while it runs what was registered with atexit."""
    source = """
        import atexit, os, threading

        @atexit.register
        def look():
            print(os.listdir(os.environ["MESH_RUNTIME_DIR"]))

        from mesh import Node

        def start(thread):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        a, b = Node("a"), Node("b")
        a.on_peer(print)
        a.wait_for_peers(1, timeout=5)
        b.wait_for_peers(1, timeout=5)
        started = threading.Event()
        @a.service("s")
        def s(request):
            started.set()
            threading.Event().wait()
        threading.Thread(target=b.client("s").request, args=(1,), daemon=True).start()
        started.wait()
        threading.excepthook = lambda *arguments: None  # of the caller, who gets Closed
        atexit.register(setattr, threading.Thread, "start", start)  # what comes last, runs first
    """
    status, out, err = programs.start(source).finish()
    assert (status, out.splitlines()[-1], err) == (0, "[]", "")


# -- Deadlines


@pytest.mark.parametrize("timeout", [0, 3e6, 999_999_999])
def test_a_node_with_nothing_to_send_closes_at_once_whatever_its_deadline(timeout: float) -> None:
    node = Node("n")
    node.publisher("t").send(1)
    started = time.monotonic()
    node.close(timeout=timeout)
    assert time.monotonic() - started < 2
    assert (node._parts.loop.ended, files()) == (True, [])


@contextlib.contextmanager
def stalled(
    payloads: Iterable[Any], when_full: WhenFull = "wait"
) -> Iterator[tuple[Subscriber, Node]]:
    """A subscriber that has room for one message, and a node that has sent it all those."""
    with (
        Node("reading", buffer_messages=1) as reading,
        Node("leaving", batch_window_ms=0) as leaving,
    ):
        subscriber = reading.subscriber("a")
        publisher = leaving.publisher("a", when_full=when_full)
        publisher.wait_for(1, timeout=5)
        for payload in payloads:
            publisher.send(payload, timeout=5)
        yield subscriber, leaving
        subscriber.close()


@pytest.mark.parametrize("when_full", ["drop", "wait"])
def test_who_reads_late_gets_what_was_sent_by_a_node_that_closes(
    pool: ThreadPoolExecutor, when_full: WhenFull
) -> None:
    """More than the subscriber's own buffer holds, or its ZeroMQ takes from the kernel at a time,
    8 KiB, is with the kernel when the publisher closes."""
    sent = [bytes([number]) * 2000 for number in range(50)]
    with stalled(sent, when_full) as (subscriber, leaving):
        closing = pool.submit(leaving.close, timeout=10)
        with pytest.raises(TimeoutError):
            closing.result(0.1)
        got = [subscriber.recv(timeout=5).payload for _ in range(50)]
        closing.result(5)
        assert got == sent
        assert subscriber.lost == {}


def test_who_closes_again_need_not_wait_for_those_who_do_not_read(
    pool: ThreadPoolExecutor,
) -> None:
    with stalled([bytes(1000)] * 10) as (_, leaving):
        first = pool.submit(leaving.close, timeout=60)
        until(lambda: is_draining(leaving))
        leaving.close(timeout=0)
        first.result(5)


def is_draining(node: Node) -> bool:
    return any(topics._draining._held for topics in node._parts.topics.values())


def test_what_nobody_read_is_told_when_time_is_up(caplog: pytest.LogCaptureFixture) -> None:
    with stalled([bytes(1000)] * 50) as (_, leaving):
        leaving.close(timeout=0.05)
        assert "1 connections closed before all was read that was published" in caplog.text


def test_closing_does_not_wait_for_ever() -> None:
    with Node("n") as node:
        with pytest.raises(InvalidOption, match="it always ends"):
            node.close(timeout=None)  # type: ignore[arg-type]
        assert not node.closed


def test_a_core_that_comes_too_late_for_the_node_to_close_it_is_closed(homes: Homes) -> None:
    """Or the context would wait for its sockets."""
    node = Node("n")
    node.close()
    core = Requests(homes.make(1), "s")
    with pytest.raises(Closed):
        node._parts.add(core)
    assert core.link.closed


# -- What a closed node says


def test_a_closed_node_has_no_peers() -> None:
    with Node("a") as a, Node("b"):
        a.wait_for_peers(1, timeout=5)
        a.close()
        assert a.peers == {}


def test_closing_wakes_whoever_waits_for_peers(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "NAP_S", 60.0)  # it is told, and does not find out by itself
    node = Node("n")
    blocking = pool.submit(node.wait_for_peers, 1)
    in_asyncio = pool.submit(lambda: asyncio.run(node.await_for_peers(1)))
    until(lambda: len(node._parts.presence.observers) == 2)
    node.close()
    for waiting in (blocking, in_asyncio):
        with pytest.raises(Closed):
            waiting.result(5)


# -- Nodes that could not be made


def left_behind(make: Callable[[], object], error: type[BaseException]) -> list[Any]:
    """Files, threads and descriptors that are there after `make` failed and were not before."""

    def there() -> set[str]:
        gc.collect()
        return {*files(), *threads(), *os.listdir("/proc/self/fd")}

    before = there()
    with pytest.raises(error):
        make()
    return sorted(there() - before)


@pytest.fixture
def taken() -> Iterator[int]:
    """A TCP port."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_taken_port_leaves_nothing_behind(taken: int) -> None:
    Node("warm", secret=SECRET, discovery=["local"]).close(timeout=0)
    make = lambda: Node("n", secret=SECRET, port=taken, discovery=["local"])  # noqa: E731
    assert left_behind(make, OSError) == []


@pytest.mark.parametrize("failing", ["local", "seeds", "thread"])
def test_what_cannot_start_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    options: Any = {"secret": SECRET, "seeds": ["127.0.0.1:9"], "discovery": ["local"]}
    Node("warm", **options).close(timeout=0)

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    match failing:
        case "local":
            monkeypatch.setattr(local, "_put_file", fail)
        case "seeds":
            monkeypatch.setattr(SeedsSource, "start", fail)
        case "thread":
            monkeypatch.setattr(threading.Thread, "start", fail)
    assert left_behind(lambda: Node("n", **options), OSError) == []


@pytest.mark.slow
def test_control_c_anywhere_in_the_making_leaves_nothing_behind(programs: Programs) -> None:
    """At every 29th line of ours that runs. A `with` holds a lock there, and is left out."""
    source = """
        import gc, linecache, os, sys, threading
        import mesh
        from mesh import Node

        HERE = os.path.dirname(os.path.realpath(mesh.__file__)).removesuffix("/mesh")

        class Interrupt:
            def __init__(self, at):
                self.at, self.lines = at, 0

            def __call__(self, frame, event, argument):
                name = frame.f_code.co_filename
                path = os.path.realpath(name)
                ours = path.startswith(HERE + "/") and "/site-packages/" not in path
                return self.line if ours else None

            def line(self, frame, event, argument):
                text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
                if event == "line" and not text.startswith("with "):
                    self.lines += 1
                    if self.lines == self.at:
                        sys.settrace(None)
                        raise KeyboardInterrupt(f"{frame.f_code.co_name}: {text}")
                return self.line

        sys.unraisablehook = lambda unraisable: None  # of objects that are half made
        Node("warm").close()
        at = 3
        while True:
            sys.settrace(Interrupt(at))
            try:
                node = Node("n")
                break
            except KeyboardInterrupt as interrupt:
                where = str(interrupt)
            finally:
                sys.settrace(None)
            gc.collect()
            left = [t.name for t in threading.enumerate() if t.name.startswith("mesh control")]
            left += os.listdir(os.environ["MESH_RUNTIME_DIR"])
            if left:
                raise SystemExit(f"{where} left {left}")
            at += 29
        sys.settrace(None)
        node.close()
        print("lines" if at > 300 else f"only {at} lines")
    """
    status, out, err = programs.start(source).finish(timeout=40)
    assert (status, out, err) == (0, "lines\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"secret": SECRET, "interfaces": ["127.0.0.1"]}])
def test_a_process_without_descriptors_gets_an_error_and_keeps_nothing(
    programs: Programs, options: dict[str, Any]
) -> None:
    """However many there are left. libzmq itself would abort the process."""
    source = f"""
        import gc, os, resource
        from mesh import Node

        def used():
            gc.collect()
            return len(os.listdir("/proc/self/fd"))

        def make():
            return Node("n", discovery=["local"], **{options!r})

        make().close()
        before = used()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        for spare in range(1, 100, 5):
            resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1 + spare, hard))
            try:
                make().close()
                print("made")
                break
            except OSError:
                pass
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            left = os.listdir(os.environ["MESH_RUNTIME_DIR"])
            if left or used() > before:
                print(spare, left, used() - before)
    """
    status, out, err = programs.start(source).finish()
    assert (status, out, err) == (0, "made\n", "")
