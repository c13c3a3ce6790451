"""Texts that are not what they seem, each refused in one line with nothing changed on the disk."""

import codecs
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

TINY = ["--config", "configs/tiny.yaml"]
GRAMMAR = "phrases: [{name: thing, words: [star, moon]}]\nclass_name: '{thing}'\n"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """A file of the test, whose folder is made."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(name: str, content: str | bytes, *named: str):
    """`prompts sample` of a text file."""

    def case(folder: Path):
        path = write(folder, name, content)
        return ["prompts", "sample", "--prompts.source", "file", "--prompts.path", str(path)], [name, *named]

    return case


def table(name: str, content: str | bytes, *named: str):
    """`prompts stats` of a table."""

    def case(folder: Path):
        path = write(folder, name, content)
        return ["prompts", "stats", "--prompts.source", "table", "--prompts.path", str(path)], [name, *named]

    return case


def parquet(columns: dict, *named: str):
    """`prompts sample` of a parquet file of these columns."""

    def case(folder: Path):
        pq.write_table(pa.table(columns), folder / "t.parquet")
        words = ["prompts", "sample", "--prompts.source", "table", "--prompts.path", str(folder / "t.parquet")]
        return words, ["t.parquet", *named]

    return case


def config(content: str | bytes, *named: str, command: tuple[str, ...] = ("cache-teacher",)):
    """A command with a configuration file."""

    def case(folder: Path):
        return [*command, "--config", str(write(folder, "c.yaml", content))], [*named]

    return case


def classes(content: str | bytes, *named: str):
    """`classes show` of a class file."""

    def case(folder: Path):
        return ["classes", "show", str(write(folder, "k.yaml", content))], ["k.yaml", *named]

    return case


def speech(kind: str, content: str | bytes, *named: str):
    """`prompts show` of a grammar or a lexicon."""

    def case(folder: Path):
        source = {"grammar": "grammar", "lexicon": "symbolic"}[kind]
        path = write(folder, f"{kind}.yaml", content)
        return ["prompts", "show", "3", "--prompts.source", source, f"--prompts.{kind}", str(path)], [*named]

    return case


def photographs(files: dict[str, str | bytes | None], *named: str, caption: bool = True):
    """`classes show` of a class of photographs: None is a picture."""

    def case(folder: Path):
        for name, content in files.items():
            path = write(folder, f"own/{name}", content or "")
            if content is None:
                Image.new("RGB", (8, 8), "red").save(path, format="PNG")
        key = ", caption: a zork" if caption else ""
        file = write(folder, "k.yaml", f"classes: [{{name: zorks, priority: top, images: {folder / 'own'}{key}}}]")
        return ["classes", "show", str(file)], [*named]

    return case


def sample(*words: str, named: tuple[str, ...] = ()):
    """`sample` of the embedded teacher."""
    return lambda folder: (["sample", "stages/tiny/model", *words], [*named])


def special(make, *named: str):
    """`prompts sample` of something in a file's place."""

    def case(folder: Path):
        path = folder / "lines.txt"
        make(path)
        return ["prompts", "sample", "--prompts.source", "file", "--prompts.path", str(path)], [*named]

    return case


