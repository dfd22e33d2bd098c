"""How results come about: turns, ratios, spreads, losses; without processes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest

from bench.case import TINY
from bench.measure import Field, percentiles, throughput
from bench.processes import Failed
from bench.rows import Row, Skipped, better, percentile, quartiles, size_text, text
from bench.setting import Setting
from bench.teams import FlowTeam

SETTING = Setting(size=16)
RATES = {"ours": [100.0, 300.0, 400.0], "raw": [100.0, 100.0, 200.0], "zenoh": [50.0]}


class FakeTeam(FlowTeam):
    """Has the rates that it is given, and writes down whose turn it is."""

    turns: list[str]
    losing: dict[str, int]
    failing = ("", "")

    def opening(self) -> Iterator[None]:
        self._fail("opening")
        self.rates = cycle(RATES[self.side])
        yield

    def block(self, count: int) -> float:
        self._fail("block")
        self.turns.append(self.side)
        self.lost += self.losing.get(self.side, 0)
        return next(self.rates)

    def _fail(self, when: str) -> None:
        if self.failing == (self.side, when):
            raise Failed("out of luck")


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> type[FakeTeam]:
    monkeypatch.setattr("bench.measure._missing", lambda side, setting: None)
    return type("Fake", (FakeTeam,), {"turns": [], "losing": {}})


def run(team: type[FakeTeam], *sides: str, rounds: int = 3) -> list[Any]:
    scale = dataclasses.replace(TINY, rounds=rounds)
    return list(throughput("topic", SETTING, sides, scale, team))


def test_the_ratio_is_the_median_of_each_rounds_own(team: type[FakeTeam]) -> None:
    (row,) = run(team, "ours", "raw")
    assert (row.ours, row.theirs, row.unit) == (300, 100, "msg/s")
    assert (row.ratio, row.low, row.high) == (2, 1.5, 2.5), "of 1, 3 and 2"
    assert (row.rounds, row.lost) == (3, 0)


def test_all_take_turns_and_each_is_first_now_and_then(team: type[FakeTeam]) -> None:
    run(team, "ours", "raw", "zenoh", rounds=6)
    rounds = [team.turns[start : start + 3] for start in range(0, 18, 3)]
    assert all(set(turn) == {"ours", "raw", "zenoh"} for turn in rounds)
    assert {turn[0] for turn in rounds} == {"ours", "raw", "zenoh"}
    assert {turn[-1] for turn in rounds} == {"ours", "raw", "zenoh"}


def test_what_either_side_lost_is_in_the_row_and_marked(team: type[FakeTeam]) -> None:
    team.losing = {"raw": 2}
    (row,) = run(team, "ours", "raw")
    assert (row.lost, row.note) == (6, "lost by raw")
    assert "LOST 6" in text(row)


@pytest.mark.parametrize("when", ["opening", "block"])
def test_a_side_that_fails_is_left_out_and_the_others_go_on(
    team: type[FakeTeam], when: str
) -> None:
    team.failing = ("raw", when)
    failed, row = run(team, "ours", "raw", "zenoh")
    assert (failed.peer, failed.skipped, failed.failed) == ("raw", "out of luck", True)
    assert (row.peer, row.rounds) == ("zenoh", 3)


class StubWorker:
    """Answers what it is given, whatever it is asked."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)

    def ask(self, do: str, **arguments: Any) -> None:
        self.asked = do

    def answer(self, timeout: float = 0) -> dict[str, Any]:
        return self.answers.pop(0)


def a_flow(*got: dict[str, Any]) -> Any:
    team: Any = FlowTeam("ours", Setting(size=16, receivers=len(got)))
    team.sender = StubWorker({"start": 10.0, "end": 10.5})
    team.receivers = [StubWorker({"listening": True}, answer) for answer in got]
    return team


def test_a_block_ends_with_the_last_receipt_of_the_last_receiver() -> None:
    total = SETTING.total(100)
    got = [{"end": end, "count": 100, "total": total} for end in (12.0, 14.0, 13.0)]
    with contextlib.closing(a_flow(*got)) as team:
        assert team.block(100) == 100 / 4
        assert team.lost == 0


def test_what_a_receiver_did_not_get_is_lost() -> None:
    got = {"end": 12.0, "count": 97, "total": 5}
    with contextlib.closing(a_flow(got, got)) as team:
        team.block(100)
        assert team.lost == 6


def test_payloads_that_arrive_changed_are_no_result() -> None:
    got = {"end": 12.0, "count": 100, "total": SETTING.total(100) + 1}
    with (
        contextlib.closing(a_flow(got)) as team,
        pytest.raises(Failed, match="ours: payloads arrived changed"),
    ):
        team.block(100)


def test_a_time_is_better_when_it_is_shorter() -> None:
    assert better(10, 20, "us") == better(20, 10, "msg/s") == 2


def test_a_percentile_is_of_all_and_its_spread_of_groups_that_can_have_one() -> None:
    field = Field("service", SETTING, ("ours", "raw"))
    ours = [[1e-6] * 50, [3e-6] * 50] * 10
    raw = [[2e-6] * 50, [2e-6] * 50] * 10
    percentiles(field, {"ours": ours, "raw": raw}, 20)
    rows = {row.case: row for row in field.results if isinstance(row, Row)}
    assert set(rows) == {"service-p50", "service-p99", "service-p99.9"}
    assert rows["service-p99"].ours == pytest.approx(3)
    assert rows["service-p99"].ratio == pytest.approx(2 / 3)
    one = rows["service-p99.9"]
    assert one.low == one.high == one.ratio, "1000 values make one group"
    few = Field("service", SETTING, ("ours", "raw"))
    percentiles(few, {"ours": ours[:1], "raw": raw[:1]}, 1)
    assert [row.case for row in few.results] == ["service-p50"]


def test_percentiles_and_quartiles() -> None:
    assert [percentile(range(1000), p) for p in (50, 99, 99.9)] == [500, 990, 999]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0)


@pytest.mark.parametrize("shape", ["bytes", "text", "dict"])
def test_payloads_differ_and_add_up(shape: Any) -> None:
    setting = Setting(size=1000, shape=shape)
    payloads = setting.payloads()
    assert payloads == setting.payloads(), "the same for every side"
    assert len({str(payload) for payload in payloads}) == len(payloads)
    if shape != "dict":
        assert {len(payload) for payload in payloads} == {1000}
    sent = (payloads * 3)[:150]
    assert setting.total(150) == sum(payload[setting.key] for payload in sent)


def test_a_line_of_the_table_says_why_there_are_no_figures() -> None:
    skipped = Skipped(case="topic", transport="ipc", size=16, peer="nats", skipped="has no ipc")
    assert " ".join(text(skipped).split()) == "topic ipc 16 B nats skipped: has no ipc"
    failed = dataclasses.replace(skipped, failed=True)
    assert "FAILED: has no ipc" in text(failed)
    assert [size_text(size) for size in (16, 1000, 65536, 1 << 20)] == [
        "16 B",
        "1000 B",
        "64 KiB",
        "1 MiB",
    ]
