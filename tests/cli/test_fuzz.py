"""A fuzz of the command line: whatever a file holds, a command succeeds or refuses it in one line; no file changes."""

import contextlib
import copy
import io
import json
import shutil
import signal
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stages import __main__ as cli

TEACHER = Path("stages/tiny/model")
SECONDS = 20
CONFIG = Path("configs/tiny.yaml").read_text()
CLASSES = Path("configs/classes/tiny.yaml").read_text()
GRAMMAR = Path("stages/tiny/grammar.yaml").read_text()
LEXICON = """
families: {animal: {weight: 2, groups: [{words: [fox, wolf/wolves, owl], tags: [wild]}]}}
slots:
  amount: [{words: [a]}, {words: [two], tags: [plural]}]
  look: [{words: [red, old], weight: 3}]
  place: [{words: [at home], never: [wild]}, {words: [in the wood], needs: [wild]}, {words: ["near {its} den"]}]
levels: {1: [{text: "{amount} {look} {subject} {place}"}, {text: "{place}, {amount} {look} {subject}", weight: 2}]}
"""
TABLES = {
    "l.txt": "star/red\ta red star\na heart\n\nring/blue\ta blue ring\n",
    "t.csv": 'text,kind\na star,x\n"a heart, or ""two""",y\n,z\n',
    "t.TSV": 'text\tkind\na star\tx\n"a heart"\ty\n',
    "t.jsonl": '{"text": "a star", "n": 1}\n\n{"text": "a \\u00e9 heart", "n": [1.5, null]}\n',
}
PIECES = [
    "\0", b"\xff", b"\xed\xa0\x80", "\u2028", "\x0b", "\x0c", "\x1b[31m", "\x85", "\u202e", "\ufeff", "\uffff", "\r",
    "\n", "\t", '"', "'", ",", ";", "|", ":", ": ", "- ", "[", "]", "{", "}", "[" * 2000, "{a: " * 200, "#", "&a ",
    "*a", "&a [*a]", "<<: ", "? ", "!!int x", "!x ", "---\n", "%YAML 9.9\n", "~", "~nobody", "1e999", ".nan", "-.inf",
    "9" * 5000, "0x" + "f" * 9000, "010", "1:30", "2020-13-45", "\\ud800", "\\u0000", "NaN", "null", "é", "😀",
    "x" * 200_000,
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 3, 1.5, -0.5, 10**40, float("inf"), float("nan"), "", " ", "x", "*", "[", "{}", "{",
    "{x!r:>9}", "~nobody/x", "/dev/zero", "a\x07b", "\ud800", "k" * 5000, [], [1], ["x"], [None], {}, {"x": 1}, {1: 2},
    [[["x"]]],
]  # fmt: skip
NAMES = "a.png b.PNG a.JPEG a.webp a.txt a.TXT A.txt b.txt a.png.txt c.txt .DS_Store ._a.png sub/a.png notes.md"
SMALL_VALUES = [None, True, 0, 1, -1, 3, 1.5, "", "x", [], [1], ["x"], {}, {"x": 1}]
"""For a teacher, whose sizes must not fill the memory."""


@pytest.fixture(scope="module")
def picture() -> bytes:
    """A small picture."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, format="PNG")
    return file.getvalue()


@st.composite
def edited_bytes(draw, text: str) -> bytes:
    """A text with a few pieces put in, taken out or doubled, perhaps in another encoding."""
    content = text.encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 0, 1, 2, 7, 40, 10_000])))
        piece = draw(st.sampled_from([*PIECES, content[start:end] * 2, b""]))
        content = content[:start] + (piece if isinstance(piece, bytes) else piece.encode()) + content[end:]
    encoding = draw(st.sampled_from(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"]))
    return content if encoding == "utf-8" else content.decode("utf-8", errors="replace").encode(encoding)


def places(value, path=()):
    """The path of every value inside of a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


@st.composite
def edited_values(draw, text: str, load=yaml.safe_load, values=VALUES):
    """The content of a YAML or JSON text with a few values replaced, left out or renamed."""
    content = copy.deepcopy(load(text))
    for _ in range(draw(st.integers(1, 2))):
        every = list(places(content))
        if not every:
            break
        *path, last = draw(st.sampled_from(every))
        here = content
        for step in path:
            here = here[step]
        edit = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "rename"]))
        if edit == "replace":
            here[last] = copy.deepcopy(draw(st.sampled_from(values)))
        else:
            value = here.pop(last)
            if edit == "rename" and isinstance(here, dict):
                here[draw(st.sampled_from(["x", "", 1, "name", "text", "train"]))] = value
    return content


def edited_yaml(text: str):
    """A YAML text, broken as text or as values."""
    values = edited_values(text).map(lambda content: yaml.safe_dump(content, sort_keys=False).encode())
    return st.one_of(edited_bytes(text), values)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def late(number, frame):
    """Raise where a command hangs."""
    raise AssertionError(f"hangs for {SECONDS} s")


