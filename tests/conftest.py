"""What every test gets: a private runtime directory, no settings from outside, fixed luck in CI,
and a look at the logs that it leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import settings

pytest.register_assert_rewrite(  # they assert much, and what fails there is to say with what
    *(
        f"tests.support.sidecar_{noun}"
        for noun in ("consumers", "groups", "lives", "machine", "producers", "records")
    )
)

pytest_plugins = [
    "tests.support.integrity",
    "tests.support.homes",
    "tests.support.processes",
    "tests.support.hosts",
    "tests.support.queues",
    "tests.support.sidecars",
]

# No deadline: a slow machine is no defect. In CI every run draws the same examples, so that a red
# run is the change's doing and can be had again.
settings.register_profile("mesh", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("mesh")

# A shell's background job ignores Ctrl-C, and so would every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def private_runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No test meets the nodes of another, or of whoever runs the tests.

    Directly under /tmp: a socket's path has 107 bytes, and pytest's `tmp_path` takes most of them.
    """
    for name in [name for name in os.environ if name.startswith("MESH_")]:
        monkeypatch.delenv(name)
    path = tempfile.mkdtemp(prefix="mesh-", dir="/tmp")
    monkeypatch.setenv("MESH_RUNTIME_DIR", path)
    yield path
    shutil.rmtree(path)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("netns") and not _network_namespaces_allowed():
        pytest.skip("network namespaces may not be made here (it takes root)")


@cache
def _network_namespaces_allowed() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    probe = ["unshare", "--net", "--mount", "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0
