"""The streams of a sidecar that are being opened, and who waits for that.

Opening one takes as long as its disk does. So a thread beside does it, of which there are a bounded
number, or whoever has to have the stream there and then. What is asked of it meanwhile waits here,
and is passed on in the order in which it came, before the stream counts as open. No lock is held
meanwhile: whoever asks for another stream waits only if all these threads are busy, or for room
behind this one (`patient`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from queue import SimpleQueue

import msgspec

from mesh import limits
from mesh.durable.hosted import Hosted
from mesh.durable.outcomes import CLOSED, Refused, failed
from mesh.options import StreamOptions

logger = logging.getLogger(__name__)

Then = Callable[[Hosted | Refused], object]


class _Asked(msgspec.Struct, frozen=True, eq=False):
    then: Then
    options: StreamOptions | None
    make: bool
    bytes: int


class _BeingOpened:
    def __init__(self, *, begun: bool = False) -> None:
        self.begun = begun
        """Whether somebody is at it."""
        self.waiting: deque[_Asked] = deque()
        self.bytes = 0
        self.hosted: Hosted | None = None
        """Once it is open, as long as somebody waits."""


class Openings:
    """See above. Safe from any thread."""

    def __init__(
        self,
        hosted: dict[str, Hosted],
        look: Callable[[str, bool], Refused | None],
        open_one: Callable[[str, StreamOptions | None, bool], Hosted | Refused],
        opened: Callable[[Hosted], object],
    ) -> None:
        """`hosted`: the streams that are open; those opened here are added, and `opened` is told of
        each. `look(name, make)`: why a stream cannot be had, as far as that is known without
        opening it. `open_one(name, options, make)` opens it; with `make` it may be a new one, with
        these options."""
        self._hosted = hosted
        self._look = look
        self._open_one = open_one
        self._opened = opened
        self._under_way: dict[str, _BeingOpened] = {}
        self._scheduled: dict[str, None] = {}
        """Streams that wait for a thread to open them, in the order in which they came."""
        self._threads: set[object] = set()
        """That open streams, or do what is `aside`; not those that are in `find`."""
        self._changed = threading.Condition()
        """Its lock is never held while something is read, opened or passed on."""
        self._closing = False

    def when_open(
        self,
        name: str,
        then: Callable[[Hosted], object],
        answer: Callable[[Refused], object],
        options: StreamOptions | None = None,
        *,
        make: bool = False,
        size: int = 0,
        patient: bool = False,
    ) -> None:
        """Call `then` with the stream of that name; or `answer` with why it cannot be had, as with
        other `options` than these. At once if it is open, or else from the thread that opens it.
        `make`: it may be a new one. `size`: bytes of what waits for it with this; while too many
        do, this blocks, if `patient`."""
        pass_on = partial(_pass_on, then, answer, options)
        hosted = self._hosted.get(name)
        if hosted is not None:
            pass_on(hosted)
        elif self._enqueue(name, _Asked(pass_on, options, make, size), patient):
            self._schedule(name)

    def find(self, name: str) -> Hosted | Refused:
        """The stream of that name. It is opened in this thread, if nobody does that yet."""
        found: SimpleQueue[Hosted | Refused] = SimpleQueue()
        own = _Asked(found.put, None, False, 0)
        self._enqueue(name, own, False)
        self._serve(name, own)
        return found.get()

    def aside(self, name: str, work: Callable[[], object]) -> bool:
        """Do it in one of the threads that open streams. False: not now, as all are busy."""
        with self._changed:
            thread = self._one_more()
        return thread is not None and self._launch(name, thread, work)

    def look_after(self, name: str, action: Callable[[Hosted], object]) -> None:
        """Open a stream that is not open, for `action`, and close it."""
        with self._changed:
            if self._closing or name in self._under_way or name in self._hosted:
                return
            opening = self._under_way[name] = _BeingOpened(begun=True)
        try:
            found = self._open_one(name, None, False)
            if isinstance(found, Hosted):
                try:
                    action(found)
                finally:
                    found.close(None)
        finally:
            self._leave(name, opening)

    def go_on(self) -> None:
        """To be called about every second: whoever was to open one may have died of a Ctrl-C."""
        for name, opening in list(self._under_way.items()):
            if not opening.begun:
                self._schedule(name)

    def close(self) -> None:
        """Refuse what waits, and what comes later. Does not block."""
        waiting: list[_Asked] = []
        with self._changed:
            self._closing = True
            for name, opening in list(self._under_way.items()):
                waiting += opening.waiting
                opening.waiting.clear()
                if not opening.begun:
                    if opening.hosted is not None:  # for who closes all
                        self._hosted[name] = opening.hosted
                    del self._under_way[name]
            self._changed.notify_all()
        for asked in waiting:
            _call(asked.then, CLOSED)

    def wait(self, timeout: float | None) -> bool:
        """For what is under way still; whether that has ended in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, timeout)

    # -- What that takes ---------------------------------------------------------------------

    def _enqueue(self, name: str, asked: _Asked, patient: bool) -> bool:
        """Pass it on at once, or have it wait. Whether it is the first that waits: the caller has
        to see that the stream is opened."""
        with self._changed:
            while patient and not self._closing and self._is_full(name):
                self._changed.wait()
            opening = self._under_way.get(name)
            found: Hosted | Refused | None = CLOSED if self._closing else None
            if opening is None and found is None:
                found = self._hosted.get(name) or self._look(name, asked.make)
            if found is None:
                begins = opening is None
                if opening is None:
                    opening = self._under_way[name] = _BeingOpened()
                opening.waiting.append(asked)
                opening.bytes += asked.bytes
                return begins
        asked.then(found)
        return False

    def _schedule(self, name: str) -> None:
        """Have a thread open it, as soon as there may be one more."""
        with self._changed:
            self._scheduled[name] = None
            thread = self._one_more()
        if not (thread is None or self._launch(name, thread)):
            self._serve(name)

    def _one_more(self) -> object | None:
        """A thread that is yet to be started; None if there are as many as may be."""
        if len(self._threads) >= limits.OPENINGS_MAX:
            return None
        thread = object()
        self._threads.add(thread)
        return thread

    def _launch(self, name: str, thread: object, work: Callable[[], object] | None = None) -> bool:
        """Have it do `work`, and then open what is scheduled, until nothing is. False: there are no
        more threads."""
        started = False
        try:
            started = _start(name, partial(self._in_thread, thread, work))
        finally:
            if not started:
                self._ends(thread)
        return started

    def _in_thread(self, thread: object, work: Callable[[], object] | None) -> None:
        try:
            if work is not None:
                work()
            while (name := self._next_scheduled(thread)) is not None:
                self._serve(name)
        finally:
            self._ends(thread)

    def _next_scheduled(self, thread: object) -> str | None:
        """If there is none, it ends: what is scheduled later is for another."""
        with self._changed:
            name = next(iter(self._scheduled), None)
            if name is None:
                self._ends(thread)
            else:
                del self._scheduled[name]
            return name

    def _ends(self, thread: object) -> None:
        with self._changed:
            self._threads.discard(thread)

    def _is_full(self, name: str) -> bool:
        opening = self._under_way.get(name)
        return opening is not None and opening.bytes > limits.WRITER_BYTES_MAX

    def _serve(self, name: str, own: _Asked | None = None) -> None:
        """Open it, unless somebody does, and pass on what waits for it. `own`: asked by whoever
        does this, who waits no more if he is interrupted."""
        with self._changed:
            opening = self._under_way.get(name)
            if opening is None or opening.begun:
                return
            opening.begun = True
        asked: _Asked | None = None
        try:
            while (asked := self._next(name, opening)) is not None:
                found = opening.hosted or self._open(name, asked)
                if isinstance(found, Hosted):
                    opening.hosted = found
                then, asked = asked.then, None
                _call(then, found)
        except BaseException:  # a Ctrl-C: nobody is to wait for ever
            self._leave(name, opening, None if asked is own else asked)
            raise
        if opening.hosted is not None:
            self._opened(opening.hosted)

    def _next(self, name: str, opening: _BeingOpened) -> _Asked | None:
        """Whose turn it is; None if all had theirs, and that was it."""
        with self._changed:
            self._changed.notify_all()
            if opening.waiting:
                asked = opening.waiting.popleft()
                opening.bytes -= asked.bytes
                return asked
            if opening.hosted is not None:
                self._hosted[name] = opening.hosted
            del self._under_way[name]
            return None

    def _open(self, name: str, asked: _Asked) -> Hosted | Refused:
        try:
            return self._open_one(name, asked.options, asked.make)
        except Exception:  # whatever it is: who asked is not to wait for an answer for ever
            logger.exception("stream %r was not opened", name)
            return failed(name)

    def _leave(self, name: str, opening: _BeingOpened, asked: _Asked | None = None) -> None:
        """Have somebody else go on, if there is more to do; whose turn it was comes first."""
        with self._changed:
            opening.begun = False
            if asked is not None:
                opening.waiting.appendleft(asked)
                opening.bytes += asked.bytes
            if not opening.waiting and opening.hosted is None:
                del self._under_way[name]
                self._changed.notify_all()
                return
        self._schedule(name)


def _start(name: str, work: Callable[[], object]) -> bool:
    """False: there are no more threads."""
    try:
        threading.Thread(target=work, name=f"mesh open {name}", daemon=True).start()
    except RuntimeError:
        return False
    return True


def _call(then: Then, found: Hosted | Refused) -> None:
    try:
        then(found)
    except Exception:
        logger.exception("what waited for a stream could not be passed on")


def _pass_on(
    then: Callable[[Hosted], object],
    answer: Callable[[Refused], object],
    options: StreamOptions | None,
    found: Hosted | Refused,
) -> None:
    if isinstance(found, Refused):
        answer(found)
    elif options is not None and options != found.options:
        answer(Refused("differs", _difference(found.name, options, found.options)))
    else:
        then(found)


def _difference(name: str, asked: StreamOptions, has: StreamOptions) -> str:
    pairs: Iterable[str] = (
        f"{field}={getattr(has, field)!r}, not {getattr(asked, field)!r}"
        for field in StreamOptions.__struct_fields__
        if getattr(asked, field) != getattr(has, field)
    )
    return f"stream {name!r} was created with " + "; ".join(pairs)
