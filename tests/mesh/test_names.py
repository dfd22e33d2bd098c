"""Channel names, patterns and node names: what is refused and why, and what matches what."""

from __future__ import annotations

import re
import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import InvalidName
from mesh.names import (
    check_name,
    check_node_name,
    check_pattern,
    is_name,
    is_pattern,
    is_printable,
    literal_prefix,
    matches,
    printable,
)

BAD_EVERYWHERE = {
    "": "must not be empty",
    "/a": "has an empty level (a leading, trailing or double '/')",
    "a/": "has an empty level (a leading, trailing or double '/')",
    "a//b": "has an empty level (a leading, trailing or double '/')",
    "/": "has an empty level (a leading, trailing or double '/')",
    "a\x00b": "has control characters",
    "a\nb": "has control characters",
    "a\x7f": "has control characters",
    "a\x9b2J": "has control characters",
    "a\u2028b": "has control characters",
    "a\u202eb": "has control characters",
    "a\u2066b": "has control characters",
    "a\ud800": "has control characters",
    "x" * 256: "of 256 bytes over the limit of 255",
    "é" * 128: "of 256 bytes over the limit of 255",
    "/".join("a" * 33): "of 33 levels over the limit of 32",
}
GOOD_NAMES = ["a", "sensors/kitchen/temp", "é/日本", "a b/c.d", "x" * 255, "/".join("a" * 32)]

levels = st.sampled_from(["a", "b", "ab"])
names = st.lists(levels, min_size=1, max_size=6).map("/".join)
patterns = st.lists(levels | st.sampled_from(["*", "**"]), min_size=1, max_size=6).map("/".join)


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_name_is_returned_as_it_is(name: str) -> None:
    assert check_name(name) == name
    assert check_pattern(name) == name
    assert is_name(name)
    assert is_pattern(name)


@pytest.mark.parametrize(("name", "why"), BAD_EVERYWHERE.items())
def test_bad_name_is_refused_with_the_rule_it_breaks(name: str, why: str) -> None:
    with pytest.raises(InvalidName) as name_refused:
        check_name(name)
    with pytest.raises(InvalidName) as pattern_refused:
        check_pattern(name)
    assert why in str(name_refused.value)
    assert str(name_refused.value).startswith("a channel name" if not name else "channel name")
    assert why in str(pattern_refused.value)
    assert not is_name(name)
    assert not is_pattern(name)


@pytest.mark.parametrize("name", ["*", "a/*", "a/**", "**/b", "a*"])
def test_name_with_a_wildcard_is_refused(name: str) -> None:
    with pytest.raises(InvalidName) as refused:
        check_name(name)
    assert str(refused.value) == f"channel name {name!r} has a wildcard; only patterns may"
    assert not is_name(name)


@pytest.mark.parametrize("pattern", ["*", "**", "a/*", "*/a/**", "**/b"])
def test_pattern_may_have_whole_level_wildcards(pattern: str) -> None:
    assert check_pattern(pattern) == pattern
    assert is_pattern(pattern)


@pytest.mark.parametrize("pattern", ["a*", "*a", "a/b*/c", "***", "a/****"])
def test_wildcard_inside_a_level_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidName, match="stand for whole levels"):
        check_pattern(pattern)
    assert not is_pattern(pattern)


@pytest.mark.parametrize("thing", [None, 1, b"a", ("a",), ["a"], {}])
def test_what_is_no_text_is_no_name(thing: object) -> None:
    assert not is_name(thing)
    assert not is_pattern(thing)
    with pytest.raises(InvalidName) as refused:
        check_node_name(thing)  # type: ignore[arg-type]
    assert str(refused.value) == f"name must be str, not {thing!r}"


@pytest.mark.parametrize("thing", [None, 1, b"a", ("a",)])
def test_checking_what_is_no_text_says_its_type(thing: object) -> None:
    with pytest.raises(InvalidName) as refused:
        check_name(thing)  # type: ignore[arg-type]
    assert str(refused.value) == f"a channel name must be str, not {type(thing).__name__}"


