"""The programs of the README and of docs/log.md run as they stand; the files they name exist."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import msgspec
import pytest

from mesh import Node, StreamOptions
from mesh.durable import batch
from tests.support.pages import snippets
from tests.support.processes import Programs

ROOT = Path(__file__).parents[1]
SNIPPETS = snippets("README.md")
PROGRAMS = [snippet for snippet in SNIPPETS if "import Node" in snippet]


def program(text: str) -> str:
    return next(snippet for snippet in PROGRAMS if text in snippet)


def start(source: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_there_is_a_program_for_each_kind_of_channel() -> None:
    assert len(PROGRAMS) == 8
    assert all(len(snippet.splitlines()) <= 10 for snippet in PROGRAMS)


@pytest.mark.parametrize(
    ("background", "foreground", "printed"),
    [
        ("for message in subscriber", "publisher.send", "{'seq': 1} {}"),
        ("for task in node.puller", "pusher.send", "working on holiday.jpg"),
    ],
)
def test_the_programs_work_together(background: str, foreground: str, printed: str) -> None:
    # Its own timeouts are for a person's second terminal; here both start at once.
    receiver = start(program(background))
    sender = start(program(foreground).replace("timeout=1.0", "timeout=10"))
    timer = threading.Timer(20, receiver.kill)
    timer.start()
    assert receiver.stdout is not None
    assert receiver.stdout.readline().strip() == printed
    timer.cancel()
    receiver.kill()
    receiver.communicate()
    _, err = sender.communicate(timeout=10)
    assert (sender.returncode, err) == (0, "")


def test_the_service_answers() -> None:
    process = start(program("node.service"))
    assert process.communicate(timeout=20) == ("3\n", "")


def test_the_stream_is_replayed(tmp_path: Path) -> None:
    source = program("node.stream").replace('"shop.log"', repr(str(tmp_path / "shop.log")))
    for printed in ("0 {'id': 7}\n", "0 {'id': 7}\n1 {'id': 7}\n"):
        assert start(source).communicate(timeout=20) == (printed, "")


def test_what_is_recorded_is_replayed(tmp_path: Path) -> None:
    source = program("node.record").replace('"station.log"', repr(str(tmp_path / "station.log")))
    assert start(source).communicate(timeout=20) == ("sensors/kitchen 21.5\n", "")


@pytest.mark.slow
def test_the_stream_is_consumed(tmp_path: Path, programs: Programs) -> None:
    consuming = programs.start(program("consumer("))
    with Node("shop", durable=tmp_path / "log") as node:
        node.stream("orders").append({"id": 7})
        assert consuming.line() == "billing {'id': 7}"


@pytest.mark.slow
def test_the_page_of_streams_runs(tmp_path: Path, programs: Programs) -> None:
    shop, billing, station = snippets("docs/log.md")
    consuming = programs.start(billing)
    at = shop.replace('"shop.log"', repr(str(tmp_path / "shop.log")))
    keeping = programs.start(f"{at}    input()  # it keeps the log for whoever consumes")
    for offset in range(994):
        assert keeping.line() == f"{offset} {{'id': {offset + 7}}}"
    for number in range(7, 1001):
        assert consuming.line() == f"billing {{'id': {number}}}"
    at = station.replace('"station.log"', repr(str(tmp_path / "station.log")))
    programs.start(at).expect("sensors/kitchen 21.5")


def test_the_page_of_streams_names_every_option_and_its_default() -> None:
    table = (ROOT / "docs" / "log.md").read_text().partition("| of `StreamOptions`")[2]
    said: dict[str, object] = {}
    for row in table.partition("\n\n")[0].splitlines()[2:]:
        _, names, default, *_ = row.split("|")
        for name in re.findall(r"`(\w+)`", names):
            said[name] = default_of(default.strip())
    assert said == msgspec.structs.asdict(StreamOptions())


def default_of(text: str) -> object:
    """What a cell of that table says."""
    if text in ("all is kept", "the disk"):
        return None
    seconds = re.fullmatch(r"([\d,]+) s", text)
    return float(seconds[1].replace(",", "")) if seconds else text.strip('`"')


def test_the_page_of_streams_draws_a_segment_as_its_module_does() -> None:
    drawing = "┌" + (ROOT / "docs" / "log.md").read_text().partition("```\n┌")[2]
    drawing = drawing.partition("```")[0]
    assert "head, little endian" in drawing
    assert textwrap.indent(drawing, "    ") in (batch.__doc__ or "")


def test_every_link_leads_somewhere() -> None:
    documents = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
