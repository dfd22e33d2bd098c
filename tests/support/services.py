"""Servers and clients joined as a node would join them, and a handler that a test holds back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from mesh.errors import RemoteError
from mesh.options import ServiceOptions
from mesh.sockets import codec
from mesh.sockets.calls import Requests
from mesh.sockets.client import Client
from mesh.sockets.control import Offer
from mesh.sockets.failure import read_failure
from mesh.sockets.frame import FOR_EVER, Frame, Kind, decode, encode, wire_name
from mesh.sockets.home import Home
from mesh.sockets.server import Server
from tests.support.homes import Homes

SERVICE = "add"
CALLING = 100
KEY = 1


class Net:
    """Homes 1, 2, 3 … with one server each, and home `CALLING` with all the clients."""

    def __init__(self, homes: Homes) -> None:
        self.homes = homes
        self.calling: Home = homes.make(CALLING)
        self.servers: list[Server] = []
        self.clients: list[Client] = []

    def serve(
        self,
        handler: Callable[[Any], Any],
        *,
        concurrency: int = 1,
        backlog: int = 100,
        **options: Any,
    ) -> Server:
        """A server on a home of its own; those clients that exist know it."""
        home = self.homes.make(len(self.servers) + 1, **options)
        server = Server(
            home, SERVICE, handler, ServiceOptions(concurrency=concurrency, backlog=backlog)
        )
        self.servers.append(server)
        for client in self.clients:
            self.attach(client, server)
        return server

    def client(self, scheme: str = "ipc") -> Client:
        """A client that knows all servers there are."""
        client = Client(Requests(self.calling, SERVICE), self, lambda: None)
        self.clients.append(client)
        for server in self.servers:
            self.attach(client, server, scheme)
        return client

    def node_of(self, server: Server) -> int:
        return self.servers.index(server) + 1

    def attach(self, client: Client, server: Server, scheme: str = "ipc") -> None:
        offer = Offer(KEY, "serve", SERVICE, server.endpoints())
        ipc, *tcp = server.endpoints()
        endpoint = ipc if scheme == "ipc" else tcp[0].replace("*", "127.0.0.1")
        core_of(client).attach(self.node_of(server), offer, endpoint)

    def detach(self, client: Client, server: Server, reason: str = "died") -> None:
        core_of(client).detach(self.node_of(server), KEY, reason)

    def let_through(self, server: Server) -> None:
        """Block until what was sent to it is at its socket, whether or not it reads: calls of
        another service go behind that through the same two threads of ZeroMQ."""
        beside = Server(server._home, "beside", lambda payload: payload, ServiceOptions())
        client = Client(Requests(self.calling, "beside"), self, lambda: None)
        offer = Offer(KEY + 1, "serve", "beside", beside.endpoints())
        core_of(client).attach(self.node_of(server), offer, beside.endpoints()[0])
        try:
            for _ in range(3):
                client.request(None, timeout=20)
        finally:
            client.close()
            beside.close(0)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for server in self.servers:
            server.close(0)


def core_of(client: Client) -> Requests:
    return client._core


def nothing_left(client: Client) -> bool:
    """Whether no call of `client` has left anything in its tables, nor waits on its link."""
    core = core_of(client)
    left = len(core.table) or core.table.waiting or core.link._threads
    return not left and not core.link._waiting_loops


def debts(client: Client) -> int:
    """Answers that servers still owe `client`, whoever waits for them."""
    return sum(server.owes for server in core_of(client).table._servers.values())


class Gate:
    """A handler that notes what it was given, and returns it once the test opens the gate."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.threads: list[threading.Thread] = []
        self._open = threading.Event()
        self._aopen = asyncio.Event()

    def __call__(self, payload: Any) -> Any:
        self.threads.append(threading.current_thread())
        self.started.append(payload)
        assert self._open.wait(20), "the test never opened the gate"
        return payload

    async def later(self, payload: Any) -> Any:
        """The same for a loop; `open` has to be called in that loop's thread."""
        self.started.append(payload)
        await self._aopen.wait()
        return payload

    def open(self) -> None:
        self._open.set()
        self._aopen.set()


class Held:
    """An async handler that waits, in whatever loop it runs, until the test lets it go on."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def __call__(self, payload: Any) -> Any:
        self.started.append(payload)
        event = asyncio.Event()
        self._waiting.append((asyncio.get_running_loop(), event))
        await event.wait()
        return payload

    def go_on(self) -> None:
        for loop, event in self._waiting:
            loop.call_soon_threadsafe(event.set)


@contextmanager
def calls(*call: Callable[[], Any]) -> Iterator[list[Any]]:
    """Make each call in a thread of its own: their results or errors, in order of the calls, once
    the block is left."""
    outcomes: list[Any] = [None] * len(call)

    def run(i: int) -> None:
        try:
            outcomes[i] = call[i]()
        except Exception as error:  # noqa: BLE001  an outcome like any other
            outcomes[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(call))]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        for thread in threads:
            thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"


class RawCaller:
    """A program without this package: a DEALER that writes frames itself."""

    def __init__(self, server: Server, *, rcvhwm: int = 1000) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.rcvhwm = rcvhwm
        self.socket.connect(server.endpoints()[0])

    def send(
        self,
        seq: int,
        payload: Any = None,
        *,
        kind: int = Kind.REQUEST,
        remaining: int = FOR_EVER,
        name: str = SERVICE,
    ) -> None:
        body = b"" if kind == Kind.CANCEL else codec.pack_body([codec.pack(payload)])
        first = encode(wire_name(name), kind, body, sender=7, seq=seq, remaining=remaining)
        self.socket.send(first)

    def recv(self) -> Frame:
        assert self.socket.poll(5000), "no answer came"
        return decode(self.socket.recv_multipart())

    def result(self, seq: int) -> Any:
        """The result that answers `seq`, which has to be the next answer."""
        frame = self.recv()
        assert (frame.kind, frame.seq) == (Kind.REPLY, seq)
        return codec.unpack_frame(frame, 1 << 26)[0][0]

    def error(self, seq: int) -> tuple[str, RemoteError]:
        """The error that answers `seq`, which has to be the next answer."""
        frame = self.recv()
        assert (frame.kind, frame.seq) == (Kind.ERROR, seq)
        return read_failure(codec.unpack_frame(frame, 1 << 26)[0][0])

    def close(self) -> None:
        self.context.destroy(linger=0)


class RawServer:
    """A server that a test answers for: a ROUTER that reads and writes frames itself."""

    def __init__(self, net: Net, node_id: int = 50, *, listening: bool = True) -> None:
        self.node_id = node_id
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.endpoint = f"ipc://{net.homes.directory}/raw{node_id}"
        if listening:
            self.listen()

    def listen(self) -> None:
        self.socket.bind(self.endpoint)

    def attach(self, client: Client) -> None:
        core_of(client).attach(self.node_id, Offer(KEY, "serve", SERVICE), self.endpoint)

    def recv(self) -> tuple[bytes, Frame]:
        """The next frame, and whom to answer."""
        assert self.socket.poll(5000), "no request came"
        caller, *parts = self.socket.recv_multipart()
        return caller, decode(parts)

    def reply(
        self,
        caller: bytes,
        seq: int,
        payload: Any,
        *,
        kind: int = Kind.REPLY,
        sender: int | None = None,
        name: str = SERVICE,
    ) -> None:
        body = codec.pack_body([codec.pack(payload)])
        sender = self.node_id if sender is None else sender
        frame = encode(wire_name(name), kind, body, sender=sender, seq=seq)
        self.socket.send_multipart([caller, frame])

    def close(self) -> None:
        self.context.destroy(linger=0)