def words(*line: str, named: tuple[str, ...] = ()):
    """Words alone."""
    return lambda folder: ([*line], [*named])


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
ROW = "text,kind\na star,x\n"
TABLE = {
    # Encodings and characters
    "UTF-16 as PowerShell writes it": lines("l.txt", codecs.BOM_UTF16_LE + "a cat\r\n".encode("utf-16-le"), "UTF-16"),
    "big-endian UTF-16": table("t.csv", codecs.BOM_UTF16_BE + ROW.encode("utf-16-be"), "UTF-16", "save it as UTF-8"),
    "UTF-32": lines("l.txt", codecs.BOM_UTF32_LE + "a cat\n".encode("utf-32-le"), "UTF-32"),
    "UTF-16 without a mark": lines("l.txt", "a cat\n".encode("utf-16-le"), "NUL", "save it as UTF-8"),
    "UTF-16 in a configuration": config("cache_teacher: {}".encode("utf-16"), "c.yaml", "UTF-16"),
    "UTF-16 in a class file": classes("classes: []".encode("utf-16"), "UTF-16"),
    "NUL in JSON lines": table("t.jsonl", b'{"text": "a"}\n\0\n', "t.jsonl:2", "NUL"),
    "nothing but Latin-1": lines("l.txt", "caf\xe9\n".encode("latin-1"), "l.txt:1 (byte E9)", "not UTF-8"),
    "nothing but control characters": lines("l.txt", "a \x07 cat\na\x0ccat\n", "2 with control characters", "U+0007"),
    "Latin-1 in a configuration": config("distill: {run: caf\xe9}".encode("latin-1"), "c.yaml:1", "byte E9"),
    "a control character in a configuration": config("distill:\n  run: a\x1bb\n", "c.yaml:2", "U+001B"),
    "an escaped one": config('distill:\n  run: "a\\x1bb"\n', "c.yaml:2", "U+001B"),
    "an escaped surrogate": classes('classes: [{name: "\\ud800", pattern: a, priority: top}]', "U+D800"),
    "a line separator in YAML": config("distill: {run: a}\u2028", "c.yaml:1", "U+2028"),
    "reversed text in a class": classes("classes: [{name: a\u202eb, pattern: a, priority: top}]", "U+202E"),
    # Lines with classes
    "nothing but a class": lines("l.txt", "star\t\n", "with a class and no sentence", "l.txt:1"),
    "nothing but two tabs": lines("l.txt", "star\tred\ta red star\n", "with two tabs"),
    # CSV
    "a quote that is never closed": table("t.csv", ROW + '"a cat,y\nan owl,z\n', "t.csv:3", "never closed"),
    "a quote in the wrong place": table("t.csv", ROW + '"a "big" cat",y\n', "t.csv:3", "quote"),
    "semicolons": table("t.csv", "kind;text\nx;a star\n", "semicolons", "commas"),
    "tabs in a csv": table("t.csv", "kind\ttext\nx\ta star\n", "tabs"),
    "commas in a tsv of capitals": table("t.TSV", "kind,text\nx,a star\n", "commas", "tabs"),
    "a duplicate column": table("t.csv", "text,text\na,b\n", "stands twice"),
    "no head": table("t.csv", "\na star\n", "t.csv:1", "no head"),
    "an empty table": table("t.csv", "", "no head"),
    "nothing but rows of too many cells": table("t.csv", "text\na cat, asleep\n", "more cells", "t.csv:2"),
    "a cell without an end": table("t.csv", ROW + '"' + "a cat\n" * 30_000, "t.csv:3", "131,072"),
    # JSON lines
    "JSON of absurd depth": table("t.jsonl", "[" * 100_000, "t.jsonl:1", "nested too deep"),
    "JSON of absurd digits": table("t.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}", "5000 digits"),
    "NaN": table("t.jsonl", '{"text": NaN}', "NaN"),
    "a duplicate JSON key": table("t.jsonl", '{"text": "a", "text": "b"}', "'text' is a duplicate key"),
    "a JSON list": table("t.jsonl", '["a"]', "should be a JSON object"),
    "nothing but escaped controls": table("t.jsonl", '{"text": "a\\u0000b"}', "U+0000"),
    # Parquet
    "parquet of numbers": parquet({"text": [1, 2]}, "text = 1"),
    "parquet of lists": parquet({"text": [["a"]]}, "should be text"),
    "parquet without the column": parquet({"txt": ["a"]}, "did you mean txt"),
    "no parquet": table("t.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "not a good parquet file"),
    "a pipe of parquet": lambda folder: (
        os.mkfifo(folder / "t.parquet"),
        ["prompts", "sample", "--prompts.source", "table", "--prompts.path", str(folder / "t.parquet")],
        ["t.parquet", "a pipe"],
    )[1:],
    # YAML
    "YAML of absurd depth": config("distill: " + "[" * 5000, "c.yaml:1", "nested"),
    "YAML of absurd digits": config("distill:\n  seed: " + "9" * 5000, "c.yaml:2"),
    "YAML of hexadecimal digits": config("distill: {seed: 0x" + "f" * 20_000 + "}", "c.yaml:1"),
    "a billion laughs": config(LAUGHS, "c.yaml", "values"),
    "an alias within itself": classes("classes: &a [*a]", "*a", "k.yaml:1"),
    "an octal number": config("cache_teacher: {count: 010}", "010", "several numbers"),
    "a number to the base of 60": config("cache_teacher: {count: 1:30}", "1:30"),
    "a key that is no word": config("distill: {no: 3}", "no", "in quotes"),
    "an unknown tag": config("distill: !!python/object:os.system {}", "tag"),
    "two documents": config("distill: {}\n---\ndistill: {}\n", "c.yaml:2"),
    "a tab": config("distill:\n\trun: a\n", "c.yaml:2"),
    "an escape of no character": config('distill: {run: "\\U00FFFFFF"}', "c.yaml"),
    "a duplicate key in a class file": classes("classes: []\nclasses: []\n", "k.yaml:2", "duplicate key"),
    "a duplicate key in a grammar": speech("grammar", GRAMMAR + "class_name: x\n", "grammar.yaml:3", "duplicate key"),
    "a duplicate key in a lexicon": speech("lexicon", "slots: {}\nslots: {}\n", "lexicon.yaml:2", "duplicate key"),
    "an absurd list of classes on the command line": words(
        "prompts", "sample", "--prompts.source", "mixture", "--prompts.parts", "[" * 300, named=("--prompts.parts",)
    ),
    # Grammars and lexicons that produce no sentence
    "a grammar that forbids all": speech("grammar", GRAMMAR + "never: [{thing: star}, {thing: moon}]\n", "never"),
    "a grammar without its phrase": speech("grammar", GRAMMAR.replace("{thing}", "{thin}"), "did you mean thing"),
    "a grammar of an empty word": speech("grammar", GRAMMAR.replace("moon", "''"), "phrases.0.words.1"),
    "a grammar of two braces": speech("grammar", GRAMMAR.replace("words", "text: '{} {}', words"), "once"),
    "a lexicon that is a list": speech("lexicon", "[1, 2]", "lexicon.yaml"),
    # Photographs
    "a caption in UTF-16": photographs({"a.png": None, "a.txt": "a zork".encode("utf-16")}, "a.txt", "UTF-16"),
    "a caption with a control character": photographs({"a.png": None, "a.txt": "a \x08zork"}, "a.txt:1", "U+0008"),
    "a caption with two endings": photographs({"a.png": None, "a.png.txt": "a zork"}, "a.png.txt", "a.txt"),
    "a caption in capitals": photographs({"a.png": None, "A.txt": "a zork"}, "A.txt", "that of a.png is named a.txt"),
    "a caption of nothing": photographs({"a.png": None, "b.txt": "a zork"}, "b.txt", "without a picture"),
    "one caption of two pictures": photographs({"a.png": None, "a.PNG": None, "a.txt": "z"}, "a.PNG and a.png"),
    "two captions of one picture": photographs({"a.png": None, "a.TXT": "z", "a.txt": "z"}, "another caption"),
    "a folder among pictures": photographs({"a.png": None, "more/b.png": None}, "more", "move it out"),
    "a caption with nothing but its mark": photographs({"a.png": None, "a.txt": codecs.BOM_UTF8}, "is empty"),
    # What stands in a file's place
    "a pipe": special(os.mkfifo, "lines.txt", "a pipe"),
    "a folder": special(Path.mkdir, "lines.txt", "a folder"),
    "a device": special(lambda path: path.symlink_to("/dev/zero"), "lines.txt", "a device"),
    "a link to nothing": special(lambda path: path.symlink_to("gone.txt"), "lines.txt", "gone.txt"),
    "an endless device as a configuration": words("distill", "--config", "/dev/zero", named=("/dev/zero", "device")),
    "a name of absurd length": words("classes", "show", "k" * 5000, named=("classes", "255 bytes")),
    # Homes
    "the home of an unknown user": words("distill", "--run", "~no-such-user/x", named=("distill.run", "no-such-user")),
    "a teacher of an unknown user": words(
        "cache-teacher", *TINY, "--teacher", "~no-such-user/x", named=("teacher", "no-such-user")
    ),
    "a configuration of an unknown user": words("distill", "--config", "~no-such-user/c.yaml", named=("no-such-user",)),
    # Numbers and sentences of `sample`
    "infinite guidance": sample("a star", "--guidance", "inf", named=("guidance", "finite")),
    "no number for a shift": sample("a star", "--shift", "nan", named=("shift", "nan")),
    "guidance beyond measure": sample("a star", "--steps", "2", "--guidance", "1e300", named=("1e+300", "not finite")),
    "a seed beyond measure": sample("a star", "--seeds", "9" * 40, named=("seeds", "64 bits")),
    "no steps": sample("a star", "--steps", "0", named=("steps = 0",)),
    "steps beyond measure": sample("a star", "--steps", "9" * 12, named=("steps",)),
    "an empty sentence": sample("", named=("empty sentence",)),
    "a sentence of bytes": sample("caf\udce9", named=("byte E9",)),
    "a sentence with a control character": sample("a star", "a\x1b[31m", named=("U+001B",)),
    "infinite learning": words("distill", *TINY, "--train.optimizer.learning-rate", "inf", named=("learning_rate",)),
    "an infinite gate in YAML": config(
        "evaluate: {run: r, prompts: {source: symbolic}, gates: {velocity_error: .inf}}",
        "velocity_error", "finite", command=("evaluate",),
    ),
    # Words of `prompts`
    "no command": words("prompts", named=("prompts",)),
    "a number below nothing": words("prompts", "show", "-1", named=("-1",)),
    "a count beyond measure": words("prompts", "sample", "--count", "9" * 30, named=("--count",)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_broken_texts_are_refused(name, refused, tmp_path):
    words, named = TABLE[name](tmp_path)
    refused(words, *named)


def test_a_broken_table_stops_the_teacher_before_anything_is_written(refused, tmp_path):
    path = write(tmp_path, "t.csv", 'text\n"a cat\n')
    source = ["--prompts.source", "table", "--prompts.path", str(path)]
    refused(["cache-teacher", *TINY, "--run", str(tmp_path / "run"), *source], "t.csv:2")


def test_broken_lines_stop_a_sheet_of_pictures(refused, tmp_path):
    path = write(tmp_path, "l.txt", json.dumps({"a": 1}).encode("utf-16"))
    refused(
        ["sample", "stages/tiny/model", "--prompts", str(path), "--out", str(tmp_path / "s.png")], "l.txt", "UTF-16"
    )
