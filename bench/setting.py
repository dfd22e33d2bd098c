"""What one measurement is of: the same for every side, and handed to its workers as JSON."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Shape = Literal["bytes", "dict", "text"]

TRANSPORTS = ("disk", "ipc", "tcp")
LARGE_BYTES = 256 * 1024
"""From here on raw pyzmq is faster if it leaves payloads uncopied; 64 KiB were not."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A point that is measured."""

    transport: str = "ipc"
    """``ipc`` or ``tcp``, the latter over the loopback and in plain text. ``disk``: none, a log
    is in the process that uses it."""
    size: int = 0
    """Bytes of one payload; of a dict, about."""
    shape: Shape = "bytes"
    """``bytes``: random ones. ``text``: what LZ4 makes smaller. ``dict``: some fields."""
    many: bool = False
    """Whether our side sends and receives many in one call; the others have no such call."""
    messages: bool = False
    """Whether our side looks at each message of many, and not at their payloads alone."""
    views: bool = True
    """Whether our side receives large payloads without a copy, as the raw one does."""
    compress: bool = False
    """Whether our side compresses what goes over tcp, which a loopback is too fast for. Payloads
    that are sent over and over would shrink to nothing."""
    receivers: int = 1
    topics: int = 1
    records: int = 0
    """Of a log that is read from its start."""
    uvloop: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options for our node."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def large(self) -> bool:
        return self.size >= LARGE_BYTES

    @property
    def key(self) -> Any:
        """What a receiver looks up in each payload, to touch it: an integer that differs."""
        return "id" if self.shape == "dict" else -1

    def payloads(self) -> list[Any]:
        """Some that differ, the same for every side, to be sent in turn."""
        chance = random.Random(self.size)
        count = 8 if self.large else 64
        if self.shape == "dict":
            return [_reading(chance, number) for number in range(count)]
        if self.shape == "text":
            return [_text(chance, self.size) for _ in range(count)]
        return [chance.randbytes(self.size) for _ in range(count)]

    def total(self, count: int) -> int:
        """What the looked-up values of `count` payloads add up to."""
        values = [payload[self.key] for payload in self.payloads()]
        turns, rest = divmod(count, len(values))
        total: int = turns * sum(values) + sum(values[:rest])
        return total


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a side's workers meet."""

    directory: str
    """Private to this side and setting."""
    port: int
    """Free on the loopback a moment ago."""
    transport: str

    @property
    def zmq(self) -> str:
        """An endpoint as ZeroMQ and nng write them."""
        if self.transport == "ipc":
            return f"ipc://{self.directory}/socket"
        return f"tcp://127.0.0.1:{self.port}"


def _reading(chance: random.Random, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "sensor": f"kitchen/{chance.randrange(100)}",
        "value": chance.random(),
        "unit": "celsius",
        "time": 1_700_000_000 + chance.random(),
        "tags": ["indoor", "calibrated"],
        "ok": True,
    }


def _text(chance: random.Random, size: int) -> bytes:
    """Lines as a logger writes them."""
    lines = bytearray()
    while len(lines) < size:
        number, level = chance.randrange(10**6), chance.choice(("info", "warning"))
        lines += b'{"time": 1700%06d, "level": "%s", "text": "request answered"}\n' % (
            number,
            level.encode(),
        )
    del lines[size - 1 :]
    lines.append(chance.randrange(256))
    return bytes(lines)