def comes_to_an_end(words: list[str], folder: Path) -> None:
    """Assert that a command ends with 0, or with 2 and an error message, and changes no file of the folder."""
    before = snapshot(folder)
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    was = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(words)
    except SystemExit as left:
        code = left.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, was)
    out.flush()
    err.flush()
    lines = err.buffer.getvalue().decode().split("\n")[:-1]
    assert code in (0, 2), lines
    if code == 2:
        assert lines
        assert all(line.startswith(("sollune: ", "prompts: ")) for line in lines), lines
    assert snapshot(folder) == before


@contextlib.contextmanager
def folder_of(files: dict[str, bytes]):
    """A folder of these files."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        yield folder


def fuzz(examples: int):
    """The settings of a fuzz: the same examples each time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@fuzz(30)
@given(edited_yaml(CONFIG), st.sampled_from(["cache-teacher", "distill", "finetune-classes", "import", "prompts"]))
def test_a_configuration_is_read_or_refused(content: bytes, command: str) -> None:
    with folder_of({"c.yaml": content}) as folder:
        words = ["prompts", "sample", "--count", "3"] if command == "prompts" else [command, "--print-config"]
        comes_to_an_end([*words, "--config", str(folder / "c.yaml")], folder)


@fuzz(100)
@given(st.sampled_from(sorted(TABLES)).flatmap(lambda name: st.tuples(st.just(name), edited_bytes(TABLES[name]))))
def test_a_table_of_prompts_is_read_or_refused(table: tuple[str, bytes]) -> None:
    name, content = table
    with folder_of({name: content}) as folder:
        kind = "file" if name.endswith(".txt") else "table"
        source = ["--prompts.source", kind, "--prompts.path", str(folder / name)]
        comes_to_an_end(["prompts", "stats", "--count", "9", *source], folder)


@fuzz(20)
@given(st.data())
def test_a_parquet_file_is_read_or_refused(data) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a star", "a heart"] * 20, "n": list(range(40))}), file)
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with folder_of({"t.parquet": bytes(content)}) as folder:
        source = ["--prompts.source", "table", "--prompts.path", str(folder / "t.parquet")]
        comes_to_an_end(["prompts", "stats", "--count", "9", *source], folder)


@fuzz(25)
@given(
    st.dictionaries(
        st.sampled_from(NAMES.split()),
        st.one_of(st.just(None), edited_bytes("a zork on a tree\n")),
        max_size=5,
    ),
    st.booleans(),
)
def test_a_folder_of_captions_is_read_or_refused(picture: bytes, files: dict[str, bytes | None], caption: bool) -> None:
    texts = {name: picture if content is None else content for name, content in files.items()}
    with folder_of({f"own/{name}": content for name, content in texts.items()}) as folder:
        key = ", caption: a zork" if caption else ""
        (folder / "k.yaml").write_text(f"classes: [{{name: z, priority: top, images: {folder / 'own'}{key}}}]")
        comes_to_an_end(["classes", "show", str(folder / "k.yaml")], folder)


@fuzz(15)
@given(edited_yaml(CLASSES))
def test_a_class_file_is_read_or_refused(content: bytes) -> None:
    with folder_of({"k.yaml": content}) as folder:
        comes_to_an_end(["classes", "show", str(folder / "k.yaml"), "--config", "configs/tiny.yaml"], folder)


@fuzz(50)
@given(edited_yaml(GRAMMAR))
def test_a_grammar_produces_sentences_or_is_refused(content: bytes) -> None:
    with folder_of({"g.yaml": content}) as folder:
        source = ["--prompts.source", "grammar", "--prompts.grammar", str(folder / "g.yaml")]
        comes_to_an_end(["prompts", "stats", "--count", "40", *source], folder)


@fuzz(50)
@given(edited_yaml(LEXICON))
def test_a_lexicon_produces_sentences_or_is_refused(content: bytes) -> None:
    with folder_of({"x.yaml": content}) as folder:
        source = ["--prompts.lexicon", str(folder / "x.yaml"), "--prompts.complexity", "1"]
        comes_to_an_end(["prompts", "stats", "--count", "40", *source], folder)


# The teacher: of its JSON files, which stages.nets reads.


def teacher_files() -> list[str]:
    """The JSON files of the embedded teacher."""
    return sorted(str(path.relative_to(TEACHER)) for path in TEACHER.rglob("*.json"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the embedded teacher, whose files each example breaks and puts back."""
    return Path(shutil.copytree(TEACHER, tmp_path_factory.mktemp("fuzz") / "teacher"))


def edited_json(name: str):
    """A JSON file of the teacher, broken as text or as values."""
    text = (TEACHER / name).read_text()
    values = edited_values(text, json.loads, SMALL_VALUES).map(lambda content: json.dumps(content).encode())
    return st.tuples(st.just(name), st.one_of(edited_bytes(text), values))


@fuzz(6)
@given(st.sampled_from(teacher_files()).flatmap(edited_json))
def test_a_teacher_is_loaded_or_refused(teacher: Path, edit: tuple[str, bytes]) -> None:
    name, content = edit
    whole = (teacher / name).read_bytes()
    (teacher / name).write_bytes(content)
    try:
        words = ["--teacher", str(teacher), "--run", str(teacher.parent / "run"), "--count", "1"]
        words += ["--validation-count", "1", "--plan", "true", "--config", "configs/tiny.yaml"]
        comes_to_an_end(["cache-teacher", *words], teacher.parent)
    finally:
        (teacher / name).write_bytes(whole)
