"""A forked child of a process with a log writes nothing there, and waits for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh import Node
from tests.support.processes import Programs

pytestmark = pytest.mark.slow

FORKING = """
    import asyncio, os, sys, warnings
    from mesh import Forked, Node
    from tests.support.waiting import until
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says so of any fork
    directory, written = sys.argv[1], sys.argv[2] == "written"
    with Node("first", durable=directory) as node:
        node.stream("orders").append("before")
    node = Node("parent", durable=directory)
    orders = node.stream("orders")
    orders.bounds()
    if written:
        orders.append("by the parent")
    consumer = orders.consumer("billing")
    consumer.recv(5)
    following = iter(orders.replay(follow=True))
    next(following)
    recording = node.record("t", into="kept")
    child = os.fork()
    if child == 0:
        calls = [
            lambda: orders.append("by the child", timeout=None),
            lambda: asyncio.run(orders.aappend("by the child", timeout=None)),
            lambda: orders.append_many(["by the child"], timeout=None),
            lambda: orders.append_nowait("by the child", timeout=None).wait(),
            lambda: orders.bounds(timeout=None),
            lambda: list(orders.replay(timeout=None)),
            lambda: [next(following) for _ in range(9)],
            lambda: consumer.recv(None),
            lambda: consumer.flush(timeout=None),
            lambda: node.stream("orders"),
            lambda: node.record("u", into="kept"),
        ]
        for number, call in enumerate(calls):
            try:
                call()
                os._exit(1 + number)
            except Forked as error:
                assert "make a new Node after fork()" in str(error)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    orders.append("after")
    print("child", os.waitstatus_to_exitcode(status))
    node.close()
"""


@pytest.mark.parametrize("state", ["written", "read"])
def test_a_forked_child_is_refused_and_the_log_is_whole(
    tmp_path: Path, programs: Programs, state: str
) -> None:
    """Whether or not something was written before in its parent."""
    program = programs.start(FORKING, str(tmp_path), state)
    assert program.line() == "child 0"
    assert program.finish()[0] == 0
    with Node("again", durable=tmp_path) as node:
        records = [record.payload for record in node.stream("orders").replay()]
    assert records == ["before", *["by the parent"] * (state == "written"), "after"]
