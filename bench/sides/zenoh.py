"""Eclipse Zenoh by its Python API: peers that know each other's address, with scouting off.

Over ipc it is zenoh's own ``unixsock-stream``. Nothing may be lost: publishers block
(``CongestionControl.BLOCK``; zenoh's default drops), and so does the FIFO channel through which a
subscriber receives, zenoh's default. Publishers and queriers are declared, as its documentation
advises for speed.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgpack

from bench.roles import Caller, Receiver, Role, Sender, Server
from bench.setting import Address, Setting

if TYPE_CHECKING:
    import zenoh

TRANSPORTS = ("ipc", "tcp")
CONNECT_S = 20.0
CHANNEL = 1024
"""Samples that a subscriber's channel holds."""


def missing() -> str | None:
    found = importlib.util.find_spec("zenoh")
    return None if found else "eclipse-zenoh is not installed (extra: bench)"


def session_of(role: Role, *, first: bool = False) -> zenoh.Session:
    """A session; the `first` listens, the others connect to it."""
    import zenoh

    address = role.address
    if address.transport == "ipc":
        endpoint = f"unixsock-stream/{address.directory}/socket"
    else:
        endpoint = f"tcp/127.0.0.1:{address.port}"
    config = zenoh.Config()
    for path, value in {
        "mode": "peer",
        "scouting/multicast/enabled": False,
        "scouting/gossip/enabled": False,
        "listen/endpoints": [endpoint] if first else [],
        "connect/endpoints": [] if first else [endpoint],
    }.items():
        config.insert_json5(path, json.dumps(value))
    return zenoh.open(config)


def wait_until(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + CONNECT_S
    while not there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {CONNECT_S:g} s")
        time.sleep(0.005)


def _matches(publisher: zenoh.Publisher) -> bool:
    return bool(publisher.matching_status.matching)


class Publisher(Sender):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        import zenoh

        self.session = session_of(self, first=True)
        self.publishers = [
            self.session.declare_publisher(
                f"bench/{number}", congestion_control=zenoh.CongestionControl.BLOCK
            )
            for number in range(setting.topics)
        ]
        self.sends = [publisher.put for publisher in self.publishers]
        if setting.shape == "dict":
            put = self.publishers[0].put
            self.sends = [lambda payload: put(msgpack.packb(payload))]

    def connect(self) -> None:
        wait_until(
            lambda: len(self.session.info.peers_zid()) >= self.setting.receivers, "subscribers"
        )
        for publisher in self.publishers:
            wait_until(partial(_matches, publisher), "subscriber")
        time.sleep(0.1)  # it does not tell how many match


class Subscriber(Receiver):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        import zenoh

        self.session = session_of(self)
        self.subscriber = self.session.declare_subscriber(
            "bench/*", zenoh.handlers.FifoChannel(CHANNEL)
        )

    def take(self, count: int, progress: list[int]) -> None:
        recv, key, total, got = self.subscriber.recv, self.setting.key, 0, 0
        try:
            if self.setting.shape == "dict":
                while got < count:
                    total += msgpack.unpackb(recv().payload.to_bytes())[key]
                    got += 1
            else:
                while got < count:
                    total += recv().payload.to_bytes()[key]
                    got += 1
        finally:
            progress[:] = [got, total]

    def take_one(self) -> bytes:
        payload: bytes = self.subscriber.recv().payload.to_bytes()
        return payload


class Queryable(Server):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.session = session_of(self, first=True)

        def echo(query: zenoh.Query) -> None:
            query.reply("bench/echo", query.payload)

        self.queryable = self.session.declare_queryable("bench/echo", echo)


class Querier(Caller):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.session = session_of(self)
        self.querier = self.session.declare_querier("bench/echo")

    def connect(self) -> None:
        wait_until(lambda: bool(self.querier.matching_status), "queryable")

    def call(self) -> Callable[[bytes], Any]:
        get = self.querier.get

        def call(payload: bytes) -> Any:
            answer: Any = get(payload=payload).recv()
            return answer.ok.payload.to_bytes()

        return call


ROLES = {
    "publisher": Publisher,
    "subscriber": Subscriber,
    "server": Queryable,
    "caller": Querier,
}
