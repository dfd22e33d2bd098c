"""What a subscriber knows of every publisher's sequences: tells gaps, repeats and newcomers.

No I/O, no clock. A sender is a number, whatever that stands for; sequences count from 1.
"""

from __future__ import annotations

from collections import OrderedDict

from mesh import limits


class Sequences:
    """The next sequence expected of each topic of each sender; bounded, the quietest go first."""

    def __init__(self) -> None:
        self._expected: OrderedDict[tuple[int, bytes], int] = OrderedDict()
        self._marked: OrderedDict[int, None] = OrderedDict()
        self._overflowing: dict[int, None] = {}
        """Senders with more topics than are followed."""

    def take(self, sender: int, name: bytes, seq: int, count: int) -> tuple[int, int]:
        """Messages `seq` to ``seq + count - 1`` arrived: (first missed or 0, how many to skip)."""
        key = sender, name
        if self._expected.get(key) == seq:  # as nearly always
            self._expected[key] = seq + count
            self._expected.move_to_end(key)
            return 0, 0
        result = self.compare(sender, name, seq, count)
        self.advance(sender, name, seq + count)
        return result

    def compare(self, sender: int, name: bytes, seq: int, count: int) -> tuple[int, int]:
        """What `take` would say; to be followed by `advance`, once they are where nothing loses
        them."""
        expected = self._expect(sender, name, seq)
        if seq > expected:
            return expected, 0
        return 0, min(count, expected - seq)

    def advance(self, sender: int, name: bytes, expected: int) -> None:
        """The next one expected is `expected`, or what is expected already."""
        self._follow(sender, name, max(self._expect(sender, name, 0), expected))

    def stands_at(self, sender: int, name: bytes, seq: int) -> int:
        """A mark says that `seq` was the last sent: the first one missed, or 0."""
        expected = self._expect(sender, name, seq + 1)
        self._follow(sender, name, max(expected, seq + 1))
        return expected if seq >= expected else 0

    def falls_quiet_at(self, sender: int, name: bytes, seq: int) -> int:
        """The same of a mark that is for all: where nothing is known yet it is no baseline, since
        a newcomer's last value and its own mark may still be on their way."""
        known = (sender, name) in self._expected
        if known or sender in self._marked or sender in self._overflowing:
            return self.stands_at(sender, name, seq)
        return 0

    def marked(self, sender: int) -> None:
        """From here on a topic of `sender` that was not heard of starts with 1."""
        if sender in self._overflowing:
            return
        self._marked[sender] = None
        self._marked.move_to_end(sender)
        if len(self._marked) > limits.SIGHTINGS_MAX:
            self._marked.popitem(last=False)

    def _expect(self, sender: int, name: bytes, baseline: int) -> int:
        expected = self._expected.get((sender, name))
        if expected is not None:
            return expected
        return 1 if sender in self._marked else baseline

    def _follow(self, sender: int, name: bytes, expected: int) -> None:
        self._expected[sender, name] = expected
        self._expected.move_to_end((sender, name))
        if len(self._expected) > limits.TRACKED_CHANNELS_MAX:
            (old, _), _ = self._expected.popitem(last=False)
            # Its forgotten topic would seem to start with 1, now and after each further mark.
            self._marked.pop(old, None)
            self._overflowing[old] = None
            if len(self._overflowing) > limits.SIGHTINGS_MAX:
                del self._overflowing[next(iter(self._overflowing))]
