"""Calling services.

Guarantee: a request goes to one server, at most once unless the caller declares it idempotent
(``retry=True``), and the call ends by its timeout at the latest: with the result, or an error that
says what is known. A server that is gone, or whose connection is lost, fails its requests
(`PeerLost`), at once or within a tick; one that is full has the next server tried, and `Busy` comes
when all are. How that is done: `mesh.sockets.calls`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mesh import limits
from mesh.errors import Timeout
from mesh.options import check_count, check_timeout
from mesh.sockets import codec
from mesh.sockets.calls import Call, Requests
from mesh.sockets.frame import Malformed
from mesh.sockets.handle import Handle
from mesh.sockets.single import encode, payload_of

_LINGER_MS = 200
"""Cancellations sent when a client is closed get this long to leave."""


class Client(Handle):
    """A handle to call a service, from `Node.client`. Safe from several threads and tasks."""

    def __init__(self, core: Requests, owner: object, release: Callable[[], None]) -> None:
        super().__init__(core.link.what, owner, release)
        self._core = core

    @property
    def channel(self) -> str:
        """The name of the service."""
        return self._core.channel

    @property
    def servers(self) -> int:
        """How many servers are connected. Does not block."""
        return self._core.table.servers

    def request(
        self,
        payload: Any,
        *,
        headers: codec.Headers | None = None,
        timeout: float | None = 10.0,
        retry: bool = False,
    ) -> Any:
        """Call the service and return what its handler returned.

        `payload`: see docs/payloads.md. A buffer that may be written to is copied; one that is
        read-only is not, and must not change. `headers`: str keys, plain values. Blocks until the
        answer is there, or one of these: `Timeout` after `timeout` seconds (None: never), also if
        no server came by then; `PeerLost` when the server that has the request is gone, at once,
        unless it may go to another (`retry`: whether running it twice does no harm); `Busy` if no
        server has room, or too many requests are outstanding here; `RemoteError` if the handler
        raised, or its result has no form to send; `NotSerializable` and `PayloadTooLarge` before
        anything is sent; `Closed`.
        """
        core = self._core
        call: Call | None = None
        exchange = core.exchange
        try:
            if exchange is not None and not headers:
                answer = exchange.attempt(payload, timeout, retry)
                if isinstance(answer, bytes):
                    return payload_of(answer, core.bytes_max)
                call = answer
            if call is None:
                message = encode(payload, headers, core.bytes_max)
                call = Call(core, message, check_timeout(timeout), retry)
            core.link.wait(call.attempt, call.timeout, "answer", slot=call)
        except Malformed as fault:
            assert exchange is not None
            raise core.undecodable(fault, exchange.peer) from None
        except Timeout:
            assert call is not None
            core.abandon(call)
            raise core.late(call) from None
        except BaseException:
            if call is not None:
                core.abandon(call)
            raise
        return core.result(call)

    async def arequest(
        self,
        payload: Any,
        *,
        headers: codec.Headers | None = None,
        timeout: float | None = 10.0,
        retry: bool = False,
    ) -> Any:
        """`request` for asyncio. Cancelled, the request is not run unless it has been started."""
        core = self._core
        message = encode(payload, headers, core.bytes_max)
        call = Call(core, message, check_timeout(timeout), retry)
        try:
            await core.link.wait_async(call.attempt, call.timeout, "answer", slot=call)
        except Timeout:
            core.abandon(call)
            raise core.late(call) from None
        except BaseException:
            core.abandon(call)
            raise
        return core.result(call)

    def wait_for(self, count: int, *, timeout: float | None = None) -> None:
        """Block until at least `count` servers are connected. Raises `Timeout`, `Closed`."""
        self._core.link.wait(*self._connected(count, timeout))

    async def await_for(self, count: int, *, timeout: float | None = None) -> None:
        """`wait_for` for asyncio."""
        await self._core.link.wait_async(*self._connected(count, timeout))

    def close(self) -> None:
        """Give the client back; whoever waits gets `Closed`. Does not block; idempotent."""
        self._core.close(_LINGER_MS)
        super().close()

    def _connected(self, count: int, timeout: float | None) -> tuple[Any, float | None, str]:
        check_count(count, "count", 0, limits.PEERS_MAX)
        core = self._core

        def attempt() -> bool | None:
            # Whoever waits first watches the sockets for all.
            core.read()
            return core.table.servers >= count or None

        return attempt, check_timeout(timeout), f"{count} servers of {self.channel!r}"
