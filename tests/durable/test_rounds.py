"""Which of many is looked at next."""

from __future__ import annotations

from mesh.durable.rounds import Rounds


def test_each_is_looked_at_once_in_a_round_however_long_that_takes() -> None:
    rounds = Rounds(100)
    names = {f"stream {n}" for n in range(5)}
    seen = [rounds.next(names, float(now)) for now in range(330)]
    assert seen[:6] == [*sorted(names), None]
    assert {now: name for now, name in enumerate(seen) if name} == {
        100 * turn + n: f"stream {n}" for turn in range(4) for n in range(5)
    }


def test_of_very_many_one_is_looked_at_each_time_and_none_twice_in_a_round() -> None:
    rounds = Rounds(100)
    names = {f"{n:04}" for n in range(1000)}
    seen = [rounds.next(names, float(now)) for now in range(2000)]
    assert seen == [*sorted(names), *sorted(names)]


def test_who_could_not_have_its_turn_is_the_next() -> None:
    rounds = Rounds(10)
    assert rounds.next({"a", "b"}, 0) == "a"
    rounds.put_back("a")
    assert [rounds.next({"a", "b"}, now) for now in (1, 2, 3)] == ["a", "b", None]


def test_who_comes_later_is_looked_at_in_the_next_round() -> None:
    rounds = Rounds(10)
    assert rounds.next({"a"}, 0) == "a"
    assert rounds.next({"a", "b"}, 1) is None
    assert rounds.next({"a", "b"}, 10) == "a"
    assert rounds.next({"b", "c"}, 11) == "b"
    assert rounds.next({"c"}, 12) is None
    assert rounds.next((), 20) is None
