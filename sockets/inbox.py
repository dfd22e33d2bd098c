"""An inbox: messages that are read and were not taken. No I/O.

Used under a link's lock, but for one thing: whoever receives may pop from `made` without it.

What came in one frame stays as it is decoded, a *run*, until somebody wants single messages of it.
Those that are made come before all runs.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice, repeat, starmap

from mesh.message import Message, Messages, Run


class Inbox:
    """In the order they came."""

    __slots__ = ("_runs", "_waiting", "made")

    def __init__(self) -> None:
        self.made: deque[Message] = deque()
        self._runs: deque[Run] = deque()
        self._waiting = 0
        """Messages in the runs."""

    def __len__(self) -> int:
        return len(self.made) + self._waiting

    def add(self, run: Run) -> None:
        """A frame came, of which maybe nothing was new."""
        if run:
            self._waiting += len(run)
            self._runs.append(run)

    def append(self, message: Message) -> None:
        """A message came."""
        if self._runs:
            self.make()
        self.made.append(message)

    def make(self) -> None:
        """Have all of them be there to be popped without the lock."""
        while self._runs:
            self._make_first()

    def pop(self) -> Message | None:
        """The first; None if there is none: another may just have taken it, without the lock."""
        if not self.made:
            if not self._runs:
                self._waiting = 0  # a KeyboardInterrupt may have come between two steps
                return None
            self._make_first()
        try:
            return self.made.popleft()
        except IndexError:
            return None

    def pop_many(self, count_max: int) -> Messages:
        """The first of them, up to so many."""
        messages = Messages()
        made: list[Message] = []
        runs, waiting = list(self._runs), self._waiting
        try:
            self._pop_made(made, count_max)
            if made:
                messages.add(made)
            while self._runs and len(messages) < count_max:
                run, rest = self._runs[0].split(count_max - len(messages))
                self._waiting -= len(run)
                if rest is None:
                    del self._runs[0]
                else:
                    self._runs[0] = rest
                messages.add(run)
        except BaseException:  # Ctrl-C: nobody has seen them
            self._runs, self._waiting = deque(runs), waiting
            self.made.extendleft(reversed(made))
            raise
        if not messages:
            self._waiting = 0
        return messages

    def _pop_made(self, popped: list[Message], count_max: int) -> None:
        # All in C: a Ctrl-C is looked at before and behind it, and never with one in hand.
        with contextlib.suppress(IndexError):
            popped.extend(islice(starmap(self.made.popleft, repeat(())), count_max))

    def _make_first(self) -> None:
        messages = list(self._runs[0])  # first: a Ctrl-C may come while they are made
        self._waiting -= len(messages)
        del self._runs[0]
        self.made += messages

    def put_back(
        self, messages: Sequence[Message], order: Callable[[Message], tuple[object, int]]
    ) -> None:
        """These were taken from the front, and not seen: each goes where it belongs, behind those
        of the same sequence that come before it. Several that were taken may come back in any
        order. Whoever pops meanwhile finds `made` empty for a moment, and then all of it in order.

        `order`: whose sequence a message is part of, and its place in it.
        """
        popped: list[Message] = []
        waiting: deque[Message] = deque()
        try:
            self._pop_made(popped, len(self.made))
            waiting.extend(popped)
            for message in reversed(messages):
                _insert(waiting, message, order)
        except BaseException:  # Ctrl-C: better out of order than gone
            waiting = deque([*messages, *popped])
            raise
        finally:
            self.made.extend(waiting)

    def clear(self) -> None:
        self.made.clear()
        self._runs.clear()
        self._waiting = 0


def _insert(
    waiting: deque[Message], message: Message, order: Callable[[Message], tuple[object, int]]
) -> None:
    sequence, place = order(message)
    behind = 0
    for i, other in enumerate(waiting, 1):
        if (at := order(other))[0] == sequence:
            if at[1] > place:
                break
            behind = i
    waiting.insert(behind, message)
