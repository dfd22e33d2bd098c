"""What is read and was not taken: in order, however it is taken and whatever comes back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.message import Message, Messages, Origin, Run
from mesh.sockets.inbox import Inbox


def run(count: int, sender: str = "s", seq: int = 1, skip: int = 0) -> Run:
    """Payloads are the sequences."""
    origin = Origin("a", sender, seq, 0)
    return Run(list(range(seq + skip, seq + count)), skip, origin)


def order(message: Message) -> tuple[object, int]:
    return message.sender, message.seq


def filled(*runs: Run) -> Inbox:
    inbox = Inbox()
    for each in runs:
        inbox.add(each)
    return inbox


@given(
    st.lists(st.integers(0, 9), max_size=6),
    st.lists(st.sampled_from(["pop", "unlocked", "make", "two", "five", "all"]), max_size=30),
)
def test_it_gives_all_in_order_however_it_is_asked(lengths: list[int], ways: list[str]) -> None:
    inbox, expected, got = Inbox(), 0, 0
    for length in lengths:
        if length == 1:
            inbox.append(Message(expected + 1, 0, Origin("a", "s", expected + 1, 0)))
        else:
            inbox.add(run(length, seq=expected + 1))
        expected += length
    many = {"two": 2, "five": 5, "all": 1000}
    for way in [*ways, "all"]:
        assert len(inbox) == expected - got
        taken: list[Message] = []
        if way == "make":
            inbox.make()
        elif way == "unlocked":
            taken = [inbox.made.popleft()] if inbox.made else []
        elif way == "pop":
            message = inbox.pop()
            assert (message is None) == (got == expected)
            taken = [] if message is None else [message]
        else:
            messages = inbox.pop_many(many[way])
            assert len(messages) == min(many[way], expected - got)
            taken = list(messages)
        for message in taken:
            got += 1
            assert message.seq == message.payload == got
    assert got == expected


@given(
    st.lists(st.sampled_from("ab"), max_size=12),
    st.integers(0, 12),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_what_comes_back_in_any_order_is_in_order_again(
    senders: list[str], taken: int, whole: bool, random: object
) -> None:
    """For each sequence by itself: that is what is promised."""
    inbox = filled(*(run(1, sender, place) for place, sender in enumerate(senders, 1)))
    if whole:
        inbox.make()
    back = [inbox.pop_many(1) for _ in range(min(taken, len(senders)))]
    random.shuffle(back)  # type: ignore[attr-defined]
    for messages in back:
        inbox.put_back(messages, order)
    got = inbox.pop_many(100)
    for sender in "ab":
        places = [place for place, each in enumerate(senders, 1) if each == sender]
        assert [message.seq for message in got if message.sender == sender] == places


def test_what_comes_back_is_first_of_what_it_has_no_order_with() -> None:
    inbox = filled(run(1, "a", 9), run(2, "b", 1))
    taken = inbox.pop_many(1)
    inbox.make()
    inbox.put_back(taken, order)
    assert [order(message) for message in inbox.pop_many(9)] == [("a", 9), ("b", 1), ("b", 2)]


class Interrupted(deque[Message]):
    """A Ctrl-C comes when so many were popped."""

    def __init__(self, messages: Iterable[Message], after: int) -> None:
        super().__init__(messages)
        self._left = after

    def popleft(self) -> Message:
        if self._left == 0:
            self._left = -1
            raise KeyboardInterrupt
        self._left -= 1
        return super().popleft()


@pytest.mark.parametrize("after", range(4))
def test_a_ctrl_c_while_many_are_taken_loses_none(after: int) -> None:
    inbox = filled(run(3))
    inbox.make()
    inbox.add(run(2, seq=4))
    inbox.made = Interrupted(inbox.made, after)
    with pytest.raises(KeyboardInterrupt):
        inbox.pop_many(4)
    assert len(inbox) == 5
    assert inbox.pop_many(9).payloads == [1, 2, 3, 4, 5]


def test_a_ctrl_c_while_some_are_put_back_loses_none() -> None:
    inbox = filled(run(4))
    taken = list(inbox.pop_many(2))
    inbox.make()

    def interrupted(message: Message) -> tuple[object, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inbox.put_back(taken, interrupted)
    assert inbox.pop_many(9).payloads == [1, 2, 3, 4]


def test_a_run_that_is_split_keeps_its_sequences() -> None:
    inbox = filled(run(9, seq=11, skip=2))
    assert [message.seq for message in inbox.pop_many(3)] == [13, 14, 15]
    message = inbox.pop()
    assert message is not None
    assert message.seq == message.payload == 16
    assert [message.seq for message in inbox.pop_many(9)] == [17, 18, 19]


def test_cleared_it_is_empty() -> None:
    inbox = filled(run(2), run(2, seq=3))
    inbox.pop()
    inbox.clear()
    assert len(inbox) == 0
    assert inbox.pop() is None
    assert not inbox.pop_many(1)


def some() -> Messages:
    inbox = filled(run(3), run(2, seq=4), run(4, "t", seq=7))
    inbox.pop()
    return inbox.pop_many(7)


def test_messages_are_a_sequence() -> None:
    messages = some()
    assert len(messages) == 7
    assert messages.payloads == [2, 3, 4, 5, 7, 8, 9]
    assert [m.payload for m in messages] == messages.payloads
    assert [messages[i] for i in range(7)] == list(messages) == messages[:]
    assert [messages[i - 7] for i in range(7)] == list(messages)
    assert messages[1:3] == list(messages)[1:3]
    for beyond in (7, -8):
        with pytest.raises(IndexError):
            messages[beyond]
    assert [origin.sender for origin in messages.origins()] == ["s"] * 4 + ["t"] * 3
    assert messages[-1].sender == "t"


def test_messages_compare_and_show_like_a_list() -> None:
    messages = some()
    assert messages == some()
    assert messages == list(messages)
    assert messages != list(messages)[1:]
    assert messages != 7
    assert repr(messages) == f"Messages({list(messages)!r})"
    with pytest.raises(TypeError):
        hash(messages)


def test_the_payloads_are_a_list_of_ones_own() -> None:
    messages = some()
    messages.payloads.clear()
    assert messages.payloads == [2, 3, 4, 5, 7, 8, 9]
