"""The time of a log, whatever the wall clock does."""

from __future__ import annotations

from random import Random

from mesh.durable.clock import Clock
from mesh.durable.retention import Keep, Sealed, trim_to

S = 1_000_000_000
DAY = 86_400 * S
YEAR = 365 * DAY
NOW = 56 * YEAR


def test_it_is_the_wall_clocks() -> None:
    clock = Clock(0, NOW)
    for now_ns in (NOW, NOW + 1, NOW + 1, NOW + DAY):
        assert clock.at(now_ns) == now_ns
        assert clock.tick(now_ns) == clock.time_ns == now_ns


def test_it_never_goes_back() -> None:
    luck = Random(1)
    clock, now_ns = Clock(NOW, NOW), NOW
    for _ in range(1000):
        before = clock.time_ns
        now_ns += luck.randint(-5, 5)
        looked = clock.at(now_ns)
        assert before <= looked == clock.tick(now_ns) == clock.at(now_ns)


def test_where_a_clock_was_ahead_it_runs_at_half_the_speed_until_that_is_made_up_for() -> None:
    clock = Clock(NOW, NOW)
    ahead = clock.tick(NOW + 100 * S)
    assert clock.tick(NOW) == ahead, "it was set right"
    for passed in range(0, 198, 2):
        assert clock.at(NOW + passed * S) == ahead + passed // 2 * S
        assert clock.tick(NOW + passed * S) == ahead + passed // 2 * S
    for passed in range(198, 300):
        assert clock.tick(NOW + passed * S) == NOW + passed * S


def test_it_runs_on_where_nothing_is_appended_for_long() -> None:
    clock = Clock(NOW + YEAR, NOW)
    for day in range(1, 365):
        assert clock.hear(NOW + day * DAY) == NOW + YEAR + day * DAY // 2
    assert clock.tick(NOW + 2 * YEAR) == NOW + 2 * YEAR
    assert clock.hear(NOW + 3 * YEAR) == NOW + 3 * YEAR
    assert clock.time_ns == NOW + 2 * YEAR, "which the next batch may have"


def test_it_runs_on_after_a_restart() -> None:
    clock = Clock(NOW + YEAR, NOW)
    assert clock.at(NOW + 10 * S) == NOW + YEAR + 5 * S


def test_a_leap_from_1970_into_the_present_is_no_time_that_has_passed() -> None:
    clock = Clock(NOW + S, 0)
    assert clock.tick(10 * S) == NOW + 6 * S
    assert clock.tick(NOW) == NOW + 6 * S + DAY // 2
    assert clock.tick(NOW + DAY + 12 * S) == NOW + DAY + 12 * S


def test_what_is_kept_for_a_time_goes_though_the_wall_clock_had_been_ahead() -> None:
    clock = Clock(NOW, NOW)
    sealed = [Sealed(100, 10, clock.tick(NOW + YEAR))]
    clock.tick(NOW)
    keep = Keep(age_s_max=3600)
    assert trim_to(sealed, 50, 15, keep, clock.at(NOW + 7200 * S), None) is None
    assert trim_to(sealed, 50, 15, keep, clock.at(NOW + 7203 * S), None) == 10