@pytest.mark.parametrize("name", ["camera-1", "Küche", "a/b", "*", "x" * 63])
def test_node_name_is_a_label_of_up_to_63_bytes(name: str) -> None:
    assert check_node_name(name) == name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "name '' is empty or has control characters"),
        ("a\tb", "name 'a\\tb' is empty or has control characters"),
        ("a\x85b", "name 'a\\x85b' is empty or has control characters"),
        ("a\u202eb", "name 'a\\u202eb' is empty or has control characters"),
        ("x" * 64, "name of 64 bytes over the limit of 63"),
        ("é" * 32, "name of 64 bytes over the limit of 63"),
    ],
)
def test_bad_node_name_is_refused_with_the_rule_it_breaks(name: str, text: str) -> None:
    with pytest.raises(InvalidName) as refused:
        check_node_name(name)
    assert str(refused.value) == text


@given(st.text() | st.text(st.characters(max_codepoint=0xFF)))
def test_text_of_strangers_is_shown_so_that_no_terminal_obeys_it(text: str) -> None:
    shown = printable(text)
    assert is_printable(shown)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", shown)
    assert is_printable(text) == (shown == text)


def test_scripts_of_the_world_are_printable() -> None:
    text = "Küche ☕ 厨房 مطبخ 👩‍🍳é"
    assert printable(text) == text


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/c", False),
        ("a/b", "a", False),
        ("*", "a", True),
        ("*", "a/b", False),
        ("a/*", "a", False),
        ("a/*", "a/b", True),
        ("a/*", "a/b/c", False),
        ("*/b", "a/b", True),
        ("**", "a", True),
        ("**", "a/b/c", True),
        ("a/**", "a", True),
        ("a/**", "a/b/c", True),
        ("a/**", "ab/c", False),
        ("**/c", "a/b/c", True),
        ("**/c", "c", True),
        ("**/c", "a/c/b", False),
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/b/b/c", True),
        ("a/**/c/**/e", "a/c/d/c/e", True),
        ("**/*", "a", True),
        ("*/**/*", "a", False),
        ("**/a/*/b", "a/a/x/a/y/b", True),
    ],
)
def test_wildcards_stand_for_one_level_or_any_number(
    pattern: str, name: str, expected: bool
) -> None:
    assert matches(pattern, name) is expected


def matches_by_definition(pattern: str, name: str) -> bool:
    """The definition, tried out in every way: what `matches` must agree with."""
    want, have = pattern.split("/"), name.split("/")

    @cache
    def fits(w: int, h: int) -> bool:
        if w == len(want):
            return h == len(have)
        if want[w] == "**":
            return fits(w + 1, h) or (h < len(have) and fits(w, h + 1))
        return h < len(have) and want[w] in ("*", have[h]) and fits(w + 1, h + 1)

    return fits(0, 0)


@given(pattern=patterns, name=names)
def test_matching_agrees_with_its_definition(pattern: str, name: str) -> None:
    assert matches(pattern, name) == matches_by_definition(pattern, name)


@given(pattern=patterns, name=names)
def test_what_matches_starts_with_the_literal_prefix(pattern: str, name: str) -> None:
    """A subscriber asks its peers for the prefix: it must not be narrower than the pattern."""
    prefix, more = literal_prefix(pattern)
    if matches(pattern, name):
        assert name == prefix or (more and (not prefix or name.startswith(f"{prefix}/")))


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [
        ("a/b", ("a/b", False)),
        ("a/*/c", ("a", True)),
        ("a/b/**", ("a/b", True)),
        ("**", ("", True)),
        ("*/a", ("", True)),
    ],
)
def test_literal_prefix_ends_before_the_first_wildcard(
    pattern: str, prefix: tuple[str, bool]
) -> None:
    assert literal_prefix(pattern) == prefix


def test_no_pattern_makes_matching_slow() -> None:
    """The worst that fits the limits: exponential in a matcher that tries every way."""
    pattern = check_pattern("/".join(["**", "a"] * 15 + ["**", "b"]))
    name = check_name("/".join(["a"] * 32))
    started = time.thread_time()
    for _ in range(100):
        assert not matches(pattern, name)
    assert time.thread_time() - started < 0.2
