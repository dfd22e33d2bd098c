"""What a message pays for, step by step: ``python -m bench.steps``. docs/decisions/008 quotes it.

Each step is run by itself, in one thread of a process that does nothing else, many times in a row;
the least of nine runs counts. In a running program, where both cores are busy and caches are cold,
the same steps took 1.5 to 2 times as long. Steps of a whole frame are divided by its 512 messages.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

from mesh import Node
from mesh.message import Message, Origin
from mesh.sockets import codec
from mesh.sockets.batch import MESSAGES_MAX
from mesh.sockets.frame import Kind, decode, wire_name
from mesh.sockets.outgoing import encode_batch, encode_message
from mesh.sockets.parts import has_input, send_parts

SIZE = 100
RUNS = 9
COUNT = 20_000


def nanoseconds(step: Callable[[], object], count: int = COUNT, per: int = 1) -> float:
    """What `step` takes at least, divided by `per`."""
    least = float("inf")
    for _ in range(RUNS):
        started = time.perf_counter_ns()
        for _ in repeat(None, count):
            step()
        least = min(least, (time.perf_counter_ns() - started) / count)
    return least / per


def busy(node: Node) -> dict[str, float]:
    """Of one message among many."""
    payloads: list[Any] = [secrets.token_bytes(SIZE) for _ in range(MESSAGES_MAX)]
    publisher = node.publisher("busy")
    topics, topic, name = publisher._topics, publisher._topic, wire_name("busy")
    frame = encode_batch(payloads)
    (part,) = frame.parts(name, Kind.DATA, sender=1, seq=1)
    decoded = decode([part])
    received = codec.unpack_frame(decoded, 1 << 20)[0]
    origin = Origin("busy", "s", 1, 1)
    batch = topic.batch
    batch.begin(1 << 60)
    appended = nanoseconds(lambda: publisher.send(payloads[0]), 100_000)
    batch.shut()
    batch.items.clear()
    per, count = MESSAGES_MAX, 400
    with node.subscriber("busy") as subscriber:
        inbox = subscriber._core.inbox.made
        inbox.extend([Message(b"", 0, origin)] * (RUNS * 100_000))
        popped = nanoseconds(subscriber.recv, 100_000)
    return {
        "send: append to the open batch": appended,
        "share of: pack the batch": nanoseconds(lambda: encode_batch(payloads), count, per),
        "share of: name, header and body in one": nanoseconds(
            lambda: frame.parts(name, Kind.DATA, sender=1, seq=1), count, per
        ),
        "share of: give it to ZeroMQ": nanoseconds(
            lambda: send_parts(topics._bound[0].socket, [part]), count, per
        ),
        "share of: read the header": nanoseconds(lambda: decode([part]), count, per),
        "share of: unpack the batch": nanoseconds(
            lambda: codec.unpack_frame(decoded, 1 << 20), count, per
        ),
        "share of: make the messages": nanoseconds(
            lambda: list(map(Message, received, range(per), repeat(origin))), count, per
        ),
        "recv: pop from the inbox": popped,
    }


def alone(node: Node) -> dict[str, float]:
    """Of a message that has a frame to itself."""
    payload = secrets.token_bytes(SIZE)
    publisher = node.publisher("alone")
    topics, topic, name = publisher._topics, publisher._topic, wire_name("alone")
    message = encode_message(payload, None, 1 << 20)
    frames = range(1, RUNS * COUNT + 2)
    parts = [bytes(message.parts(name, Kind.DATA, sender=1, seq=seq)[0]) for seq in frames]
    first, *others = parts
    frame, following = decode([first]), iter(others)
    socket = topics._bound[0].socket
    with topics.link:
        whole = nanoseconds(lambda: topics._send(topic, message))
    with node.subscriber("alone") as subscriber:
        arrivals = subscriber._core.arrivals
        arrivals.take_in(socket, first)
        short = nanoseconds(lambda: arrivals.take_one(socket, next(following)))
    return {
        "encode": nanoseconds(lambda: encode_message(payload, None, 1 << 20)),
        "look for subscriptions (once a millisecond)": nanoseconds(lambda: has_input(socket)),
        "number, frame and send": whole,
        "from its frame to the message": short,
        "the first of its kind: read the header": nanoseconds(lambda: decode([first])),
        "the first of its kind: unpack": nanoseconds(lambda: codec.unpack_frame(frame, 1 << 20)),
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="mesh-") as directory:
        os.environ["MESH_RUNTIME_DIR"] = directory
        with Node("steps", batch_window_ms=0) as node:
            for what, steps in (("among many", busy(node)), ("alone", alone(node))):
                print(f"{SIZE} B, {what}")
                for name, cost in steps.items():
                    print(f"  {name:44} {cost:7.0f} ns")


if __name__ == "__main__":
    main()
