"""A sidecar in a process of its own, for tests that stop or kill it."""

from __future__ import annotations

from pathlib import Path

import pytest

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
