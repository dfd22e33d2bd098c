"""What is built holds every module, under one import name, and works away from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


def build(hook: str, tree: Path, out: Path) -> Path:
    """Call a hook of the build backend as a front end does (PEP 517), from within `tree`."""
    script = f"import sys; from setuptools.build_meta import {hook}; {hook}(sys.argv[1])"
    out.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", script, str(out)],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        pytest.fail(f"{hook} failed:\n{run.stdout}{run.stderr}", pytrace=False)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, tmp / "tree", symlinks=True, ignore=NOT_SOURCE)
    return build("build_sdist", tmp / "tree", tmp / "out")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which is the harder way: the links of the tree are not in it."""
    tmp = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp, filter="data")
    (tree,) = tmp.iterdir()
    return build("build_wheel", tree, tmp / "out")


def modules_in_the_tree() -> set[str]:
    """Every module as it should be installed: ``mesh/sockets/frame.py``."""
    own = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mesh").rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    linked = {
        f"mesh/{path.relative_to(ROOT).as_posix()}"
        for folder in ("sockets", "discovery", "durable")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert own
    assert linked
    return own | linked


def test_wheel_holds_every_module_of_the_tree(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == modules_in_the_tree()
    assert "mesh/py.typed" in names


def test_wheel_installs_one_import_name(wheel: Path) -> None:
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mesh"}


def test_wheel_names_its_command_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.split(".dist-info/")[-1]: archive.read(name) for name in archive.namelist()}
    scripts = ConfigParser()
    scripts.read_string(inside["entry_points.txt"].decode())
    assert dict(scripts["console_scripts"]) == {"mesh": "mesh.cli:main"}
    assert "License-Expression: Apache-2.0\n" in inside["METADATA"].decode()
    assert inside["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_every_module_imports_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked, as an installer does, and imported where the source tree is out of sight."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = """
import importlib, pkgutil, sys, mesh
for module in pkgutil.walk_packages(mesh.__path__, "mesh."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:
            if missing.name != "rich":  # the extra `live`
                raise
for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "mesh"]:
    assert module.__file__.startswith(sys.argv[1]), module.__file__
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr == ""
    assert run.returncode == 0


def test_sdist_holds_what_a_packager_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "tests/conftest.py"}
    assert wanted <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_supported_python_is_said_once() -> None:
    """mypy and ruff check for the oldest Python that the package says it runs on."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = settings["project"]["requires-python"].removeprefix(">=")
    assert settings["tool"]["mypy"]["python_version"] == oldest
    assert settings["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
