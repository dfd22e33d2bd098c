"""Filling the gaps of a node's subscribers from where the publishers' nodes have recorded.

One thread for all of them, from the first gap on. It reads the log of each partition that may have
something, and hands the subscription what that misses (`mesh.sockets.repairing`); where to begin is
`mesh.durable.search`'s business. What is not found the subscription gives up by itself: whatever
goes wrong here is a gap that is counted later.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Final

from mesh.durable import reading
from mesh.durable.cursor import Cut, Gap
from mesh.durable.protocol import Find, Place
from mesh.durable.reader import Chunk, PartitionReader
from mesh.durable.recording_finder import RecordingFinder
from mesh.durable.records import BatchOrigin, headers_of
from mesh.durable.route import Ask, answer, expected
from mesh.durable.search import Search
from mesh.durable.streams import Streams
from mesh.errors import Closed, MeshError, Timeout
from mesh.message import Origin, Run
from mesh.sockets.frame import Malformed
from mesh.sockets.home import node_text
from mesh.sockets.repairing import RepairingSubscription
from mesh.sockets.repairs import FlowKey, Want

logger = logging.getLogger(__name__)

_TURN_S: Final = 0.02
"""Longest wait for one sidecar's answer before the others have their turn, and longest sleep while
anything is missing."""
_KEPT_S: Final = 2.0
"""How long a place in a log is kept for the next gap."""
_AGAIN_S: Final = 0.25
"""After a sidecar has refused it is asked again."""
_WHAT: Final = "part of a recording"


class _Source:
    """One partition, as it is read for one subscriber."""

    def __init__(self, streams: Streams, stream: str, partition: str) -> None:
        self.used_at = 0.0
        self._streams = streams
        self._stream = stream
        self._partition = partition
        self._search = Search()
        self._finding: Ask | None = None
        self._reader: PartitionReader | None = None
        self._not_before = 0.0

    def step(self, core: RepairingSubscription, wants: Sequence[Want], now: float) -> bool:
        """Read some; whether there may be more at once. Blocks for a turn at most."""
        self.used_at = now
        if now < self._not_before or not self._streams.is_there(self._partition):
            return False
        try:
            return self._step(core, wants, now)
        except Timeout:
            return False
        except (MeshError, OSError) as error:
            logger.debug("%s: nothing from %s: %s", core.link.what, self._partition, error)
            self.close()
            self._search, self._not_before = Search(), now + _AGAIN_S
            return False

    def _step(self, core: RepairingSubscription, wants: Sequence[Want], now: float) -> bool:
        route = self._streams.route_to(self._partition)
        begin_ns = self._search.begin(wants)
        if begin_ns is not None:
            self.close()
            find = Find(self._stream, begin_ns)
            self._finding = route.link.run(partial(route.begin, find))
        if self._finding is not None:
            reply = answer(route, self._finding, _TURN_S, _WHAT, again=True)
            place = expected(Place, reply, route)
            self._finding = None
            self._reader = PartitionReader(route, self._stream, self._streams.bytes_max)
            self._reader.offset, self._reader.follow = place.offset, True
            self._search.begun(from_start=place.offset <= place.start)
        assert self._reader is not None
        chunk = self._read(self._reader)
        if not chunk:
            self._search.at_end(wants, now)
            return False
        if isinstance(chunk, Cut):  # what was read may be there again, elsewhere
            self.close()
            self._search = Search()
        elif not isinstance(chunk, Gap):
            self._take(core, wants, chunk)
        return True

    def _read(self, reader: PartitionReader) -> Chunk | None:
        chunk = reader.direct()
        if chunk is not None:
            return chunk
        ask = reader.route.link.run(reader.asking)
        try:
            reply = answer(reader.route, ask, _TURN_S, _WHAT, refused=False, again=True)
        except Timeout:
            return None
        return None if reply is None else reader.answered(reply)

    def _take(
        self, core: RepairingSubscription, wants: Sequence[Want], chunk: list[reading.Run]
    ) -> None:
        by_flow: dict[FlowKey, list[Want]] = {}
        for want in wants:
            by_flow.setdefault(want.flow, []).append(want)
        found: list[tuple[FlowKey, Run, int]] = []
        for run in chunk:
            origin = run.source.columns.origin
            if origin is None:
                continue
            flow = origin.sender << 1 | origin.waits, origin.channel
            first = origin.seq + run.first
            last = first + len(run.payloads) - 1
            if not self._search.read(flow, first, last, by_flow.get(flow, ())):
                break
            if _overlaps(by_flow.get(flow, ()), first, last):
                found.append((flow, _as_published(run, origin), _size_of(run)))
        core.found(found)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._finding is not None:
            self._streams.route_to(self._partition).abandon(self._finding)
        self._reader = self._finding = None


class Repairer:
    """See above. Safe from any thread."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._recordings = RecordingFinder()
        streams.add(self._recordings)
        self._bell = threading.Event()
        self._wanting: dict[RepairingSubscription, dict[tuple[str, str], _Source]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def wanted(self, core: RepairingSubscription) -> None:
        """That one has a gap. Under its link's lock; does not block."""
        with self._lock:
            self._wanting.setdefault(core, {})
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="mesh repair", daemon=True)
                with contextlib.suppress(RuntimeError):  # the interpreter ends
                    self._thread.start()
        self._bell.set()

    def room(self) -> None:
        """Somebody can take more. Does not block."""
        self._bell.set()

    def close(self) -> None:
        """Look for nothing more. Does not block."""
        self._closed = True
        self._bell.set()

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread, if there is one."""
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(timeout)

    # -- The thread --------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closed:
            self._bell.clear()
            with self._lock:
                wanting = list(self._wanting.items())
            more = [self._serve(core, sources) for core, sources in wanting]
            if not any(more):
                self._bell.wait(_TURN_S if wanting else None)
        with self._lock:
            served = list(self._wanting.values())
        for sources in served:
            for source in sources.values():
                source.close()

    def _serve(self, core: RepairingSubscription, sources: dict[tuple[str, str], _Source]) -> bool:
        """One turn for that subscriber; whether there may be more at once."""
        now, more = time.monotonic(), False
        try:
            by_place = self._by_place(core.wants())
            for place, wants in by_place.items():
                source = sources.get(place)
                if source is None:
                    source = sources[place] = _Source(self._streams, *place)
                more = source.step(core, wants, now) or more
        except Closed:
            more = False
        for place, source in list(sources.items()):
            if core.is_whole and now - source.used_at > _KEPT_S:
                source.close()
                del sources[place]
        if not sources and core.is_whole:
            self._forget(core)
        return more

    def _forget(self, core: RepairingSubscription) -> None:
        with self._lock:
            if core.is_whole:
                del self._wanting[core]

    def _by_place(self, wants: Sequence[Want]) -> dict[tuple[str, str], list[Want]]:
        places: dict[FlowKey, set[tuple[str, str]]] = {}
        by_place: dict[tuple[str, str], list[Want]] = {}
        for want in wants:
            owner, topic = want.flow
            if want.flow not in places:
                places[want.flow] = self._recordings.of(owner >> 1, topic)
            for place in places[want.flow]:
                by_place.setdefault(place, []).append(want)
        return by_place


def _overlaps(wants: Sequence[Want], first: int, last: int) -> bool:
    """Whether any of them, which ascend, has something of those."""
    at = bisect_left(wants, first, key=_last_of)
    return at < len(wants) and wants[at].first <= last


def _last_of(want: Want) -> int:
    return want.last


def _as_published(run: reading.Run, origin: BatchOrigin) -> Run:
    """As if it had come from the publisher."""
    flat = run.source.columns.headers
    try:
        headers = None if flat is None else [headers_of(each) for each in flat]
    except Malformed:
        headers = None
    return Run(
        run.payloads,
        run.first,
        Origin(origin.channel, node_text(origin.sender), origin.seq, origin.time_ns, headers),
    )


def _size_of(run: reading.Run) -> int:
    return sum(len(each) for each in run.payloads if isinstance(each, bytes | str))
