"""Programs written from docs/wire.md alone: pyzmq, msgpack, struct, and nothing of this package.

The node runs in another process; the endpoints are found by listing its directory, since a plain
program has no control link to be told them by.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from tests.support.processes import Program, Programs

HEADER = struct.Struct("<BBBBIQQQI")
DATA, MARK, LAST, REQUEST, REPLY, ERROR, PAD = 1, 2, 3, 4, 5, 6, 10
RAW, MSGPACK = 0, 1
HEADERS, DETACHED = 1, 2

NODE = """
    import sys, threading
    from mesh import Array, Node
    node = Node("server")
    publisher = node.publisher("sensors/kitchen", keep_last=True)
    other = node.publisher("sensors/kitchens")
    node.service("divide")(lambda request: request[0] / request[1])
    puller = node.puller("jobs")
    print(node.id, flush=True)
    for line in sys.stdin:
        if line.strip() == "publish":
            other.send("not asked for")
            publisher.send({"t": 20.5}, headers={"unit": "C"})
            publisher.send(bytes(300_000))
        elif line.strip() == "publish arrays":
            publisher.send({"a": Array("<f4", (2, 1), memoryview(b"12345678"))})
            publisher.send([Array("|u1", (70_000,), memoryview(bytes(70_000)))])
        elif line.strip() == "pull":
            task = puller.recv(timeout=10)
            print(task.payload, task.headers.get("n"), task.sender, flush=True)
        elif line.strip() == "pull array":
            array = puller.recv(timeout=10).payload
            print(array.dtype, array.shape, bytes(array.data), flush=True)
"""


class Plain:
    """Sockets of a program without this package, all closed in the end."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets: list[zmq.Socket[bytes]] = []

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.sockets.append(socket)
        return socket


@pytest.fixture
def plain() -> Iterator[Plain]:
    plain = Plain()
    yield plain
    for socket in plain.sockets:
        socket.close(linger=0)
    plain.context.term()


@pytest.fixture
def node(programs: Programs) -> Program:
    return programs.start(NODE)


def endpoint(node_id: str, label: str) -> str:
    directory = Path(os.environ["MESH_RUNTIME_DIR"])
    [path] = directory.glob(f"{node_id}.{label}*")
    return f"ipc://{path}"


def frame(name: bytes, kind: int, payload: object, *, seq: int = 1, remaining: int = 0) -> bytes:
    header = HEADER.pack(1, kind, MSGPACK, 0, 1, 0xABC, seq, 0, remaining)
    body: bytes = msgpack.packb([payload])
    return name + b"\0" + header + body


def fields(raw: bytes) -> tuple[bytes, tuple[int, ...], bytes]:
    name, _, rest = raw.partition(b"\0")
    return name, HEADER.unpack(rest[:36]), rest[36:]


def test_a_plain_program_subscribes_to_a_topic(plain: Plain, node: Program) -> None:
    node_id = node.line()
    subscriber = plain.socket(zmq.SUB)
    subscriber.connect(endpoint(node_id, "drop"))
    subscriber.subscribe(b"/sensors/kitchen\0")
    subscriber.subscribe(b"@0123456789abcdef:sensors/*\0")
    name, header, body = fields(subscriber.recv())
    assert name == b"@0123456789abcdef:sensors/*"
    assert header[1] == MARK, "the answer to the subscription: from here on nothing is missed"
    assert header[5:7] == (int(node_id, 16), 0)
    assert msgpack.unpackb(body) == [{"sensors/kitchen": 0, "sensors/kitchens": 0}]

    node.tell("publish")
    name, header, body = fields(subscriber.recv())
    assert name == b"/sensors/kitchen"
    assert header[:7] == (1, DATA, MSGPACK, HEADERS, 1, int(node_id, 16), 1)
    assert header[7] > 1_700_000_000 * 10**9
    assert msgpack.unpackb(body) == [{"t": 20.5}, ["unit", "C"]]

    first, payload = subscriber.recv_multipart()
    name, header, body = fields(first)
    assert header[:7] == (1, DATA, RAW, DETACHED, 1, int(node_id, 16), 2)
    assert (payload, body) == (bytes(300_000), b"")

    name, header, body = fields(subscriber.recv())
    pad = (1, PAD, MSGPACK, 0, 1, 0, 0, 0, 0)
    assert (name, header, body) == (b"/sensors/kitchen", pad, b""), "it took two shares"

    name, header, _ = fields(subscriber.recv())
    assert (name, header[1], header[6]) == (b"/sensors/kitchen", MARK, 2), "it fell quiet"

    newcomer = plain.socket(zmq.SUB)
    newcomer.connect(endpoint(node_id, "drop"))
    newcomer.subscribe(b"@fedcba9876543210:sensors/kitchen\0")
    name, header, body = fields(newcomer.recv())
    assert (name, header[1], header[6]) == (b"@fedcba9876543210:sensors/kitchen", LAST, 2)
    assert msgpack.unpackb(body) == [["sensors/kitchen", bytes(300_000), None]]


