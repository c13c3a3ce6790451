"""Laws of YAML as it may be written here: one reading, or a refusal with its line."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from configs.yaml_text import MAX_DEPTH, parse_yaml, read_yaml
from stages.system.refusal import Refused

PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc", "Co", "Cn"], exclude_characters="\ufeff\u2028\u2029"))
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(1 << 63), 1 << 63), st.floats(allow_nan=False), PLAIN,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(PLAIN, inner, max_size=3)),
)  # fmt: skip


def is_faulty(text: str) -> bool:
    return any("\u202a" <= letter <= "\u202e" or "\u2066" <= letter <= "\u2069" for letter in text)


@given(VALUES.filter(lambda value: not is_faulty(repr(value)) and not is_faulty(str(value))))
def test_what_the_library_writes_comes_back(value: object) -> None:
    written = yaml.safe_dump(value, allow_unicode=True)
    if not is_faulty(written):
        assert parse_yaml(written, "a") == value


def test_every_packaged_file_means_what_it_meant() -> None:
    files = [*Path("configs").rglob("*.yaml"), *Path("stages").rglob("*.yaml")]
    assert len(files) > 5
    for file in files:
        assert read_yaml(file, str(file), "") == yaml.safe_load(file.read_text())


def test_anchors_and_merges_serve_where_they_are_small() -> None:
    text = "base: &b {x: 1, y: 2}\none: {<<: *b, y: 3}\nlist: [*b, *b]\n"
    assert parse_yaml(text, "a") == yaml.safe_load(text)


def test_what_looks_like_a_date_is_text() -> None:
    assert parse_yaml("a: 2020-01-01\nb: 2020-13-45\n", "a") == {"a": "2020-01-01", "b": "2020-13-45"}


def test_nesting_ends_somewhere() -> None:
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "a") is not None
    with pytest.raises(Refused, match="nested more than"):
        parse_yaml("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "a")


@pytest.mark.parametrize(
    "text",
    ["1: a\n0x1: b", "'1': a\n1: b", "a: 1\n'a': 2", "a: {b: 1, b: 1}", "<<: {a: 1}\n<<: {b: 2}", "- {x: 1, x: 2}"],
)
def test_a_duplicate_key_is_refused_however_it_is_spelt(text: str) -> None:
    with pytest.raises(Refused, match=r"^a:\d+: .*is a duplicate key"):
        parse_yaml(text, "a")


@pytest.mark.parametrize(
    "text",
    [
        "a: !!int x", "a: !!float x", "a: !!bool x", 'a: !!int ""', "a: !!binary x", "a: !!set {x}", "!!omap [a: 1]",
        "a: !!timestamp 2020-13-45", "a: *b", "a: =", "? [a]\n: b", "yes: a", "null: a", "1.5: a", "%YAML 9.9\n--- a",
        "%YAML " + "9" * 5000 + ".1\n--- a", '"\\UFFFFFFFF"', '"\\x00"', "a: 1:30.5", "a: 0x" + "f" * 30, "a: <<", "\t",
    ],
)  # fmt: skip
def test_whatever_the_library_would_stumble_over_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(Refused, match=r"^a(:\d+)?: not good YAML: .* - ") as refusal:
        parse_yaml(text, "a")
    assert "\n" not in str(refusal.value)


def test_merges_that_double_each_time_are_counted_out() -> None:
    lines = ["a0: &a0 {x: 1}"] + [f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}" for i in range(40)]
    with pytest.raises(Refused, match="more than 200,000 values"):
        parse_yaml("\n".join(lines), "a")
