"""Homes made by hand: what a pattern's core needs, without a node around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mesh.sockets.flusher import Flusher
from mesh.sockets.home import Home
from mesh.sockets.transport import Transport


@dataclass
class Made:
    """What cores told their node."""

    marks: list[tuple[int, str, bool]] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)


class ByHand(Flusher):
    """A flusher without a thread: a test says when a window is over."""

    def __init__(self) -> None:
        super().__init__(window_s=3600)

    def _start(self) -> bool:
        return True

    def turn(self) -> list[bool]:
        """Close the batches of all cores that have some open; what each of them says."""
        return [core.close_batches() for core in tuple(self._cores)]


@dataclass
class Homes:
    """Makes homes whose sockets lie in one folder; closes them all in the end."""

    directory: Path
    made: dict[int, Made] = field(default_factory=dict)
    _homes: list[Home] = field(default_factory=list)

    def make(self, node_id: int, window_s: float | None = 0, **options: Any) -> Home:
        """`window_s`: 0 for tests that count on each message leaving by itself; None for those that
        close batches `ByHand`."""
        transport = Transport(
            socket_path=lambda label: f"{self.directory}/{node_id}.{label}", **options
        )
        made = self.made[node_id] = Made()

        def run_hook(hook: Callable[[Any], object], event: Any) -> None:
            made.events.append(event)
            hook(event)

        flusher = ByHand() if window_s is None else Flusher(window_s)
        home = Home(node_id, transport, lambda *mark: made.marks.append(mark), run_hook, flusher)
        self._homes.append(home)
        return home

    def close(self) -> None:
        for home in self._homes:
            home.flusher.close()
            home.transport.context.destroy(linger=0)


@pytest.fixture
def homes(private_runtime_dir: str) -> Iterator[Homes]:
    """`Homes` in a private folder."""
    homes = Homes(Path(private_runtime_dir))
    yield homes
    homes.close()
