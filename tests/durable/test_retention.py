"""What a log may give up."""

from __future__ import annotations

import pytest

from mesh.durable.retention import Keep, Sealed, trim_to

S = 1_000_000_000
# Three segments of 100 bytes and 10 records, one every 10 s, and the last with 50 bytes, 5 records.
SEALED = [Sealed(100, 10, 10 * S), Sealed(100, 20, 20 * S), Sealed(100, 30, 30 * S)]


@pytest.mark.parametrize(
    ("keep", "acked", "offset"),
    [
        (Keep(), None, None),
        (Keep(bytes_max=350), None, None),
        (Keep(bytes_max=349), None, 10),
        (Keep(bytes_max=150), None, 20),
        (Keep(bytes_max=0), None, 30),
        (Keep(count_max=26), None, None),
        (Keep(count_max=25), None, 10),
        (Keep(count_max=0), None, 30),
        (Keep(age_s_max=30), None, None),
        (Keep(age_s_max=29), None, 10),
        (Keep(age_s_max=19), None, 20),
        (Keep(), 9, None),
        (Keep(), 10, 10),
        (Keep(), 35, 30),
        (Keep(bytes_max=250, age_s_max=29), 15, 10),
        (Keep(bytes_max=350, age_s_max=29), 20, 20),
    ],
)
def test_whole_segments_go_from_the_front_as_soon_as_one_reason_is_there(
    keep: Keep, acked: int | None, offset: int | None
) -> None:
    assert trim_to(SEALED, 50, 35, keep, 40 * S, acked) == offset


def test_the_last_segment_never_goes() -> None:
    assert trim_to([], 50, 35, Keep(bytes_max=0, count_max=0, age_s_max=0), 40 * S, 35) is None
