"""What import-linter cannot see of the architecture, read from the source itself."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE_FOLDERS = ("mesh", "sockets", "discovery", "durable")
OTHER_FOLDERS = ("tests", "examples", "bench")

LINES_MAX = 450
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}

MAY_TOUCH_FILES = {
    "discovery/local.py",  # one file per node in the runtime directory
    "durable/storage.py",  # the log
    "mesh/host.py",  # boot id, /proc
}
# fmt: off
FILE_FUNCTIONS = {
    "builtins": {"open"},
    "io": {"open", "open_code"},
    "os": {
        "open", "fdopen", "mkdir", "makedirs", "mkfifo", "unlink", "remove", "rmdir", "removedirs",
        "rename", "renames", "replace", "link", "symlink", "truncate", "chmod", "chown", "utime",
        "listdir", "scandir", "walk",
    },
}
FILE_METHODS = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "rmdir", "unlink",
    "touch", "chmod", "iterdir", "glob", "rglob", "walk", "symlink_to", "hardlink_to",
}
# fmt: on
FILE_MODULES = {"shutil", "tempfile", "fileinput", "mmap"}
STORED = "durable/"
"""There files are reached through a `Storage`, whose methods have the same names as a `Path`'s: so
that nobody has a path there is looked at instead."""


def sources(*folders: str) -> list[Path]:
    """Python files below `folders`; the links inside mesh/ are not followed."""
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it) for each import; the name is None for a whole module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def file_accesses(source: str, *, stored: bool = False) -> set[str]:
    """What in `source` opens, makes, lists or removes files."""
    tree = ast.parse(source)
    found = set()
    for module, name in imports(tree):
        if module in FILE_MODULES or (stored and module == "pathlib"):
            found.add(f"import {module}")
        elif name in FILE_FUNCTIONS.get(module, ()):
            found.add(f"from {module} import {name}")
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="open")):
                found.add("open")
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in FILE_FUNCTIONS:
                if name in FILE_FUNCTIONS[module]:
                    found.add(f"{module}.{name}")
            case ast.Call(func=ast.Attribute(attr=name)) if name in FILE_METHODS and not stored:
                found.add(f".{name}")
    return found


PACKAGE_SOURCES = sources(*PACKAGE_FOLDERS)


def test_the_sources_are_found() -> None:
    found = {name_of(path) for path in PACKAGE_SOURCES}
    assert {"mesh/errors.py", "sockets/control.py", "discovery/source.py"} <= found
    assert not [name for name in found if name.startswith("mesh/sockets/")], "followed a link"


@pytest.mark.parametrize("path", PACKAGE_SOURCES, ids=name_of)
def test_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "no docstring"


@pytest.mark.parametrize("path", PACKAGE_SOURCES, ids=name_of)
def test_module_stays_small_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize("path", PACKAGE_SOURCES, ids=name_of)
def test_files_are_touched_by_the_few_modules_meant_to(path: Path) -> None:
    name = name_of(path)
    if name in MAY_TOUCH_FILES or name.startswith("mesh/cli/"):
        return
    assert file_accesses(path.read_text(), stored=name.startswith(STORED)) == set()


@pytest.mark.parametrize(
    "source",
    [
        "open('x')",
        "import os; os.open('x', os.O_RDONLY)",
        "import os; remove = os.unlink",
        "from os import replace",
        "from pathlib import Path; Path('x').read_text()",
        "from pathlib import Path; Path('x').open()",
        "import shutil",
        "from tempfile import mkdtemp",
    ],
)
def test_every_way_to_a_file_is_noticed(source: str) -> None:
    assert file_accesses(source)


def test_nobody_has_a_path_where_files_are_reached_through_a_storage() -> None:
    assert file_accesses("from pathlib import Path", stored=True)
    assert not file_accesses("storage.open('x').truncate(3)", stored=True)


@pytest.mark.parametrize(
    "source", ["'a'.replace('a', 'b')", "import os; os.pidfd_open(1)", "import os; os.read(3, 1)"]
)
def test_what_is_no_file_is_left_alone(source: str) -> None:
    assert not file_accesses(source)


def test_no_module_has_a_name_that_means_anything() -> None:
    named = [
        name_of(path)
        for path in sources(*PACKAGE_FOLDERS, *OTHER_FOLDERS)
        if VAGUE & set(re.split(r"[/_.]", name_of(path)))
    ]
    assert named == []


def test_nothing_imports_a_folder_by_its_second_name() -> None:
    """``import sockets`` works from the root, and makes a second copy of every class."""
    wrong = [
        f"{name_of(path)}: {module}"
        for path in sources(*PACKAGE_FOLDERS, *OTHER_FOLDERS)
        for module, _ in imports(ast.parse(path.read_text()))
        if module.split(".")[0] in ("sockets", "discovery", "durable")
    ]
    assert wrong == []


@pytest.mark.slow
def test_import_mesh_stays_light() -> None:
    """Each of these costs more than the rest together, and many programs never use it."""
    heavy = {"asyncio", "click", "rich", "zeroconf"}
    for statement in ("import mesh", "from mesh import Node"):
        script = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
        run = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        )
        loaded = set(json.loads(run.stdout))
        assert "mesh" in loaded
        assert loaded & heavy == set(), statement


def undocumented(name: str, thing: object) -> Iterator[str]:
    """`name` and those of its public methods and properties that have no docstring."""
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return
    # A dataclass without a docstring is given its signature for one.
    if not thing.__doc__ or thing.__doc__.startswith(f"{thing.__name__}("):
        yield name
    if not inspect.isclass(thing):
        return
    own = (base for base in reversed(thing.__mro__) if base.__module__.split(".")[0] == "mesh")
    for attribute, member in {k: v for base in own for k, v in vars(base).items()}.items():
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        described = inspect.isfunction(member) or isinstance(member, property)
        if described and not attribute.startswith("_") and not member.__doc__:
            yield f"{name}.{attribute}"


def test_every_public_name_is_documented() -> None:
    mesh = importlib.import_module("mesh")
    public: list[str] = list(mesh.__all__)
    assert public
    assert len(public) == len(set(public))
    missing = [gap for name in public for gap in undocumented(name, getattr(mesh, name))]
    assert missing == []


def test_help_has_a_page_for_every_public_name() -> None:
    """A dataclass whose annotations do not read when the program runs ends it."""
    mesh = importlib.import_module("mesh")
    for name in mesh.__all__:
        assert name in pydoc.render_doc(getattr(mesh, name))


def test_all_lists_what_the_package_shows() -> None:
    """A public class or function that `mesh` shows is in `__all__`: no name by accident."""
    mesh = importlib.import_module("mesh")
    shown = {
        name
        for name, thing in vars(mesh).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isroutine(thing))
        and thing.__module__.split(".")[0] == "mesh"
    }
    assert shown - set(mesh.__all__) == set()


def test_the_map_of_the_log_names_each_of_its_modules_once() -> None:
    """There are too many of them for the folder's listing to tell."""
    drawn = ast.get_docstring(ast.parse((ROOT / "durable/__init__.py").read_text())) or ""
    named = re.findall(r"^ {6}(\w+) {2,}\S", drawn, re.MULTILINE)
    there = {path.stem for path in sources("durable")} - {"__init__"}
    assert sorted(named) == sorted(there)
