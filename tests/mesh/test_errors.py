"""The tree of errors: as drawn, caught by its root and by the builtins it promises."""

from __future__ import annotations

import copy
import inspect
import re

import pytest

from mesh import errors
from mesh.errors import MeshError, RemoteError

CLASSES = [thing for _, thing in inspect.getmembers(errors, inspect.isclass)]


def drawn() -> dict[str, tuple[str, str | None]]:
    """The tree in the module's docstring: name → (parent, builtin in brackets)."""
    tree: dict[str, tuple[str, str | None]] = {}
    at_depth: list[str] = ["MeshError"]
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"(?P<lead>[\s│]*[├└]── )(?P<name>\w+) *(\((?P<builtin>\w+)\))?", line)
        if found:
            depth = len(found["lead"]) // 4 - 1
            at_depth[depth:] = [found["name"]]
            tree[found["name"]] = (at_depth[depth - 1], found["builtin"])
    return tree


def defined() -> dict[str, tuple[str, str | None]]:
    """The tree as the classes have it."""
    tree: dict[str, tuple[str, str | None]] = {}
    for cls in CLASSES:
        if cls is not MeshError:
            parent, *builtins = cls.__bases__
            tree[cls.__name__] = (parent.__name__, builtins[0].__name__ if builtins else None)
    return tree


def test_the_tree_is_what_its_drawing_says() -> None:
    assert drawn() == defined()


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_caught_by_the_root(cls: type[Exception]) -> None:
    assert issubclass(cls, MeshError)


def test_a_timeout_is_caught_as_the_builtin_one() -> None:
    with pytest.raises(TimeoutError, match=r"^no message in time$"):
        raise errors.Timeout("no message in time")


def test_remote_error_tells_type_text_and_traceback() -> None:
    error = RemoteError("KeyError", "'id'", "Traceback …")
    assert str(error) == "KeyError: 'id'"
    assert (error.type, error.text, error.traceback) == ("KeyError", "'id'", "Traceback …")


def test_remote_error_survives_being_rebuilt() -> None:
    """As `copy` and process pools do it: an exception is made again from what it was made of."""
    error = RemoteError("KeyError", "'id'", "Traceback …")
    again = copy.copy(error)
    assert type(again) is RemoteError
    assert vars(again) == vars(error)
    assert str(again) == str(error)
