"""A sidecar: the streams in one directory, and whoever asks for them. The same embedded and by
itself.

What the directory has is in `mesh.durable.folders`.

Guarantee: every request is answered once, by a receipt or by a refusal that says why; a stream
that is damaged refuses, and the others go on. One process has the directory at a time, by its lock.

A stream is opened when somebody asks for it (`mesh.durable.openings`), and has a thread that writes
(`mesh.durable.writer`), from its first append on, or the first that retention takes. One more, the
*clerk*, reads for those who ask, keeps those waiting who want what comes next, and sees what
retention lets go. It also looks after the streams that nobody has asked for: one in a second, all
of them anew after an hour.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final
from urllib.parse import unquote

from mesh import limits
from mesh.durable.batch import Batch
from mesh.durable.clerk import Clerk
from mesh.durable.folders import (
    DEAD,
    STREAMS,
    check_new_name,
    folder_name,
    identity,
    read_options,
    write_options,
)
from mesh.durable.hosted import Hosted
from mesh.durable.log import SEGMENT_BYTES
from mesh.durable.openings import Openings
from mesh.durable.outcomes import CLOSED, Refused, failed, refused_for
from mesh.durable.partition import Opening, Partition
from mesh.durable.protocol import (
    Answer,
    Append,
    Fetch,
    Find,
    Inspect,
    Join,
    Open,
    Query,
    Read,
    Reply,
    Settle,
    decode_query,
    encode_message,
    unpack_batch,
)
from mesh.durable.recovery import STATE
from mesh.durable.rounds import Rounds
from mesh.durable.segment import bases
from mesh.durable.storage import Storage, is_disk_full
from mesh.errors import InvalidName, LogDamaged, LogFormat, MeshError
from mesh.options import StreamOptions
from mesh.sockets.frame import Malformed

logger = logging.getLogger(__name__)

_NODE_ID_CHARACTERS: Final = 16
"""A member's name begins with the id of its node."""
_TICK_S: Final = 1.0
_ROUND_S: Final = 3600.0
_ForClerk = Find | Read | Inspect | Join | Fetch | Settle


