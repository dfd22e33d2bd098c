"""Floors are held or missed by the numbers, and losses hold none."""

from __future__ import annotations

import pytest

from bench.cases import CASES
from bench.floors import BOUNDS, Bound, Verdict, budget_of, judge, lines, unmet
from bench.floors import CASES as NEEDED
from bench.rows import Row, Unit


def a_row(bound: Bound, *, ratio: float = 1.0, ours: float = 1.0, lost: int = 0) -> Row:
    unit: Unit = "msg/s" if bound.kind == "rate" else "us"
    return Row(
        case=bound.case,
        transport="ipc",
        size=bound.size,
        peer=bound.peer,
        ours=ours,
        theirs=1.0,
        ratio=ratio,
        low=ratio,
        high=ratio,
        unit=unit,
        rounds=1,
        lost=lost,
    )


def the(case: str, peer: str = "raw", size: int | None = None) -> Bound:
    return next(b for b in BOUNDS if (b.case, b.peer) == (case, peer) and size in (None, b.size))


@pytest.mark.parametrize(
    ("case", "ratio", "word"),
    [
        ("topic", 1.99, "MISSED"),
        ("topic", 2.0, "held"),
        ("topic", 3.0, "held, goal reached"),
        ("service-p50", 1 / 1.41, "MISSED"),
        ("service-p50", 1 / 1.39, "held"),
        ("service-p50", 1 / 1.19, "held, goal reached"),
        ("service-p99", 1 / 1.49, "held"),
    ],
)
def test_a_ratio_is_held_against_floor_and_goal(case: str, ratio: float, word: str) -> None:
    bound = the(case)
    assert Verdict(bound, "ipc", a_row(bound, ratio=ratio)).word == word


@pytest.mark.parametrize(("ours", "word"), [(0.21, "MISSED"), (0.2, "held")])
def test_an_absolute_budget_is_held_against_the_figure(ours: float, word: str) -> None:
    bound = the("join-local", "budget")
    assert Verdict(bound, "ipc", a_row(bound, ours=ours)).word == word


def test_no_loss_counts_as_speed() -> None:
    bound = the("topic")
    assert Verdict(bound, "ipc", a_row(bound, ratio=9.0, lost=1)).word == "MISSED"


def test_a_goal_alone_is_never_missed() -> None:
    bound = the("topic", "zenoh")
    verdict = Verdict(bound, "ipc", a_row(bound, ratio=0.1))
    assert (verdict.word, verdict.missed) == ("goal not reached", False)
    assert Verdict(bound, "ipc", a_row(bound, ratio=5.0)).word == "goal reached"


def test_what_was_not_measured_is_not_held() -> None:
    verdicts = judge([])
    assert {verdict.word for verdict in verdicts} == {"not measured"}
    assert unmet(verdicts, all_of_them=True)
    assert not unmet(verdicts, all_of_them=False)
    assert len(list(lines(verdicts))) == 1 + len(verdicts)


def test_every_bound_is_of_a_case_that_is_run_for_it() -> None:
    assert set(NEEDED) <= set(CASES)
    made = {"join-local": "start", "join-mdns": "start", "import": "start"}
    for bound in BOUNDS:
        case = made.get(bound.case) or bound.case.removesuffix("-p50").removesuffix("-p99")
        assert case in NEEDED or case.partition("-")[0] in NEEDED
    assert budget_of("idle-rss") == 40
