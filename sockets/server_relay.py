"""How requests are passed on to who answers them later, from whichever thread.

One thread reads and passes on, so in the order in which they came; the answers may come in any. A
handler that blocks holds up whoever asks, which is how it says that it has too much to do. To one
request that came alone it may have the thread itself do the work.
"""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from mesh import limits
from mesh.errors import Closed
from mesh.options import ServiceOptions
from mesh.sockets.frame import Malformed
from mesh.sockets.single import payload_of

if TYPE_CHECKING:
    from mesh.sockets.server import Request, Server

logger = logging.getLogger(__name__)


class _Relaying(ServiceOptions, frozen=True, kw_only=True):
    """A request counts as running until it is answered, and as many may as come."""

    def __post_init__(self) -> None:
        """There is nothing to check."""


OPTIONS: Final = _Relaying(concurrency=1 << 31, backlog=limits.OUTSTANDING_MAX)


class Relay:
    """The runner of a server whose handler is called with each payload, a function to answer with,
    to be called once, and whether nothing else was there: what it returns then, if anything, is
    called before the next request is read."""

    def __init__(self, server: Server, concurrency: int) -> None:
        self._server = server

    def start(self) -> None:
        name = f"mesh {self._server.kind} {self._server.channel}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def over(self) -> bool:
        return False

    def end(self) -> None:
        """It notices by itself."""

    def _work(self) -> None:
        server = self._server
        while True:
            try:
                request = server.link.wait(server.take, None, "request")
            except Closed:
                return
            try:
                payload = payload_of(request.message, server.bytes_max)
                work = server.handler(payload, partial(self._answer, request), server.came_alone)
                if work is not None:
                    work()
            except Malformed as error:
                server.finish(request, server.failed(error))
            except Exception as error:
                logger.exception("%s failed", server.link.what)
                server.finish(request, server.failed(error))

    def _answer(self, request: Request, value: Any) -> None:
        self._server.finish(request, self._server.result(value))
