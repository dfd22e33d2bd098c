"""How an ``async def`` handler is run: in tasks of an event loop, which watches the sockets itself.

It is the loop that was running where the service was registered, or one of the service's own in a
thread of its own. Imported when first needed, so that blocking programs never import asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from functools import partial
from typing import TYPE_CHECKING

from mesh.errors import Closed
from mesh.sockets.single import payload_of

if TYPE_CHECKING:
    from mesh.sockets.server import Request, Server

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
    """Tasks of an event loop: one that waits for requests, and one for each handler that runs."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._name = f"mesh service {server.channel}"
        self._context = contextvars.copy_context()
        self._tasks: dict[asyncio.Task[None], Request | None] = {}
        """Each with the request that it has not begun with."""

    def start(self) -> None:
        reader = self._loop.create_task(self._read(), name=self._name)
        self._tasks[reader] = None
        reader.add_done_callback(self._read_ended)

    async def _read(self) -> None:
        with contextlib.suppress(Closed):
            await self._server.link.wait_async(self._begin, None, "request")

    def _begin(self) -> None:
        """Begin with all requests that may be started. An attempt that goes on for ever."""
        while (request := self._server.take()) is not None:
            # Each has a task, and a context, of its own.
            task = self._loop.create_task(
                self._serve(request), name=self._name, context=self._context.copy()
            )
            self._tasks[task] = request
            task.add_done_callback(self._served)
            if self._server.came_alone:
                return

    async def _serve(self, request: Request) -> None:
        server = self._server
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = None
        try:
            payload = payload_of(request.message, server.bytes_max)
            answer = server.result(await server.handler(payload))
        except BaseException as error:
            server.finish(request, server.failed(error), self._begin)
            if isinstance(error, asyncio.CancelledError) or _is_ctrl_c(error):
                raise  # meant for the loop; anything else is the handler's
        else:
            server.finish(request, answer, self._begin)

    def _served(self, task: asyncio.Task[None]) -> None:
        request = self._tasks.pop(task)
        if request is not None:  # cancelled before it began
            with contextlib.suppress(Closed):
                self._server.link.run(partial(self._server.refuse, request))

    def _read_ended(self, reader: asyncio.Task[None]) -> None:
        del self._tasks[reader]
        if not self._server.closing:
            # It was cancelled, perhaps before it began. The handlers that run are cancelled with
            # it, and their callers are told so.
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
