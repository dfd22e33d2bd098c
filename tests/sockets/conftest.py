"""What tests of patterns get: nodes' homes joined by hand, and who works or answers there."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from mesh.sockets import moment
from tests.support import services
from tests.support.homes import Homes
from tests.support.links import Box, Inbox
from tests.support.queues import Crew


@pytest.fixture
def nets(homes: Homes, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes nets of the kind that the test's module imports as `Net`: of topics, queues or
    services."""
    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(request.module.Net(homes, **options))
        return made[-1]

    yield make
    for net in made:
        net.close()


@pytest.fixture
def net(nets: Callable[..., Any]) -> Any:
    """One of those, in which each message leaves by itself."""
    return nets()


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.dismiss()


@pytest.fixture
def gate() -> Iterator[services.Gate]:
    gate = services.Gate()
    yield gate
    gate.open()


@pytest.fixture
def raw_server(net: services.Net) -> Iterator[services.RawServer]:
    server = services.RawServer(net)
    yield server
    server.close()


@pytest.fixture
def no_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that has none: pytest-timeout has one."""
    monkeypatch.setattr(moment, "_HANDLED", (signal.SIGTERM,))


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def inbox(context: zmq.Context[zmq.Socket[bytes]], tmp_path: object) -> Iterator[Inbox]:
    inbox = Inbox(context, f"ipc://{tmp_path}/inbox")
    yield inbox
    inbox.link.close()


@pytest.fixture
def box() -> Iterator[Box]:
    box = Box()
    yield box
    box.link.close()
