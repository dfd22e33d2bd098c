"""That the walk at the end of every test sees what a test has left."""

from __future__ import annotations

import contextlib
from pathlib import Path
from random import Random

import pytest

from mesh import Node
from mesh.durable.segment import name_of
from mesh.durable.storage import Disk, Storage
from tests.support.fake_disk import MADE, FakeDisk
from tests.support.integrity import look, sound_sidecar
from tests.support.logs import append, open_log


def test_every_test_ends_with_it(request: pytest.FixtureRequest) -> None:
    assert "sound_logs" in request.fixturenames


def damaged(storage: Storage) -> None:
    """A log of which the second record is there no more, and the others are."""
    log = open_log(storage, segment_bytes=1 << 20)
    append(log, range(10))
    log.close()
    with contextlib.closing(storage.open_to_read(name_of(0))) as file:
        data = bytearray(file.read(0, file.size()))
    data[250] ^= 1
    storage.replace(name_of(0), bytes(data))


@pytest.mark.damages
def test_damage_is_seen_wherever_a_log_lies(tmp_path: Path) -> None:
    disk = FakeDisk()
    look([*MADE], tmp_path)
    damaged(disk.folder("streams").folder("orders"))
    assert [*MADE] == [disk]
    with pytest.raises(AssertionError, match="there were"):
        look([*MADE], None)
    damaged(Disk(tmp_path).folder("log").folder("orders"))
    with pytest.raises(AssertionError, match="there were"):
        look([], tmp_path)


@pytest.mark.damages
def test_a_log_of_which_no_head_can_be_read_is_not_passed_over() -> None:
    disk = FakeDisk()
    damaged(disk)
    disk.replace(name_of(0), bytes(500))
    with pytest.raises(AssertionError, match="there were 10 records"):
        look([disk], None)


@pytest.mark.damages
def test_what_is_found_after_an_end_is_looked_at_too() -> None:
    disk = FakeDisk()
    damaged(disk)
    for found in (disk.kill(), disk.crash(Random(1)), disk.again()):
        with pytest.raises(AssertionError):
            look([found], None)


@pytest.mark.damages
def test_damage_in_any_stream_of_a_sidecar_is_seen(tmp_path: Path) -> None:
    with Node("one", durable=tmp_path) as node:
        for stream in ("orders", "others"):
            node.stream(stream).append_many(range(10))
            node.stream(stream).append("more")
    sound_sidecar(Disk(tmp_path))
    (segment,) = (tmp_path / "streams" / "others").glob("*.log")
    data = bytearray(segment.read_bytes())
    data[200] ^= 1
    segment.write_bytes(data)
    with pytest.raises(AssertionError, match="there were"):
        sound_sidecar(Disk(tmp_path))
