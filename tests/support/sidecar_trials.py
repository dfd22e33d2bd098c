"""What a sidecar is put through: programs that append under a name or with dedup ids, and send
again whatever they have no receipt for; groups whose members acknowledge, hand back and reject;
retention that takes what is acknowledged. All in one thread, and all accounted for
(`tests.support.account`).

A sidecar that does it wrong has to be found out here: `tests.support.planted` has such ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mesh.durable.storage import Storage
from tests.support.account import Account, Telling
from tests.support.integrity import sound_sidecar
from tests.support.one_thread import in_one_thread
from tests.support.sidecar_client import GROUPS, Client


@contextlib.contextmanager
def opened(storage: Storage, tell: Telling) -> Iterator[Client]:
    """Closed at the end, whatever happens."""
    with in_one_thread(tell.account.now_s + 5.0) as turns:
        programs = Client(tell, turns, storage)
        try:
            yield programs
        finally:
            programs.sidecar.close()
        tell("closes")


def work(storage: Storage, tell: Telling) -> None:
    """All that a sidecar does, a few times each, and once more after a restart."""
    for _ in range(2):
        with opened(storage, tell) as programs:
            some_work(programs)


def some_work(programs: Client) -> None:
    programs.appends_again()
    programs.begins("begins anew")
    programs.an_earlier_run_is_fenced("begins anew")
    for group in GROUPS:
        programs.acks_late(group)
        programs.joins(group)
    for turn in range(3):
        programs.appends(goes_on=2, begins_anew=1, unique=1)
        programs.appends(unique=1)
        for group in GROUPS:
            got = programs.fetches(group)
            programs.settles(group, naks=got[1:2], rejects=got[3:4] if turn == 1 else [])
            programs.waits(1.0)
            programs.fetches(group)
            programs.settles(group, acks=None if turn else [])
        programs.appends(goes_on=1)
        programs.ticks()
    programs.appends_again()


def holds_and_goes_on(storage: Storage, account: Account) -> None:
    """Whatever that has left is what it has to be; what was not settled is delivered, and may go
    then; what was appended is known still; and so once more with what is appended now."""
    tell = Telling(account)
    for _ in range(2):
        with opened(storage, tell) as programs:
            drain(programs)
        with opened(storage, tell) as programs:
            programs.appends_again()
            programs.begins("begins anew")
            programs.appends(goes_on=1, begins_anew=1, unique=1)
            drain(programs)
    with opened(storage, tell) as programs:
        end = programs.hosted.log.end
        assert all(each.committed == end for each in account.groups.values())
        assert not any(series.pending for series in account.series.values())
    sound_sidecar(storage)


def drain(programs: Client) -> None:
    if programs.begins("goes on"):
        for group in GROUPS:
            programs.joins(group)
            while programs.fetches(group):
                programs.settles(group)
        programs.ticks()
