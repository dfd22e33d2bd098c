"""How a partition is read on and on: what is asked, and when again."""

from __future__ import annotations

import time

import pytest

from mesh.durable.protocol import Query
from mesh.durable.reader import PartitionReader, read
from mesh.durable.route import Ask, LocalRoute
from mesh.durable.sidecar import Sidecar
from tests.durable.test_sidecar import Asking
from tests.support.fake_disk import FakeDisk


def test_a_sidecar_that_is_about_to_close_is_asked_again_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may take as long as its node has time: whoever follows asked thousands of times."""
    monkeypatch.setattr("mesh.durable.reader._AGAIN_S", 0.05)
    sidecar = Sidecar(FakeDisk())
    Asking(sidecar).append("a")
    sidecar.dismiss()
    route = LocalRoute(sidecar)
    asked: list[Query] = []
    begin = route.begin

    def counted(query: Query) -> Ask:
        asked.append(query)
        return begin(query)

    monkeypatch.setattr(route, "begin", counted)
    reader = PartitionReader(route, "orders", 1 << 26)
    reader.follow, reader.offset = True, 1
    began = time.monotonic()
    assert read(reader, 10, stopped=lambda: len(asked) == 4) == []
    assert time.monotonic() - began >= 0.15
    sidecar.close()