class Sidecar:
    """See above. Safe from any thread."""

    def __init__(
        self,
        storage: Storage,
        *,
        hosts: Callable[[str], object] = lambda stream: None,
        is_present: Callable[[str], bool] = lambda node: True,
        segment_bytes: int = SEGMENT_BYTES,
        message_bytes_max: int = limits.MESSAGE_BYTES_MAX,
    ) -> None:
        """Open what is in `storage`, or begin there. `hosts` is called with the name of a stream
        that is new here; `is_present` says whether a node is there still; `message_bytes_max` is
        that of an answer. `number` is that of the partition, whose name is the same in hexadecimal.
        Raises `LogLocked`, `LogDamaged`, `OSError`."""
        self._storage = storage
        storage.lock()
        try:
            self.number = identity(storage)
            self._streams = storage.folder(STREAMS)
            self._names = {unquote(name) for name in self._streams.names()}
        except BaseException:
            storage.close()
            raise
        self._hosts = hosts
        self._is_present = is_present
        self._message_bytes_max = message_bytes_max
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._hosted: dict[str, Hosted] = {}
        self._making: set[str] = set()
        """Streams that are new, from when somebody asks for them until they are there."""
        self._openings = self._no_openings()
        self._closing = False
        self._malformed = 0
        self._dismissed = False
        """The clerk's: whether nobody is to wait any more."""
        self._clerk = Clerk(f"{self.number:016x}")
        self._rounds = Rounds(_ROUND_S)
        self._looked_after: set[str] = set()
        """Right now, though nobody asked for them."""
        self._clerk.every(_TICK_S, self._tick)

    def abandon(self) -> None:
        """In a forked child: the files are the parent's, and nothing is to be written there."""
        self._lock = threading.Lock()
        self._openings = self._no_openings()
        self._openings.close()
        self._closing = True
        for hosted in self._hosted.values():
            hosted.abandon()

    @property
    def streams(self) -> frozenset[str]:
        """Names of those that are here."""
        return frozenset(list(self._names))

    # -- Whoever asks ------------------------------------------------------------------------

    def handle(
        self, data: bytes | memoryview, answer: Callable[[bytes], object], lone: bool
    ) -> Callable[[], None] | None:
        """A request as it came over a socket. Answered at once, or later in another thread; or when
        what is returned is called, if it is a `lone` one: see `Writer.submit`."""

        def reply(message: Reply) -> None:
            answer(encode_message(message))

        try:
            query = decode_query(data)
            if isinstance(query, Append):
                return self.append(query.stream, unpack_batch(query.batch), reply, lone=lone)
            self.ask(query, reply)
        except Malformed:
            with self._lock:
                self._malformed += 1
            reply(Refused("malformed", "the request is malformed"))
        return None

    def append(
        self,
        stream: str,
        batch: Batch,
        answer: Answer,
        *,
        patient: bool = True,
        lone: bool = False,
    ) -> Callable[[], None] | None:
        """Have it written, or be given what does so: see `Writer.submit`."""
        hosted = self._hosted.get(stream)
        if hosted is not None:
            return hosted.submit(batch, answer, patient=patient, lone=lone)
        self._openings.when_open(
            stream,
            lambda hosted: hosted.submit(batch, answer, patient=patient),
            answer,
            size=batch.header.size,
            patient=patient,
        )
        return None

    def ask(self, query: Query, answer: Answer, *, patient: bool = True) -> None:
        """Anything but an append."""
        match query:
            case Open(stream, producer, options):

                def submit(hosted: Hosted) -> None:
                    hosted.submit(Opening(producer), answer, patient=patient)

                self._openings.when_open(stream, submit, answer, options, make=True)
            case Append():
                answer(Refused("malformed", "an append is not to be asked for so"))
            case _:

                def hand_over(hosted: Hosted) -> None:
                    ask = partial(self._ask_clerk, hosted, query, answer)
                    self._clerk.run(ask, partial(answer, CLOSED))

                self._openings.when_open(query.stream, hand_over, answer)

    def _ask_clerk(self, hosted: Hosted, query: _ForClerk, answer: Answer) -> None:
        answered = False

        def once(reply: Reply) -> None:
            nonlocal answered
            if not answered:
                answered = True
                answer(reply)

        try:
            self._answer(hosted, query, once)
        except Exception:  # whatever it is: who asked is not to wait for an answer for ever
            logger.exception("stream %r: a question was not answered", query.stream)
            once(failed(query.stream))

    def _answer(self, hosted: Hosted, query: _ForClerk, answer: Answer) -> None:
        match query:
            case Find():
                hosted.find(query, answer)
            case Read():
                hosted.read(query, answer)
            case Inspect():
                hosted.inspect(answer)
            case Join() | Fetch() if not self._is_present(query.member[:_NODE_ID_CHARACTERS]):
                # What a node asked just before it died, is not to make it a member for good.
                answer(Refused("unknown", f"the node of {query.member} is not there"))
            case _:
                hosted.member_asks(query, answer)

    def hosted(self, stream: str) -> Hosted | None:
        """For whoever reads its log in this process; None if it is not here, or damaged."""
        found = self._hosted.get(stream) or self._openings.find(stream)
        return None if isinstance(found, Refused) else found

    def dropped(self) -> Counter[str]:
        """What was refused or lost here, by reason, of the streams that are open; and what was
        malformed."""
        dropped = Counter({"malformed": self._malformed})
        for hosted in list(self._hosted.values()):
            dropped += hosted.dropped()
        return dropped

    def node_gone(self, node: str) -> None:
        """A node that consumed here, perhaps, is gone. Does not block."""
        self._clerk.run(lambda: self._each(lambda hosted: hosted.node_gone(node)))

    def dismiss(self) -> None:
        """Nobody is to wait for records any more: answer all that do. Does not block."""

        def dismiss() -> None:
            self._dismissed = True
            self._each(Hosted.dismiss)

        self._clerk.run(dismiss)

    def close(self, timeout: float = 5.0) -> None:
        """Write what was submitted, and close all logs. What comes later is refused. The directory
        is given up when all are closed, which may be after this has returned."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        deadline = time.monotonic() + timeout
        self._openings.close()
        self.dismiss()
        for hosted in list(self._hosted.values()):
            hosted.begin_to_close()
        if not (self._clerk.close() and self._close_logs(deadline)):
            logger.error("a log was not closed within %g s: its disk does not answer", timeout)
            with contextlib.suppress(RuntimeError):  # the process ends, and the lock with it
                threading.Thread(target=self._close_late, name="mesh close", daemon=True).start()

    def _close_logs(self, deadline: float | None) -> bool:
        """Whether all were closed by then."""
        closed = [self._openings.wait(_left(deadline))]
        closed += [each.close(_left(deadline)) for each in list(self._hosted.values())]
        if all(closed):
            self._storage.close()
        return all(closed)

    def _close_late(self) -> None:
        """However long it takes."""
        self._clerk.close(None)
        self._close_logs(None)

    def _each(self, action: Callable[[Hosted], object]) -> None:
        """Of the clerk: what goes wrong with one of them is no other's matter."""
        for hosted in list(self._hosted.values()):
            self._clerk.run(partial(action, hosted))

    def _tick(self) -> None:
        self._openings.go_on()
        self._each(Hosted.tick)
        name = self._rounds.next(self._names, time.monotonic())
        if name is None or name in self._hosted or name in self._looked_after:
            return
        self._looked_after.add(name)
        if not self._openings.aside(name, partial(self._look_after, name)):
            self._looked_after.discard(name)
            self._rounds.put_back(name)

    def _look_after(self, name: str) -> None:
        """Of a stream that nobody has asked for: give up what retention lets go. Whoever asks for
        it meanwhile, waits."""
        try:
            if self._may_go(name):
                self._openings.look_after(name, Hosted.tick)
        except Exception:
            logger.exception("stream %r was not looked after", name)
        finally:
            self._looked_after.discard(name)

    def _may_go(self, name: str) -> bool:
        """Whether something of it may be due: looked at without reading its log."""
        try:
            folder = self._streams.folder(folder_name(name))
            options = read_options(folder, name)
            return options.gives_up and len(bases(folder.names())) > 1
        except (MeshError, OSError):
            return False  # whoever opens it is told

    # -- Streams -----------------------------------------------------------------------------

    def _no_openings(self) -> Openings:
        return Openings(self._hosted, self._look, self._open, self._opened)

    def _look(self, name: str, make: bool) -> Refused | None:
        if name in self._names:
            return None
        if not make:
            return Refused("missing", f"there is no stream {name!r} here")
        try:
            check_new_name(name)
        except InvalidName as error:
            return Refused("malformed", str(error))
        with self._lock:
            if name not in self._making:
                if len(self._names) + len(self._making) >= limits.STREAMS_MAX:
                    return Refused("full", f"there are {limits.STREAMS_MAX:,} streams here")
                self._making.add(name)
        return None

    def _opened(self, hosted: Hosted) -> None:
        """It is there for all by now, but who dismisses or closes all may have been too early."""
        if self._dismissed:
            self._clerk.run(hosted.dismiss)
        if self._closing:
            hosted.begin_to_close()

    def _open(self, name: str, options: StreamOptions | None, make: bool) -> Hosted | Refused:
        if self._closing:
            return CLOSED
        if (refused := self._look(name, make)) is not None:
            return refused
        new = name not in self._names
        try:
            folder = self._streams.folder(folder_name(name))
            names = folder.names()
            if not bases(names) and STATE not in names:  # it is new, or was as the machine failed
                if not make:  # or it would get other options than whoever makes it asks for
                    return Refused("missing", f"there is no stream {name!r} here yet")
                options = options or StreamOptions()
                write_options(folder, options)
            else:
                options = read_options(folder, name)
            partition = Partition(
                folder,
                self.number,
                options,
                now_ns=time.time_ns(),
                segment_bytes=self._segment_bytes,
            )
            hosted = Hosted(
                name, options, partition, self._clerk, self._bury, self._message_bytes_max
            )
        except InvalidName as error:
            return Refused("malformed", str(error))
        except (LogDamaged, LogFormat) as error:
            logger.error("stream %r: %s", name, error)
            return refused_for(error, f"stream {name!r}: {error}")
        except (MeshError, OSError) as error:
            text = f"stream {name!r} cannot be opened: {error}"
            if make and is_disk_full(error):  # who appends may wait for room
                return Refused("full", text)
            logger.error("%s", text)
            return refused_for(error, text)
        else:
            with self._lock:
                self._names.add(name)
        finally:
            with self._lock:
                self._making.discard(name)
        if new:
            self._hosts(name)
        return hosted

    def _bury(self, stream: str, batch: Batch, answer: Answer) -> None:
        """A dead letter of that stream. The clerk's."""
        self._openings.when_open(
            f"{stream}{DEAD}",
            lambda hosted: hosted.submit(batch, answer, patient=False),
            answer,
            make=True,
        )


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
