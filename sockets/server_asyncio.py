"""How an ``async def`` handler is run: in tasks of an event loop, which watches the sockets itself.

It is the loop that was running where the service was registered, or one of the service's own in a
thread of its own. Imported when first needed, so that blocking programs never import asyncio.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING

from mesh.errors import Closed

if TYPE_CHECKING:
    from mesh.sockets.server import Server

logger = logging.getLogger(__name__)

_LAST_ANSWERS_MS = 1000
"""How long handlers may take to notice that their event loop ends."""


def loop_runner(server: Server) -> LoopTasks | OwnLoop:
    """The runner in the loop that is running here, or in a new one."""
    try:
        return LoopTasks(server, asyncio.get_running_loop())
    except RuntimeError:
        return OwnLoop(server)


class LoopTasks:
    """Tasks of an event loop: one that waits for a request, and one for each handler that runs."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Have a task wait for the next request. Each serves one, so that it has a context of its
        own."""
        name = f"mesh service {self._server.channel}"
        self._reader = self._loop.create_task(self._serve(), name=name)
        self._tasks.add(self._reader)
        self._reader.add_done_callback(self._ended)

    async def _serve(self) -> None:
        server = self._server
        try:
            request = await server.link.wait_async(
                server.take, None, "request", give_back=server.refuse
            )
        except Closed:
            return
        self.start()
        try:
            answer = server.result(await server.handler(server.payload(request)))
        except BaseException as error:
            server.finish(request, server.failed(error))
            if isinstance(error, asyncio.CancelledError) or _is_ctrl_c(error):
                raise  # meant for the loop; anything else is the handler's
        else:
            server.finish(request, answer)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task is self._reader and not self._server.closing:
            # Cancelled before it could hand the reading on, perhaps before it began. The handlers
            # that run are cancelled with it, and their callers are told so.
            logger.warning("service %r ends with its event loop", self._server.channel)
            self._server.close(_LAST_ANSWERS_MS)

    def over(self) -> bool:
        return self._loop.is_closed()

    def end(self) -> None:
        """The tasks notice by themselves."""

    async def until_closed(self) -> None:
        """For a loop that has nothing else to do."""
        while self._tasks:
            await asyncio.wait(self._tasks)


class OwnLoop:
    """An event loop in a thread of the service's own."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def start(self) -> None:
        name = f"mesh service {self._server.channel}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def over(self) -> bool:
        return False

    def end(self) -> None:
        """Its tasks notice by themselves."""

    def _work(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        tasks = LoopTasks(self._server, asyncio.get_running_loop())
        tasks.start()
        await tasks.until_closed()


def _is_ctrl_c(error: BaseException) -> bool:
    """Only the main thread is interrupted; elsewhere it was the handler that raised it."""
    here = threading.current_thread()
    return isinstance(error, KeyboardInterrupt) and here is threading.main_thread()
