"""The members of one partition's groups, as they ask for records: the clerk's side of a consumer.

Guarantee: what a member says is written down before it is confirmed; what it is given is, before it
leaves. A member that leaves, whose node is gone, or that has not asked for long, loses what it
holds to the others, at once. A question asked again, since its answer was lost with a connection,
gets that answer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from mesh import limits
from mesh.durable.batch import Batch
from mesh.durable.deliveries import Delivery, Settlements
from mesh.durable.derivations import source_number
from mesh.durable.group import DeadRecord
from mesh.durable.groups import Groups
from mesh.durable.intervals import Range
from mesh.durable.log import Log
from mesh.durable.outcomes import CLOSED, Appended, Outcome, Refused, refused_for
from mesh.durable.protocol import (
    Answer,
    Delivered,
    Fetch,
    Join,
    Joined,
    Reply,
    Settle,
    Settled,
    room_for_a_batch,
)
from mesh.durable.records import (
    Derived,
    NewRecord,
    batch_of,
    columns_of,
    headers_of,
    raw_payloads_of,
)
from mesh.durable.supply import Letter
from mesh.errors import (
    InvalidName,
    InvalidOption,
    LogDamaged,
    LogFull,
    MeshError,
    OptionsDiffer,
    PayloadTooLarge,
)
from mesh.message import GroupStats
from mesh.sockets.codec import Headers
from mesh.sockets.frame import Malformed

logger = logging.getLogger(__name__)

_SILENT_S: Final = 2 * limits.READ_WAIT_MS_MAX / 1000
"""A member asks again at the latest when its last question was answered with nothing."""
_NOTHING: Final = Delivery((), ())


class _Question(msgspec.Struct, frozen=True):
    number: int
    answer: Answer
    until: float


class _Member:
    """One, and its last questions."""

    def __init__(self) -> None:
        self.waiting: _Question | None = None
        self.answered: tuple[int, Delivered] | None = None
        """Without the batches, which are in the log."""
        self.heard_at = 0.0
        self.heard = 0
        """Number of what it said last."""

    def unseen_since(self, number: int) -> list[Range]:
        """What it was sent later than the answer to its question of that number."""
        if self.answered is None or self.answered[0] <= number:
            return []
        return [(first, end) for first, end, _ in self.answered[1].delivery.grants]


class Members:
    """See above. For the clerk's thread."""

    def __init__(
        self,
        stream: str,
        groups: Groups,
        log: Log,
        bury: Callable[[Batch, Any], object],
        message_bytes_max: int,
    ) -> None:
        """`bury` appends a batch to the stream's dead letters, and calls back with the outcome.
        `message_bytes_max`: of an answer."""
        self._stream = stream
        self._groups = groups
        self._log = log
        self._bury = bury
        self._message_bytes_max = message_bytes_max
        self._members: dict[tuple[str, str], _Member] = {}
        self._under_way: dict[tuple[str, int], DeadRecord] = {}
        """Those of which the letter was sent, by group and offset."""
        self._letter_bytes = 0
        """Of these letters, and of what was sent before groups began again."""
        self._refused = ""
        """Why the last letter that was sent has to wait, and all of them with it."""
        self._tried = ""
        """Whose letter was sent last to see whether they still have to."""

    # -- What they ask -----------------------------------------------------------------------

    def join(self, query: Join, answer: Answer, now: float, now_ns: int) -> None:
        groups, log = self._groups, self._log
        cut_at = None
        try:
            if query.log_epoch not in (0, groups.log_epoch):
                cut_at = log.kept_since(query.log_epoch)
            start = log.start if query.from_ns is None else log.offset_at(query.from_ns)
            groups.open(query.group, query.options, start)
        except (InvalidOption, InvalidName) as error:
            answer(Refused("malformed", str(error)))
            return
        except OptionsDiffer as error:
            answer(Refused("differs", str(error)))
            return
        except LogFull as error:
            answer(Refused("full", str(error)))
            return
        except (LogDamaged, OSError) as error:
            answer(refused_for(error, f"group {query.group!r}: {error}"))
            return
        if query.resume is not None:
            groups.resume(query.group, query.resume)
        bytes_max = min(query.message_bytes_max, self._message_bytes_max)
        if not groups.join(query.group, query.member, query.prefetch, bytes_max):
            text = f"group {query.group!r} has {limits.GROUP_MEMBERS_MAX:,} members, the limit"
            answer(Refused("full", text))
            return
        member = self._members.setdefault((query.group, query.member), _Member())
        member.heard_at, member.heard = now, query.said
        options, committed = groups.options(query.group), groups.committed(query.group)
        answer(Joined(options, committed, groups.log_epoch, cut_at))
        self.serve([query.group], now, now_ns)

    def fetch(self, query: Fetch, answer: Answer, now: float, now_ns: int) -> None:
        member = self._members.get((query.group, query.member))
        if member is None:
            answer(Refused("unknown", f"{query.member} is no member of group {query.group!r} here"))
            return
        member.heard_at = now
        if member.answered is not None and member.answered[0] == query.number:
            answer(self._answered_before(query.group, member.answered[1]))
            return
        member.answered = None
        if member.waiting is not None:
            member.waiting.answer(Delivered(_NOTHING))
        member.waiting = _Question(query.number, answer, now + query.wait_ms / 1000)
        self.serve([query.group], now, now_ns)

    def settle(self, query: Settle, answer: Answer, now: float, now_ns: int) -> None:
        if query.group not in self._groups:
            answer(Refused("unknown", f"there is no group {query.group!r} here"))
            return
        member = self._members.get((query.group, query.member))
        try:
            said = self._still_true(query)
        except (LogDamaged, OSError) as error:
            answer(refused_for(error, f"group {query.group!r}: {error}"))
            return
        if said is not None:
            if member is not None and 0 < query.number <= member.heard:  # it was asked again
                said = Settlements(said.acks)
            self._groups.settle(query.group, query.member, said, now)
            unseen = list(said.unseen)
            if query.leave and member is not None:
                unseen += member.unseen_since(query.fetched)
            if unseen:
                self._groups.recall(query.group, query.member, unseen)
        if member is not None:
            member.heard_at, member.heard = now, max(member.heard, query.number)
        if query.leave:
            self._leave(query.group, query.member)
        self._groups.write()
        answer(Settled(self._groups.committed(query.group)))
        self.serve([query.group], now, now_ns)

    def _still_true(self, query: Settle) -> Settlements | None:
        """What of it is said of records that are there still, where the member has not heard yet
        that the log was opened again. None: that is not looked up. Raises `LogDamaged`, `OSError`.
        """
        if query.log_epoch == self._groups.log_epoch:
            return query.said
        if not self._log.keeps_all:
            return None
        return query.said.below(self._log.kept_since(query.log_epoch))

    # -- What happens ------------------------------------------------------------------------

    def rewind(self) -> None:
        """See `Groups.rewind`. To be called before anything that they ask. Raises `LogDamaged`,
        `OSError`, if the log does not read."""
        if self._groups.rewind():
            self.dismiss()
            self._members.clear()
            self._under_way.clear()

    def serve(self, groups: Iterable[str], now: float, now_ns: int) -> None:
        """Give their members what there is for them."""
        self.rewind()
        asking: dict[str, list[str]] = {group: [] for group in groups}
        for (group, name), member in self._members.items():
            if member.waiting is not None and group in asking:
                asking[group].append(name)
        answers: list[tuple[Answer, Reply]] = []
        for group, names in asking.items():
            for name, outcome in self._groups.deliver(group, names, now, now_ns).items():
                answers.append(self._answered(group, name, outcome))
        self._groups.write()
        for answer, reply in answers:
            answer(reply)
        self._send_letters()

    def serve_all(self, now: float, now_ns: int) -> None:
        """The log has more, or something is due; and those who have waited long enough are told
        that there is nothing. Raises `LogDamaged`, `OSError`."""
        self.serve({group for group, _ in self._members}, now, now_ns)
        for member in self._members.values():
            if member.waiting is not None and member.waiting.until <= now:
                waiting, member.waiting = member.waiting, None
                waiting.answer(Delivered(_NOTHING))

    def next_at(self) -> float | None:
        """When to `serve_all`, if nothing happens before."""
        times = [each.waiting.until for each in self._members.values() if each.waiting is not None]
        due = self._groups.next_at()
        if due is not None and self._members:
            times.append(due)
        return min(times, default=None)

    def gone(self, node: str, now: float, now_ns: int) -> None:
        """That node is gone, and with it its members. Raises `LogDamaged`, `OSError`."""
        self._remove([key for key in self._members if key[1].startswith(node)], now, now_ns)

    def tick(self, now: float, now_ns: int) -> None:
        """About every second. Raises `LogDamaged`, `OSError`."""
        self._groups.sync()
        self.rewind()
        silent = [key for key, m in self._members.items() if now - m.heard_at > _SILENT_S]
        self._remove(silent, now, now_ns)
        if self._refused:
            self._try_letter()
        else:
            self._send_letters()

    def stats(self) -> dict[str, GroupStats]:
        return self._groups.stats()

    @property
    def unread(self) -> dict[str, str]:
        return self._groups.unread

    def acked_to(self) -> int | None:
        """See `Groups.acked_to`."""
        return self._groups.acked_to()

    def trimmed(self, now: float, now_ns: int) -> None:
        """The log has given up records. Raises `LogDamaged`, `OSError`."""
        self._groups.trimmed()
        self.serve_all(now, now_ns)

    def dismiss(self, why: Refused = CLOSED) -> None:
        """Nobody is to wait any more."""
        for member in self._members.values():
            if member.waiting is not None:
                waiting, member.waiting = member.waiting, None
                waiting.answer(why)

    def close(self) -> None:
        self.dismiss()
        self._groups.close()

    # -- What that takes ---------------------------------------------------------------------

    def _answered(
        self, group: str, name: str, outcome: Delivery | MeshError
    ) -> tuple[Answer, Reply]:
        """What that member is to be told, who asked."""
        member = self._members[group, name]
        waiting, member.waiting = member.waiting, None
        assert waiting is not None
        if isinstance(outcome, MeshError):
            text = f"group {group!r} of stream {self._stream!r}: {outcome}"
            over = isinstance(outcome, PayloadTooLarge)
            return waiting.answer, Refused("over" if over else "damaged", text)
        gaps = tuple(self._groups.gaps(group, name))
        member.answered = (
            waiting.number,
            Delivered(Delivery(outcome.grants, ()), gaps, member.heard),
        )
        return waiting.answer, Delivered(outcome, gaps, member.heard)

    def _answered_before(self, group: str, reply: Delivered) -> Reply:
        """Once more, as far as the log has it still."""
        try:
            delivery = self._groups.again(group, reply.delivery.grants)
        except (LogDamaged, OSError) as error:
            return refused_for(error, f"group {group!r} of stream {self._stream!r}: {error}")
        return Delivered(delivery, reply.gaps, reply.heard)

    def _remove(self, keys: list[tuple[str, str]], now: float, now_ns: int) -> None:
        for group, name in keys:
            self._leave(group, name)
        if keys:
            self.serve({group for group, _ in keys}, now, now_ns)

    def _leave(self, group: str, name: str) -> None:
        member = self._members.pop((group, name), None)
        if member is not None and member.waiting is not None:
            member.waiting.answer(Refused("unknown", "this member has left"))
        self._groups.leave(group, name)

    # -- Dead letters ------------------------------------------------------------------------

    def _send_letters(self) -> None:
        """As many as may be under way. Others are with their groups, which know them by offset, and
        are read again when it is their turn."""
        if self._refused or not self._groups.is_current:
            return
        passed_over = 0
        for group in self._groups.with_letters():
            while self._letter_bytes + passed_over < limits.LETTERS_BYTES_MAX:
                letter = self._groups.letter(group)
                if letter is None:
                    break
                if not self._send(letter):
                    passed_over += letter.found.header.size

    def _try_letter(self) -> None:
        """All of them have to wait: see whether one of the next group does."""
        groups = self._groups.with_letters()
        if groups and not self._under_way:
            self._tried = next((group for group in groups if group > self._tried), groups[0])
            passed_over = 0
            while passed_over < limits.LETTERS_BYTES_MAX:
                letter = self._groups.letter(self._tried)
                if letter is None or self._send(letter, then_all=True):
                    break
                passed_over += letter.found.header.size

    def _send(self, letter: Letter, *, then_all: bool = False) -> bool:
        """Whether there is one."""
        group, dead = letter.group, letter.dead
        key = group, dead.offset
        try:
            room = room_for_a_batch(self._message_bytes_max)
            batch = dead_letter(self._stream, self._log.partition, letter, room)
        except Malformed:
            logger.error("a dead letter of %r is malformed, and is given up", self._stream)
            self._groups.buried(*key)
            return False
        except PayloadTooLarge as error:  # no reader of the dead letters could get past it
            logger.error("group %r of stream %r: %s", group, self._stream, error)
            self._groups.count_too_large(group)
            return False
        size = batch.header.size
        self._letter_bytes += size
        self._under_way[key] = dead

        def done(outcome: Outcome) -> None:  # which is not to hold on to the letter
            self._letter_bytes -= size
            known = self._under_way.get(key) is dead  # or its group has begun again
            if known:
                del self._under_way[key]
            if isinstance(outcome, Appended):
                if known:
                    self._groups.buried(*key)
                    self._groups.write()
                if then_all:
                    self._refused = ""
            else:
                assert isinstance(outcome, Refused)
                if outcome.code != self._refused:
                    text = "dead letters of %r have to wait: %s"
                    logger.warning(text, self._stream, outcome.text)
                    self._refused = outcome.code
                if known:  # others first, the next time: it may be this one only
                    self._groups.keep_dead(group, dead)
            self._send_letters()

        self._bury(batch, done)
        return True


