"""``mesh demo`` holds what it shows, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest


def demo(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from mesh.cli import main; main()", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.long
def test_every_check_of_the_demo_holds_and_its_aggregator_has_its_totals_again() -> None:
    process = demo("--seconds", "1")
    out, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (0, ""), out
    events, _, summary = out.partition("Summary")
    assert "x killing aggregator with SIGKILL" in events
    assert "FAIL" not in summary
    found = re.search(r"aggregator read (\d+) records again in .* all (\d+) in the log", summary)
    assert found is not None, summary
    again, in_all = map(int, found.groups())
    assert 0 < again < in_all
    assert in_all == sum(map(int, re.findall(r"(\d+) sent, \d+ received", summary)))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_demo_ends_with_control_c_and_leaves_no_process() -> None:
    process = demo()
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
