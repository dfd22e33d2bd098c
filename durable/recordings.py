"""All recordings of a node: which of its topics goes where (`mesh.durable.recording`)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from functools import partial

from mesh import limits
from mesh.durable.producing import Producing
from mesh.durable.recording import Recorder, Recording
from mesh.durable.streams import Streams
from mesh.errors import Closed, InvalidOption
from mesh.names import check_name, matches
from mesh.sockets.control import Offer
from mesh.sockets.topic import Tap
from mesh.sockets.topics import Topics


class Recordings:
    """See above. Safe from any thread."""

    def __init__(
        self,
        streams: Streams,
        topics: Iterable[Topics],
        *,
        offer: Callable[[Offer], object],
        withdraw: Callable[[int], object],
        next_key: Callable[[], int],
    ) -> None:
        """`offer` tells the peers, and `withdraw` takes back what has that key."""
        self._streams = streams
        self._topics = tuple(topics)
        self._offer = offer
        self._withdraw = withdraw
        self._next_key = next_key
        self._lock = threading.Lock()
        self._recorders: list[Recorder] = []

    def record(self, pattern: str, into: str, owner: object) -> Recording:
        """Begin. Raises `InvalidName`, `InvalidOption`, `Closed`."""
        check_name(into)
        core = Recorder(
            self._streams.node_id,
            pattern,
            into,
            self._streams.bytes_max,
            partial(Producing, self._streams, into),
            partial(self._tell, pattern, into),
            self._withdraw,
            self._send,
            self._streams.is_there,
        )
        with self._lock:
            if len(self._recorders) >= limits.RECORDINGS_MAX:
                raise InvalidOption(
                    f"{limits.RECORDINGS_MAX:,} recordings are open, which is the limit"
                )
            self._recorders.append(core)
        try:
            self._streams.add(core)
            core.start()
            self._tap()
        except BaseException:
            self._release(core)
            raise
        return Recording(core, owner, partial(self._release, core))

    def join(self, timeout: float) -> None:
        """The node has ended: wait for the threads, which are about to."""
        for recorder in self._recorders:
            recorder.join(timeout)

    def _release(self, core: Recorder) -> None:
        with self._lock:
            if core not in self._recorders:
                return
            self._recorders.remove(core)
        with contextlib.suppress(Closed):
            self._tap()
        core.finish()

    def _tap(self) -> None:
        for topics in self._topics:
            topics.link.run(partial(topics.tap, self._taps_of))

    def _send(self) -> None:
        for topics in self._topics:
            topics.link.run(topics.flush)

    def _taps_of(self, topic: str) -> tuple[Tap, ...]:
        """The recordings of a topic: of several into one stream the first."""
        taps: dict[str, Tap] = {}
        for recorder in tuple(self._recorders):
            if matches(recorder.channel, topic):
                taps.setdefault(recorder.into, recorder)
        return tuple(taps.values())

    def _tell(self, pattern: str, into: str, partition: str) -> int:
        key = self._next_key()
        self._offer(Offer(key, "record", into, partition=partition, pattern=pattern))
        return key
