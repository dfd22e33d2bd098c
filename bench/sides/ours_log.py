"""Streams, by their public API alone: the log embedded, or in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

from bench.roles import Role
from bench.roles_log import Log
from bench.setting import Address, Setting
from bench.sides.ours_nodes import CONNECT_S, check_transport, node_of
from mesh import Node
from mesh.durable.consumer import Consumer

PREFETCH = 4096


class Host(Role):
    """Hosts the log until its input ends."""

    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.node = node_of(self, first=True, durable=f"{address.directory}/log")


class Stream(Log):
    def connect(self) -> None:
        if self.setting.transport == "disk":
            self.node = Node("log", durable=f"{self.address.directory}/log", discovery=())
        else:
            self.node = node_of(self)
            self.node.wait_for_peers(1, timeout=CONNECT_S)
            check_transport(self.node, self.setting.transport)
        self.stream = self.node.stream("bench")
        self.consumer: Consumer | None = None

    def append(self, payload: bytes) -> None:
        self.stream.append(payload)

    def append_all(self, payloads: Iterator[bytes], count: int) -> None:
        self.stream.append_many(payloads, timeout=None)

    def read(self, count: int, progress: list[int]) -> None:
        found = total = 0
        for record in self.stream.replay():
            total += record.payload[-1]
            found += 1
            if found == count:
                break
        progress[:] = found, total

    def consume(self, count: int, progress: list[int]) -> None:
        if self.consumer is None:
            self.consumer = self.stream.consumer("bench", prefetch=PREFETCH)
        recv, total = self.consumer.recv, 0
        for _ in range(count):
            record = recv()
            total += record.payload[-1]
            record.ack()
        self.consumer.flush()
        progress[:] = count, total

    def acknowledged(self, count: int) -> int:
        assert self.consumer is not None
        return sum(self.consumer.committed.values())

    def stored(self) -> int:
        return sum(end for _, end in self.stream.bounds().values())
