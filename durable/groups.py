"""The groups of one partition: what joins their logic (`mesh.durable.group`), what they get of the
log (`mesh.durable.supply`), and the files that remember them. For one thread, the clerk's; `now` is
given.

    groups/NAME   the journal of a group (`mesh.durable.journal`)

Guarantee: nothing is settled that nobody settled; what was settled is, after the process has ended,
if that was written, and after the machine has, if it was synced. A group is told of a record again
whenever neither is so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from copy import copy
from typing import Final
from urllib.parse import quote, unquote

from mesh import limits
from mesh.durable.complaint import Complaint
from mesh.durable.deliveries import AskedOptions, Delivery, Settlements
from mesh.durable.group import DeadRecord, Group, GroupOptions
from mesh.durable.intervals import Intervals, Range
from mesh.durable.journal import Beginning, Journal
from mesh.durable.log import Log
from mesh.durable.storage import Storage, is_disk_full
from mesh.durable.supply import Letter, Supply
from mesh.errors import InvalidName, LogDamaged, LogFull, MeshError, OptionsDiffer
from mesh.message import GroupStats

logger = logging.getLogger(__name__)

_FILE_NAME_BYTES_MAX: Final = 250
"""Of a journal: Linux has 255, and what takes its place is written under a longer name."""


class _OpenGroup:
    """A group, what it gets, and where it is remembered."""

    def __init__(self, name: str, group: Group, start: int, journal: Journal, log: Log) -> None:
        self.group = group
        self.supply = Supply(name, group, log)
        self.journal = journal
        self.name = name
        self.start = start
        self.safe = 0
        """Where it was committed when its journal was synced last."""
        self._not_written = Complaint(logger, logging.ERROR)
        self._has_room = True

    def begin(self, log_epoch: int) -> None:
        """Write its journal anew, as one of the log with that epoch. Raises `OSError`."""
        beginning = Beginning(self.name, self.group.options, self.start, log_epoch)
        self.journal.begin(beginning, self.group.snapshot())
        self.safe = self.group.committed
        self._has_room = True
        self._not_written.ended()

    def try_to_begin(self, log_epoch: int) -> None:
        """Or go on in memory, until it can be written again."""
        try:
            self.begin(log_epoch)
        except OSError as error:
            self.group.counters["journal failed"] += 1
            self._has_room = not is_disk_full(error)
            text = "group %r: what it acknowledges may come again after a crash: %s"
            self._not_written.say(text, self.name, error)

    @property
    def done_with(self) -> int:
        """What is below that may go. That it is settled is on disk; or there is no room for that,
        and what goes makes some."""
        return self.safe if self._has_room else self.group.committed


class Groups:
    """See above."""

    def __init__(self, storage: Storage, log: Log, *, trims_unsettled: bool = True) -> None:
        """Open those that are in that folder. `trims_unsettled`: retention may take from the log
        what a group has not settled. Raises `LogDamaged` if it is the log that does not read,
        `OSError`."""
        self._storage = storage
        self._log = log
        self._groups: dict[str, _OpenGroup] = {}
        self._unread: dict[str, tuple[Journal, LogDamaged | OSError]] = {}
        """Groups whose journals do not read, and why."""
        self._trims_unsettled = trims_unsettled
        self.log_epoch = log.log_epoch
        """Of the log, as far as what is known here is of that log still."""
        try:
            for file_name in storage.names():
                self._restore(unquote(file_name), Journal(storage, file_name, log.partition))
        except BaseException:
            self._close()
            raise

    def _restore(self, name: str, journal: Journal) -> None:
        try:
            beginning, progress = journal.read()
        except FileNotFoundError:  # somebody has removed it since
            self._unread.pop(name, None)
            return
        except (LogDamaged, OSError) as error:
            if name not in self._unread:
                logger.error("group %r: %s", name, error)
            self._unread[name] = journal, error
            return
        kept = self._kept_since(beginning.log_epoch)
        group = Group.restore(beginning.options, progress, kept)
        if not self._trims_unsettled:
            group.resume(self._log.start)  # its journal may have had no room for that
        if journal.left_out_bytes:
            group.counters["journal bytes left out"] = journal.left_out_bytes
        opened = self._groups[name] = _OpenGroup(name, group, beginning.start, journal, self._log)
        self._unread.pop(name, None)
        opened.try_to_begin(self.log_epoch)

    def _read_again(self) -> None:
        """The journals that could not be read, and are not damaged. Raises as `Groups` does."""
        for name, (journal, error) in list(self._unread.items()):
            if isinstance(error, OSError):
                self._restore(name, journal)

    def _kept_since(self, log_epoch: int) -> int:
        """What is settled from there on, by somebody who knew the log as it was then, is lost, and
        other records may have those offsets. Raises `LogDamaged`, `OSError`."""
        log = self._log
        return log.end if log.keeps_all else log.kept_since(log_epoch)

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    @property
    def unread(self) -> dict[str, str]:
        """Those whose journals do not read, and why."""
        return {name: str(error) for name, (_, error) in self._unread.items()}

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def is_current(self) -> bool:
        """Whether the log has still all that these groups were told of: else they have to
        `rewind`."""
        return self._log.keeps_all or self.log_epoch == self._log.log_epoch

    def rewind(self) -> bool:
        """The log may have lost what it had not promised to keep, and other records may have those
        offsets now: begin again with all groups. Whether it has; then nobody is a member any more.
        Raises `LogDamaged`, `OSError`, if the log does not read."""
        if self.is_current:
            return False
        log = self._log
        log_epoch = log.log_epoch
        kept = self._kept_since(self.log_epoch)
        for name, opened in list(self._groups.items()):
            group = Group.restore(opened.group.options, [opened.group.snapshot()], kept)
            group.counters.update(opened.group.counters)
            opened.supply.close()
            self._groups[name] = _OpenGroup(name, group, opened.start, opened.journal, log)
            self._groups[name].try_to_begin(log_epoch)
        self.log_epoch = log_epoch
        return True

    # -- Groups and members ------------------------------------------------------------------

    def open(self, name: str, options: AskedOptions, start: int) -> None:
        """Make the group, if there is none: it begins at the offset `start`, which is there or was.
        Raises `OptionsDiffer` if there is one with others, `LogDamaged` if its journal does not say
        with which, `LogFull` if there are too many, `InvalidName`, `InvalidOption`, `OSError`."""
        if name in self._unread:  # somebody may have brought it back
            self._restore(name, self._unread[name][0])
        if name in self._unread:
            raise copy(self._unread[name][1])  # or it holds on to all that it was raised through
        opened = self._groups.get(name)
        if opened is not None:
            if differs := options.differ_from(opened.group.options):
                raise OptionsDiffer(f"group {name!r} was created with {differs}")
            return
        if len(self._groups) + len(self._unread) >= limits.GROUPS_MAX:
            raise LogFull(f"there are {limits.GROUPS_MAX:,} groups already")
        journal = Journal(self._storage, file_name_of(name), self._log.partition)
        opened = _OpenGroup(name, Group(options.all(), start), start, journal, self._log)
        opened.begin(self.log_epoch)
        self._groups[name] = opened

    def committed(self, name: str) -> int:
        """All records of that group below that are settled."""
        return self._groups[name].group.committed

    def options(self, name: str) -> GroupOptions:
        return self._groups[name].group.options

    def join(
        self,
        name: str,
        member: str,
        prefetch: int,
        message_bytes_max: int = limits.MESSAGE_BYTES_MAX,
    ) -> bool:
        """A member comes, or changes how many records it may hold, and how large a message it lets
        in. False if there are too many."""
        return self._groups[name].supply.join(member, prefetch, message_bytes_max)

    def has(self, name: str, member: str) -> bool:
        opened = self._groups.get(name)
        return opened is not None and member in opened.supply.prefetch

    def leave(self, name: str, member: str) -> None:
        """What it holds goes to others."""
        if name in self._groups:
            self._groups[name].supply.leave(member)

    def remove(self, name: str) -> None:
        """The group is gone, with all that it knew, even if its journal is damaged. Raises
        `OSError`; then it is there still."""
        opened = self._groups.get(name)
        if opened is not None:
            opened.journal.remove()
            opened.supply.close()
            del self._groups[name]
        elif name in self._unread:
            self._unread[name][0].remove()
            del self._unread[name]

    def resume(self, name: str, offset: int) -> None:
        """All below `offset` is done with, as far as there is a log."""
        self._groups[name].supply.resume(offset)

    def settle(self, name: str, member: str, said: Settlements, now: float) -> None:
        """Whether or not it is a member still: what was done, is done."""
        opened = self._groups[name]
        group = opened.group
        for first, end in Intervals(said.acks):  # none of them twice
            group.ack(member, first, end)
        for offset, reason in said.rejects:
            group.reject(member, offset, reason)
        for offset, delay_s in said.naks:
            group.nak(member, offset, now, delay_s)
        for offset in said.extends:
            group.extend(member, offset, now)

    def recall(self, name: str, member: str, ranges: Iterable[Range]) -> None:
        """See `Group.recall`."""
        self._groups[name].group.recall(member, ranges)

    # -- Delivery ----------------------------------------------------------------------------

    def next_at(self) -> float | None:
        """When something is due, if nothing happens before."""
        all_of_them = (opened.supply.next_at() for opened in self._groups.values())
        return min((at for at in all_of_them if at is not None), default=None)

    def deliver(
        self, name: str, asking: Iterable[str], now: float, now_ns: int
    ) -> dict[str, Delivery | MeshError]:
        """Share out what there is among those members of that group that ask for records: what each
        of them gets, or why it gets nothing any more; who is not in it gets nothing now. To be
        called whenever the log has more, something is due or settled, or somebody asks."""
        return self._groups[name].supply.deliver(asking, now, now_ns)

    def again(self, name: str, grants: Iterable[tuple[int, int, int]]) -> Delivery:
        """What was delivered with those grants, as far as the log has it still. Raises
        `LogDamaged`, `OSError`."""
        return self._groups[name].supply.again(grants)

    def gaps(self, name: str, member: str) -> list[tuple[int, int, int]]:
        """What retention took from the group since that member was told last: first, last, and how
        many."""
        return self._groups[name].supply.gaps(member)

    def with_letters(self) -> list[str]:
        """The groups that have a `letter`, in order of their names."""
        return sorted(name for name, opened in self._groups.items() if opened.group.has_newly_dead)

    def letter(self, name: str) -> Letter | None:
        """The next dead record of that group, as it is read now: to be appended to the dead
        letters, and then `buried`, or `keep_dead` until it can be. None if there is none more that
        can be read now."""
        return self._groups[name].supply.letter()

    def keep_dead(self, name: str, dead: DeadRecord) -> None:
        """That dead letter has to wait: it is one of the next again."""
        if name in self._groups:
            self._groups[name].group.keep_dead(dead)

    def buried(self, name: str, offset: int) -> None:
        """That dead letter is safe."""
        if name in self._groups:
            self._groups[name].group.buried(offset)

    def count_too_large(self, name: str) -> None:
        """One of that group's dead records has no room in a letter: it stays unsettled, and dead,
        and is tried again when this group's journal is read again."""
        self._groups[name].group.counters["dead and too large"] += 1

    # -- The log -----------------------------------------------------------------------------

    def trimmed(self) -> None:
        """The log has given up records."""
        for opened in self._groups.values():
            opened.supply.trimmed()

    def acked_to(self) -> int | None:
        """All groups have settled everything below that, and where there is room for it, it is on
        disk that they have; None if there is no group, or one that does not say."""
        self._read_again()
        if not self._groups or self._unread:
            return None
        self.sync()
        return min(opened.done_with for opened in self._groups.values())

    # -- What is remembered ------------------------------------------------------------------

    def write(self) -> None:
        """Write down what has changed, so that it survives this process."""
        for opened in self._groups.values():
            changes = opened.group.changes()
            if changes is not None and not opened.journal.append(changes):
                opened.try_to_begin(self.log_epoch)

    def sync(self) -> None:
        """Have on disk what was written, and what has changed."""
        self.write()
        for opened in self._groups.values():
            if opened.journal.sync():
                opened.safe = opened.group.committed
            else:
                opened.try_to_begin(self.log_epoch)

    def stats(self) -> dict[str, GroupStats]:
        return {
            name: GroupStats(
                opened.group.committed,
                opened.group.end,
                self._log.tip.offset - opened.group.committed,
                opened.group.in_flight,
                len(opened.supply.prefetch),
                dict(opened.group.counters),
            )
            for name, opened in self._groups.items()
        }

    def close(self) -> None:
        self.sync()
        for opened in self._groups.values():
            if opened.group.overstated:
                opened.try_to_begin(self.log_epoch)
        self._close()

    def _close(self) -> None:
        for opened in self._groups.values():
            opened.supply.close()
            opened.journal.close()


def file_name_of(group: str) -> str:
    """Of its journal. Raises `InvalidName`."""
    name = quote(group, safe="").replace(".", "%2E")
    if len(name) > _FILE_NAME_BYTES_MAX:
        text = f"{len(name):,} bytes as a file, over the limit of {_FILE_NAME_BYTES_MAX:,}"
        raise InvalidName(f"group {group!r} has a name of {text}")
    return name
