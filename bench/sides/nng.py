"""nng by pynng.

Its publishers never wait: what a subscriber has no room for is lost. So that nothing is, the
subscribers acknowledge each `chunk` of messages on a socket beside, and the publisher keeps so few
unacknowledged as fit into the buffers, which are the largest there are.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

from bench.roles import Caller, Receiver, Sender, Server, Stalled, at_most
from bench.setting import Address, Setting

TRANSPORTS = ("ipc", "tcp")
BUFFER = 8192
"""Messages, the most that nng takes."""
CONNECT_S = 20.0
STALL_MS = 15_000


def missing() -> str | None:
    return None if importlib.util.find_spec("pynng") else "pynng is not installed (extra: bench)"


def chunk_of(setting: Setting) -> int:
    return 8 if setting.large else 1000


CHUNKS = 4
"""Unacknowledged at most."""


class Connected:
    """Counts who has connected to a socket."""

    def __init__(self, socket: Any) -> None:
        self._came = threading.Semaphore(0)
        socket.add_post_pipe_connect_cb(lambda pipe: self._came.release())

    def wait(self, count: int) -> None:
        for _ in range(count):
            if not self._came.acquire(timeout=CONNECT_S):
                raise TimeoutError(f"not {count} connected within {CONNECT_S:g} s")


def timed(name: str, **options: Any) -> Any:
    import pynng

    return getattr(pynng, name)(recv_timeout=STALL_MS, send_timeout=STALL_MS, **options)


class Publisher(Sender):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.socket = timed("Pub0", send_buffer_size=BUFFER)
        self.connected = Connected(self.socket)
        self.socket.listen(address.zmq)
        self.acks = timed("Pull0", recv_buffer_size=BUFFER)
        self.acks.listen(f"ipc://{address.directory}/acks")
        self.sends = [self.socket.send]
        self.chunk = chunk_of(setting)

    def connect(self) -> None:
        self.connected.wait(self.setting.receivers)

    def send(self, count: int, seconds: float) -> dict[str, Any]:
        pool, send = cycle(self.setting.payloads()), self.socket.send
        acked: Counter[bytes] = Counter()
        everybody = [bytes([number]) for number in range(self.setting.receivers)]
        with at_most(seconds):
            start = time.perf_counter()
            for number, done in enumerate(range(0, count, self.chunk), 1):
                for payload in islice(pool, min(self.chunk, count - done)):
                    send(payload)
                while min(acked[who] for who in everybody) < number - CHUNKS:
                    acked[self.acks.recv()] += 1
            end = time.perf_counter()
            while sum(acked.values()) < len(everybody) * (count // self.chunk):
                acked[self.acks.recv()] += 1
        return {"start": start, "end": end}


class Subscriber(Receiver):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.socket = timed("Sub0", recv_buffer_size=BUFFER)
        self.socket.subscribe(b"")
        self.socket.dial(address.zmq, block=True)
        self.acks = timed("Push0")
        self.acks.dial(f"ipc://{address.directory}/acks", block=True)
        self.own = bytes([int(os.environ["BENCH_WORKER"])])

    def take(self, count: int, progress: list[int]) -> None:
        import pynng

        recv, key, total, got, chunk = self.socket.recv, self.setting.key, 0, 0, self._chunk()
        try:
            while got < count:
                for _ in range(min(chunk, count - got)):
                    total += recv()[key]
                    got += 1
                if got % chunk == 0:
                    self.acks.send(self.own)
        except pynng.Timeout:
            raise Stalled from None
        finally:
            progress[:] = [got, total]

    def _chunk(self) -> int:
        return chunk_of(self.setting)

    def take_one(self) -> bytes:
        data: bytes = self.socket.recv()
        return data


class Pusher(Sender):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.socket = timed("Push0", send_buffer_size=BUFFER)
        self.connected = Connected(self.socket)
        self.socket.listen(address.zmq)
        self.sends = [self.socket.send]

    def connect(self) -> None:
        self.connected.wait(self.setting.receivers)


class Puller(Receiver):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.socket = timed("Pull0", recv_buffer_size=BUFFER)
        self.socket.recv_timeout = -1  # it may be idle for as long as others have their turn
        self.socket.dial(address.zmq, block=True)

    def take(self, count: int, progress: list[int]) -> None:
        recv, key, total, got = self.socket.recv, self.setting.key, 0, 0
        try:
            while got < count:
                total += recv()[key]
                got += 1
        finally:
            progress[:] = [got, total]

    def take_one(self) -> bytes:
        data: bytes = self.socket.recv()
        return data


class Replier(Server):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        import pynng

        self.socket = pynng.Rep0()
        self.socket.listen(address.zmq)
        threading.Thread(target=self._echo, daemon=True).start()

    def _echo(self) -> None:
        recv, send = self.socket.recv, self.socket.send
        while True:
            send(recv())


class Requester(Caller):
    def call(self) -> Callable[[bytes], Any]:
        socket = timed("Req0")
        socket.dial(self.address.zmq, block=True)
        send, recv = socket.send, socket.recv

        def call(payload: bytes) -> Any:
            send(payload)
            return recv()

        return call


ROLES = {
    "publisher": Publisher,
    "subscriber": Subscriber,
    "pusher": Pusher,
    "puller": Puller,
    "server": Replier,
    "caller": Requester,
}
