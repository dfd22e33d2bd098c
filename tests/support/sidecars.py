"""A sidecar in a process of its own, for tests that stop or kill it; and a node that does not care
where its streams are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh import Node
from tests.support.processes import Program, Programs

SIDECAR = """
    import sys
    from mesh import Node

    with Node("sidecar", durable=sys.argv[1]):
        print("ready")
        sys.stdin.read()
"""


@pytest.fixture
def sidecar(tmp_path: Path, programs: Programs) -> Program:
    """Its directory is ``log``."""
    program = programs.start(SIDECAR, str(tmp_path / "log"))
    program.expect("ready")
    return program


@pytest.fixture(params=["embedded", "sidecar"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
    """One whose streams are in its own process, or in another. Their directory is ``log``."""
    if request.param == "embedded":
        with Node("writer", durable=tmp_path / "log") as node:
            yield node
    else:
        request.getfixturevalue("sidecar")
        with Node("writer") as node:
            yield node
