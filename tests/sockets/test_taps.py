"""What a topic's taps are told: all that leaves, under its sequence, and what nobody can know."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mesh.errors import Timeout
from mesh.sockets import topics as topics_module
from mesh.sockets.outgoing import Outgoing
from mesh.sockets.topic import Tap
from tests.support.homes import Homes
from tests.support.topics import Net


class Noting:
    """A tap that notes what it is told: topic, whether it waits, first sequence, count, missed."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bool, int, int, int]] = []
        self.room = True

    def has_room(self) -> bool:
        return self.room

    def take(
        self, channel: str, waits: bool, seq: int, time_ns: int, message: Outgoing, missed: int
    ) -> None:
        self.told.append((channel, waits, seq, message.count, missed))


@pytest.fixture
def net(homes: Homes) -> Iterator[Net]:
    net = Net(homes)
    yield net
    net.close()


def tap(net: Net, tap: Tap, *names: str) -> None:
    for topics in net.topics.values():
        topics.link.run(lambda: topics.tap(lambda name: (tap,) if name in names else ()))  # noqa: B023


def test_a_tap_is_told_all_that_leaves_on_its_topics_and_on_later_ones(net: Net) -> None:
    noting, a = Noting(), net.publisher("a")
    a.send("before", headers={"alone": True})
    tap(net, noting, "a", "later")
    a.send("x", headers={"alone": True})
    net.publisher("other").send("x")
    net.publisher("later", when_full="wait").send_many([b"x"] * 20)
    a.send("y", headers={"alone": True})
    tap(net, noting)
    a.send("after")
    assert noting.told == [
        ("a", False, 2, 1, 0),
        ("later", True, 1, 20, 0),
        ("a", False, 3, 1, 0),
    ]


def test_a_tap_is_told_how_many_a_ctrl_c_has_cut_off(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting, a = Noting(), net.publisher("a")
    tap(net, noting, "a")

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(topics_module, "send_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            a.send("x", headers={"alone": True})
    a.send("y", headers={"alone": True})
    a.send("z", headers={"alone": True})
    assert noting.told == [("a", False, 2, 1, 1), ("a", False, 3, 1, 0)]


def test_a_topic_that_waits_waits_for_room_in_a_tap_and_one_that_drops_does_not(net: Net) -> None:
    noting = Noting()
    waits, drops = net.publisher("w", when_full="wait"), net.publisher("d")
    tap(net, noting, "w", "d")
    noting.room = False
    drops.send("x", headers={"alone": True})
    with pytest.raises(Timeout):
        waits.send("x", headers={"alone": True}, timeout=0.01)
    assert noting.told == [("d", False, 1, 1, 0)]
    noting.room = True
    waits.send("x", headers={"alone": True}, timeout=5)
    assert noting.told[1:] == [("w", True, 1, 1, 0)], "the sequence has no hole"