def test_a_plain_program_subscribes_to_arrays(plain: Plain, node: Program) -> None:
    node_id = node.line()
    subscriber = plain.socket(zmq.SUB)
    subscriber.connect(endpoint(node_id, "drop"))
    subscriber.subscribe(b"/sensors/kitchen\0")
    subscriber.subscribe(b"@0123456789abcdef:sensors/*\0")
    subscriber.recv()
    node.tell("publish arrays")
    _, header, body = fields(subscriber.recv())
    [payload] = msgpack.unpackb(body)
    assert payload == {"a": msgpack.ExtType(1, b"<f4 2 1        \n12345678")}
    first, items = subscriber.recv_multipart()
    _, header, body = fields(first)
    assert header[2:5] == (MSGPACK, DETACHED, 1)
    assert msgpack.unpackb(body) == [[msgpack.ExtType(1, b"|u1 70000      \n")]]
    assert items == bytes(70_000)


@pytest.mark.parametrize("detached", [False, True])
def test_a_plain_program_pushes_an_array(plain: Plain, node: Program, detached: bool) -> None:
    node_id = node.line()
    pusher = plain.socket(zmq.PUSH)
    pusher.connect(endpoint(node_id, "pull"))
    description, items = b"|u1 2 2\n", b"1234"
    payload = msgpack.ExtType(1, description + (b"" if detached else items))
    header = HEADER.pack(1, DATA, MSGPACK, DETACHED if detached else 0, 1, 0xABC, 1, 0, 0)
    pusher.send_multipart(
        [b"/jobs\0" + header + msgpack.packb([payload]), *([items] if detached else [])]
    )
    node.tell("pull array")
    assert node.line() == "|u1 (2, 2) b'1234'"


def test_a_plain_program_pushes_into_a_queue(plain: Plain, node: Program) -> None:
    node_id = node.line()
    pusher = plain.socket(zmq.PUSH)
    pusher.connect(endpoint(node_id, "pull"))
    pusher.send(frame(b"/jobs", DATA, "a task"))
    node.tell("pull")
    assert node.line() == "a task None 0000000000000abc"


def test_a_plain_program_calls_a_service(plain: Plain, node: Program) -> None:
    node_id = node.line()
    caller = plain.socket(zmq.DEALER)
    caller.connect(endpoint(node_id, "serve"))
    caller.send(frame(b"/divide", REQUEST, [7, 2], seq=41, remaining=5000))
    _, header, body = fields(caller.recv())
    assert (header[1], header[6], msgpack.unpackb(body)) == (REPLY, 41, [3.5])
    caller.send(frame(b"/divide", REQUEST, [7, 0], seq=42, remaining=0xFFFFFFFF))
    _, header, body = fields(caller.recv())
    [[code, kind, text, traceback]] = msgpack.unpackb(body)
    assert (header[1], header[6]) == (ERROR, 42)
    assert (code, kind, text) == ("remote", "ZeroDivisionError", "division by zero")
    assert "Traceback" in traceback


def test_the_documented_header_is_the_one_in_the_code() -> None:
    document = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
    rows = [line.split("|")[1:4] for line in document.splitlines() if line.startswith("| ")]
    layout = [
        (int(o), t.strip()) for o, t, _ in rows if o.strip().isdigit() and t.strip()[0] == "u"
    ]
    sizes = {"u8": "B", "u32": "I", "u64": "Q"}
    offset = 0
    for at, kind in layout:
        assert at == offset
        offset += int(kind[1:]) // 8
    assert "<" + "".join(sizes[kind] for _, kind in layout) == HEADER.format
    assert offset == HEADER.size == 36
