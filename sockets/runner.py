"""Whoever reads requests and runs the handler: threads, or tasks of an event loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from mesh.sockets.server_threads import Threads

if TYPE_CHECKING:
    from mesh.sockets.server import Server


class Runner(Protocol):
    def start(self) -> None:
        """Begin to read."""

    def over(self) -> bool:
        """Whether it can read no more, though nobody closed the service."""

    def end(self) -> None:
        """The service has ended: nobody waits for anything now."""


def runner_of(server: Server, concurrency: int) -> Runner:
    if not _is_async(server.handler):
        return Threads(server, concurrency)
    from mesh.sockets.server_asyncio import loop_runner  # blocking programs never import asyncio

    return loop_runner(server)


def _is_async(handler: Callable[[Any], Any]) -> bool:
    """Whether it is an ``async def``, or an object that is called like one."""
    call = getattr(handler, "__call__", None)  # noqa: B004  to look at it, not whether it is there
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(call)