def dead_letter(stream: str, partition: int, letter: Letter, bytes_max: int) -> Batch:
    """The record as it is appended to the dead letters: with its payload, key and headers, and
    where it came from. Headers that nobody can read are left out; and where all that would be more
    than `bytes_max`, which no reader might let in, its own headers, then the reason, then names.
    Raises `Malformed`; `PayloadTooLarge` where it is more all the same: when the record was
    appended, the sidecar let in more."""
    header, body = letter.found.header, letter.found.body
    index = letter.dead.offset - header.offset
    columns = columns_of(header, body)
    origin = {
        "mesh-stream": stream,
        "mesh-partition": f"{partition:016x}",
        "mesh-offset": letter.dead.offset,
        "mesh-group": letter.group,
        "mesh-deliveries": letter.dead.deliveries,
        "mesh-reason": letter.dead.reason,
    }
    own: Headers = {}
    with contextlib.suppress(Malformed):
        own = headers_of(None if columns.headers is None else columns.headers[index])
    headers = {key: value for key, value in own.items() if key not in origin} | origin
    payload = raw_payloads_of(header, body)[index]
    key = None if columns.keys is None else columns.keys[index]
    source = source_number(stream, partition, header.log_epoch, letter.group)
    derived = Derived(source, letter.dead.offset, 0)
    short = origin | {"mesh-reason": ""}
    nameless = short | {"mesh-stream": "", "mesh-group": ""}
    for fewer in (headers, origin, short, nameless):
        flat = [item for pair in fewer.items() for item in pair]
        batch = batch_of([NewRecord(payload, key, flat, derived=derived)])
        if batch.header.size <= bytes_max:
            return batch
    text = f"dead letter {letter.dead.offset} has {batch.header.size:,} bytes over the limit"
    raise PayloadTooLarge(f"{text} of {bytes_max:,} (what the sidecar's message_bytes_max leaves)")
