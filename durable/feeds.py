"""Several partitions read at once, for one who waits for whichever has something.

Each is read by a thread of its own, since each route has a link of its own to wait on; what they
read comes together here, at a link without sockets. Bounded: a partition is read on once what it
brought last was taken.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from mesh.durable.reader import Chunk, PartitionReader, read
from mesh.durable.route import Route, wake
from mesh.errors import Closed, MeshError
from mesh.sockets.link import Link

Begin = Callable[[Callable[[], bool]], PartitionReader | None]
"""Find out where to begin to read a partition; None once it is to be stopped, as it is told by what
it is called with."""


class _Feed:
    """One partition, and the thread that reads it."""

    def __init__(self, route: Route, begin: Begin, deliver: Callable[[Chunk | MeshError], None]):
        self._route = route
        self._begin = begin
        self._deliver = deliver
        self._taken = threading.Semaphore(2)
        """What was brought and not taken yet: one chunk while the next one is being read."""
        self._closed = False
        name = f"mesh replay {route.partition}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def taken(self) -> None:
        self._taken.release()

    def close(self) -> None:
        self._closed = True
        self._taken.release()
        wake(self._route)

    def _work(self) -> None:
        reader: PartitionReader | None = None
        try:
            reader = self._begin(self._is_closed)
            if reader is None:
                return
            while not self._closed and (reader.follow or reader.offset < reader.end):
                self._taken.acquire()
                chunk = read(reader, None, stopped=self._is_closed)
                if self._closed:
                    return
                self._deliver(chunk)
                if not chunk:
                    return
        except (MeshError, OSError) as error:
            self._deliver(error if isinstance(error, MeshError) else MeshError(str(error)))
        finally:
            if reader is not None:
                reader.close()

    def _is_closed(self) -> bool:
        return self._closed


class Feeds:
    """See above."""

    def __init__(self, stream: str) -> None:
        self.link = Link(f"replay of {stream!r}")
        self._feeds: dict[str, _Feed] = {}
        self._brought: dict[str, deque[Chunk | MeshError]] = {}

    def __contains__(self, partition: str) -> bool:
        """Whether that one is read."""
        return partition in self._feeds

    def add(self, route: Route, begin: Begin) -> None:
        """Read that one, where `begin` says, which is called in its thread. Raises nothing of what
        that does: it is for who reads."""
        partition = route.partition
        brought = self._brought[partition] = deque()

        def deliver(chunk: Chunk | MeshError) -> None:
            try:
                with self.link:
                    brought.append(chunk)
                    self.link.wake_all()
            except Closed:
                return  # nobody reads any more

        self._feeds[partition] = _Feed(route, begin, deliver)

    def take(self, partition: str | None = None) -> tuple[str, Chunk] | None:
        """What that one has brought, or any. Under the lock: for the link to wait with. Raises what
        ended the reading."""
        for each, brought in self._brought.items():
            if brought and partition in (None, each):
                chunk = brought.popleft()
                if isinstance(chunk, MeshError):
                    raise chunk
                self._brought[each] = self._brought.pop(each)  # the others first, the next time
                self._feeds[each].taken()
                return each, chunk
        return None

    def close(self) -> None:
        """Read no more."""
        for feed in self._feeds.values():
            feed.close()
        self.link.close()
