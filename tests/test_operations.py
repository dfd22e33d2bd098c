"""docs/operations.md knows every reason for which something is dropped, and every variable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from mesh.admission import REFUSALS
from mesh.durable.outcomes import Code
from mesh.sockets import failure

ROOT = Path(__file__).parents[1]
SOURCES = [
    p
    for folder in ("mesh", "sockets", "discovery", "durable")
    for p in (ROOT / folder).glob("*.py")
]
CODE = "\n".join(path.read_text() for path in SOURCES)
DOCUMENT = (ROOT / "docs" / "operations.md").read_text()


def test_every_reason_for_dropping_is_explained() -> None:
    literal = set(re.findall(r'dropped\["([^"]+)"\]', CODE))
    raised = set(re.findall(r'Malformed\("([^"]+)"', CODE))
    turned_away = {failure.BUSY, failure.EXPIRED, failure.CANCELLED}
    links = set(re.findall(r'return "(link\w* \w+)"', CODE))
    sources = {"local ignored", "mdns ignored", "mdns failures", "seeds unresolved"}
    appends = {f"append {code}" for code in get_args(Code)}
    refused_before = {
        f"append {code}" for code in ("closed", "damaged", "differs", "missing", "over")
    }
    sources |= appends - refused_before | {"unsynced"}
    reasons = literal | raised | turned_away | links | sources | REFUSALS
    rows = [
        row.split("|")[1] for row in DOCUMENT.partition("dropped")[2].splitlines() if "|" in row
    ]
    explained = {reason for row in rows for reason in re.findall(r"`([^`]+)`", row)}
    assert reasons - explained == set(), "not explained"
    assert explained - reasons - {"refused", "oversize"} == set(), "explained, and never said"


def test_every_variable_is_named() -> None:
    assert set(re.findall(r"MESH_[A-Z_]+", DOCUMENT)) == set(re.findall(r"\bMESH_[A-Z_]+", CODE))
