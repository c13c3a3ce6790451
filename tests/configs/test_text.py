"""Laws of text that users write: read as UTF-8 or refused, lines end at line ends only, and nothing in it is hidden."""

import codecs
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.system.refusal import INVALID_CHARACTERS, Refused, format_value, invalid_character_reason
from stages.system.text import read_bytes, read_clean_text, read_text, split_lines


def read_bytes_as_text(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return read_text(path, "a", "b")


def test_a_byte_order_mark_is_dropped_and_every_line_end_is_a_line_feed(tmp_path: Path) -> None:
    assert read_bytes_as_text(tmp_path / "a", codecs.BOM_UTF8 + b"a\r\nb\rc\nd") == "a\nb\nc\nd"


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85"])
def test_a_line_ends_at_line_feeds_and_carriage_returns_and_nowhere_else(letter: str, tmp_path: Path) -> None:
    assert split_lines(read_bytes_as_text(tmp_path / "a", f"a{letter}b\nc\n".encode())) == [f"a{letter}b", "c"]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0\ufeff")))
def test_lines_put_together_are_the_text(text: str) -> None:
    lines = split_lines(text)
    assert "\n".join(lines) + "\n" * text.endswith("\n") == text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a star, naïve 星 🇩🇪 \u200d\u00ad\u200f\t\n", None),
        ("line\u2028separator", None),
        ("\udcff", "not UTF-8"),
        ("\ud800", "with lone surrogates"),
        *((letter, "with control characters") for letter in "\0\x07\x0b\x0c\x1b\x1f\x7f\x85\x9f"),
        *((letter, "with bidirectional controls") for letter in "\u202a\u202e\u2066\u2069"),
        ("a\ufeff", "with a byte-order mark inside"),
        *((letter, "with noncharacters") for letter in "\ufffe\uffff\ufdd0\U0001fffe\U0010ffff"),
    ],
)
def test_what_belongs_in_no_sentence_has_a_name(text: str, fault: str | None) -> None:
    assert invalid_character_reason(f"a {text} b") == fault
    assert fault is None or fault in INVALID_CHARACTERS


@given(st.text(st.characters()))
def test_a_value_is_shown_on_one_line_without_characters_that_a_terminal_obeys(text: str) -> None:
    assert format_value(text).isprintable()
    assert len(format_value(text)) <= 63


def test_a_file_that_grows_beyond_its_measure_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", "a", "b", max_bytes=5) == b"12345"
    with pytest.raises(Refused, match="more than 4 bytes"):
        read_bytes(tmp_path / "a", "a", "b", max_bytes=4)


def test_a_sparse_file_is_refused_by_its_measure_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.truncate(tmp_path / "a", 1 << 40)
    with pytest.raises(Refused, match="more than 1,073,741,824 bytes"):
        read_text(tmp_path / "a", "a", "b")


def test_an_error_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x\ny\nz\xfc\n")
    with pytest.raises(Refused, match=r"^a:3: is not UTF-8 \(byte FC\)"):
        read_clean_text(tmp_path / "a", "a", "b")
