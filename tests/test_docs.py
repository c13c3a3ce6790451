"""Laws of the pages: links lead somewhere, command lines parse, and marked blocks of Python run as they stand."""

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from stages import __main__ as program
from stages.prompts import __main__ as prompts_command
from stages.system.refusal import Refused

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + list((ROOT / "docs").glob("*.md"))
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

FENCE = re.compile(r"^\s*(`{3,}|~{3,})\s*(\S*)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")
TARGET = re.compile(r"\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\s*\[[^\]]+\]:\s*(\S+)|(?:src|href)=\"([^\"]+)\"")
ANCHOR = re.compile(r"(?:id|name)=\"([^\"]+)\"")
ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")
RUNNABLE = "# runnable"
ARGPARSE = ("ablate", "david", "report", "shards")
"""Commands that read their words by argparse; the others load a configuration, which `--print-config` shows."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its mark, the number of its first line, and its lines."""

    mark: str
    line: int
    lines: tuple[str, ...]

    @property
    def is_runnable(self) -> bool:
        """Whether the page marks it as runnable without changes."""
        return self.mark == "python" and bool(self.lines) and self.lines[0].strip() == RUNNABLE


@dataclass(frozen=True)
class Page:
    """A page, taken apart into fenced blocks and the numbered lines between them."""

    path: Path
    blocks: tuple[Block, ...]
    prose: tuple[tuple[int, str], ...]

    def anchors(self) -> set[str]:
        """The names that may follow `#` in a link to this page, as GitHub spells it."""
        counts: dict[str, int] = {}
        anchors = {name for _, line in self.prose for name in ANCHOR.findall(line)}
        for _, line in self.prose:
            if heading := HEADING.match(line):
                slug = slug_of(heading[1])
                anchors.add(f"{slug}-{counts[slug]}" if slug in counts else slug)
                counts[slug] = counts.get(slug, 0) + 1
        return anchors


@functools.cache
def read(path: Path) -> Page:
    """Take a page apart."""
    blocks: list[Block] = []
    prose: list[tuple[int, str]] = []
    fence, mark, first, lines = "", "", 0, list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        opening = FENCE.match(line)
        if not fence and opening:
            fence, mark, first, lines = opening[1], opening[2], number + 1, []
        elif fence and line.strip() == fence:
            blocks.append(Block(mark, first, tuple(lines)))
            fence = ""
        elif fence:
            lines.append(line)
        else:
            prose.append((number, line))
    assert not fence, f"{path}:{first}: a block that never ends"
    return Page(path, tuple(blocks), tuple(prose))


def slug_of(heading: str) -> str:
    """The anchor of a heading."""
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


# Links


def broken_links(page: Page) -> list[str]:
    """The links to files and headings that are not there; other sites are not visited."""
    faults = []
    for number, line in page.prose:
        for targets in TARGET.findall(re.sub(r"`[^`]*`", "", line)):
            target = next(filter(None, targets))
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            name, _, anchor = target.partition("#")
            path = page.path.parent / name if name else page.path
            if Path(name).is_absolute() or not path.exists():
                faults.append(f"{page.path}:{number}: {target} is not there")
            elif anchor and path.suffix == ".md" and anchor not in read(path.resolve()).anchors():
                faults.append(f"{page.path}:{number}: {target}: no such heading")
    return faults


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_and_anchor_leads_somewhere(page: Path) -> None:
    assert broken_links(read(page)) == []


PLACE = re.compile(r"`((?:configs|shards|stages|tests|benchmarks)/[\w./-]*)`")
NAMED = re.compile(r"((?:`[\w.]+`,? (?:and )?)+)in\s+`((?:configs|shards|stages)/[\w/]+\.py)`")


def absent_names(text: str, root: Path) -> list[str]:
    """Files of the program that a page names and that are not there, and names that are not in the file beside them."""
    faults = [f"{name} is not there" for name in PLACE.findall(text) if not (root / name).exists()]
    for names, file in NAMED.findall(text):
        code = (root / file).read_text() if (root / file).is_file() else ""
        faults += [
            f"{name} is not in {file}"
            for name in re.findall(r"\w+(?=`|\.)", names)
            if not re.search(rf"\b{name}\b", code)
        ]
    return faults


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_and_names_of_the_code_are_there(page: Path) -> None:
    assert absent_names(page.read_text(), ROOT) == []


def test_a_name_that_is_not_in_its_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "a.py").write_text("class Sampler:\n    def draw(self): ...\n")
    text = "See `stages/b.py`. `Sampler.draw`, `Field` in `stages/a.py`; `Sampler.solve` in\n`stages/a.py`."
    assert absent_names(text, tmp_path) == [
        "stages/b.py is not there",
        "Field is not in stages/a.py",
        "solve is not in stages/a.py",
    ]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_names_its_language(page: Path) -> None:
    assert [f"{page}:{block.line}" for block in read(page).blocks if not block.mark] == []


# Command lines


class Parsed(BaseException):
    """A command line was understood, and nothing of it is to be done."""


def command_lines(page: Page) -> Iterator[tuple[int, list[str]]]:
    """The commands of the blocks marked bash, as words, each with the number of its line."""
    for block in page.blocks:
        if block.mark != "bash":
            continue
        begun: tuple[int, str] | None = None
        for number, line in enumerate(block.lines, block.line):
            number, before = begun or (number, "")
            whole = before + line
            if whole.endswith("\\"):
                begun = number, whole[:-1] + " "
                continue
            begun = None
            for words in commands_in(whole):
                yield number, words


def commands_in(line: str) -> Iterator[list[str]]:
    """The commands of a line, parted at `&&`, `|` and their like, without comments and leading assignments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.commenters = "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word and set(word) <= set("|&;()<>"):
            while words and ASSIGNMENT.match(words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
        else:
            words.append(word)


def fault_of(words: Sequence[str]) -> str | None:
    """What is wrong with a command line; None where nothing is, or where it is none of ours."""
    match list(words):
        case ["make", *rest]:
            return fault_of_make(rest)
        case ["sollune" | ".venv/bin/sollune", *rest]:
            return fault_of_sollune(tuple(rest))
        case [".venv/bin/python", "-m", module, *rest] if module.startswith("benchmarks"):
            return fault_of_benchmark(module, rest)
    if "stages" in words and words[words.index("stages") - 1] == "-m":  # python, or a launcher
        return fault_of_sollune(tuple(words[words.index("stages") + 1 :]))
    return None


@functools.cache
def fault_of_sollune(words: tuple[str, ...]) -> str | None:
    """The program's own error for the arguments; no command runs."""
    name, *rest = words or ("",)
    if name in ("", "--help", "-h", "--version"):
        return None
    if name not in {command.name for command in program.COMMANDS}:
        return f"sollune {name}: no such command"
    shown = [] if name in (*ARGPARSE, "prompts") else ["--print-config"]
    with only_parsing():
        return complaint(lambda: program.main([name, *without_own_files(rest), *shown]))


def complaint(act: Callable[[], object]) -> str | None:
    """The error that a program prints for arguments that it refuses."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = act()
    except Parsed:
        return None
    except Refused as refusal:
        return str(refusal)
    except SystemExit as left:
        code = left.code
    return None if code in (0, None) else errors.getvalue() or f"exit code {code}"


def without_own_files(words: Sequence[str]) -> list[str]:
    """The words without the configurations that a reader is to write, which lie nowhere here."""
    kept: list[str] = []
    in_config = False
    for word in words:
        in_config = word == "--config" or (in_config and not word.startswith("-"))
        if not in_config or word == "--config" or word.startswith("configs/") or (ROOT / word).exists():
            kept.append(word)
    followed = [*kept[1:], "-"]
    return [word for word, after in zip(kept, followed, strict=True) if word != "--config" or not after.startswith("-")]


@contextlib.contextmanager
def only_parsing() -> Iterator[None]:
    """Let whatever reads its words by argparse end once they are understood."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
        parse(self, *args, **options)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse_args)
        for name in prompts_command.COMMANDS:
            patch.setitem(prompts_command.COMMANDS, name, lambda words, config: None)
        yield


def fault_of_make(words: Sequence[str]) -> str | None:
    """Whether targets and variables are the Makefile's, and whether a command understands its ARGS."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) \?=", makefile, re.MULTILINE))
    values: Mapping[str, str] = dict(word.split("=", 1) for word in words if ASSIGNMENT.match(word))
    named = [word for word in words if not ASSIGNMENT.match(word)]
    if unknown := [*(set(named) - targets), *(set(values) - variables)]:
        return f"make {unknown[0]}: no such target or variable"
    for target in named:
        if target in {command.name for command in program.COMMANDS}:
            files = values.get("CONFIG", "configs/tiny.yaml").split()
            own = {
                "ablate": (*values.get("STUDIES", "").split(), "--run", "runs/x", "--out", "runs/x/ablation"),
                "convert": (values.get("TEACHER", ""), "--base", values.get("BASE", ""), "--out", "runs/x"),
                "report": ("runs/x", "--out", "report.html"),
            }
            run = own.get(target, ("--run", "runs/x"))
            config = () if target in ARGPARSE else ("--config", *files)
            fault = fault_of_sollune((target, *run, *config, *shlex.split(values.get("ARGS", ""))))
            if fault:
                return fault
    return None


def fault_of_benchmark(module: str, words: Sequence[str]) -> str | None:
    """The error of a benchmark's own parser, or of the command that it passes arguments to."""
    if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        return f"{module}: no such benchmark"
    benchmark: Any = importlib.import_module(module)
    parse = argparse.ArgumentParser.parse_known_args
    passed_on: list[str] = []

    def parse_known_args(self: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
        _, rest = parse(self, *args, **options)
        passed_on.extend(rest)
        raise Parsed

    def parse_args(self: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
        _, rest = parse(self, *args, **options)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed

    if "argparse" not in vars(benchmark) and "options" not in vars(benchmark):
        return f"{module} takes no options" if words else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *words])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        fault = complaint(benchmark.main)
    if fault or not passed_on:
        return fault
    name = "finetune-classes" if hasattr(benchmark, "finetune_classes") else "distill"
    return fault_of_sollune((name, "--config", "configs/tiny.yaml", *passed_on))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_line_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    faults = [(number, fault_of(words)) for number, words in command_lines(read(page))]
    assert [f"{page}:{number}: {fault}" for number, fault in faults if fault] == []


# Blocks that run

RUN_ALL = """
import contextlib, io, json, sys, traceback
sys.path.insert(0, "")
failed = []
for name, source in json.load(sys.stdin):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, name, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed.append(traceback.format_exc())
sys.exit("\\n".join(failed) or 0)
"""


def failures(blocks: Sequence[tuple[str, str]], tmp_path: Path) -> str:
    """What goes wrong with these named sources, one after the other in one process, which imports torch once."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        cwd=ROOT,
        env=environment,
        input=json.dumps(list(blocks)),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr if done.returncode else ""


def test_every_runnable_block_runs_from_the_root(tmp_path: Path) -> None:
    blocks = [
        (f"{page.relative_to(ROOT)}:{block.line}", "\n".join(block.lines))
        for page in PAGES
        for block in read(page).blocks
        if block.is_runnable
    ]
    assert blocks
    assert failures(blocks, tmp_path) == ""


# The checks themselves can fail


def page_of(tmp_path: Path, text: str) -> Page:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    read.cache_clear()
    return read(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](gone.md)", "gone.md is not there"),
        ("# One thing\n[a](#another-thing)", "#another-thing: no such heading"),
        ("# One\n# One\n[a](#one-2)", "#one-2: no such heading"),
        ("[a]: gone.md", "gone.md is not there"),
        ("![a](/etc)", "/etc is not there"),
    ],
)
def test_a_broken_link_is_named(tmp_path: Path, text: str, fault: str) -> None:
    assert [line.partition(": ")[2] for line in broken_links(page_of(tmp_path, text))] == [fault]


def test_links_that_lead_somewhere_are_not(tmp_path: Path) -> None:
    text = "# A `b_c` of (d)\n# Two\n# Two\n[a](#a-b_c-of-d) [b](#two-1) [c](page.md#two) `[d](gone.md)`\n"
    text += "[e](https://example.org/gone) [f](.)\n```text\n[g](gone.md)\n```\n"
    assert broken_links(page_of(tmp_path, text)) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("make distil", "make distil: no such"),
        ("make distill RUNS=x", "make RUNS: no such"),
        ("make distill ARGS='--train.max-sample 3'", "did you mean"),
        ("sollune distil", "no such command"),
        ("sollune distill --config configs/tiny.yaml --train.batch-sizes 8", "did you mean"),
        (
            "OMP_NUM_THREADS=1 .venv/bin/sollune distill --config configs/tiny.yaml \\\n  --train.batch-size none",
            "batch",
        ),
        ("sollune evaluate runs/x --config configs/tiny.yaml --paired.prompt 3", "did you mean"),
        ("echo | sollune shards verify runs/x --depth", "--depth"),
        ("sollune prompts show seventeen", "seventeen"),
        ("sollune david show", "RUN"),
        ("accelerate launch -m stages distill --config configs/tiny.yaml --oops 1", "--oops"),
        (".venv/bin/python -m benchmarks.gone", "no such benchmark"),
        (".venv/bin/python -m benchmarks.faults --kills 3 --train.seed 3", "--train.seed"),
        (".venv/bin/python -m benchmarks.classes runs/x --train.batch-sizes 8", "did you mean"),
    ],
)
def test_a_command_line_that_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, fault: str
) -> None:
    monkeypatch.chdir(ROOT)
    *_, command = command_lines(page_of(tmp_path, f"```bash\n{line}\n```\n"))
    assert fault in (fault_of(command[1]) or "")


def test_commands_without_a_fault_have_none_and_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in program.COMMANDS:
        if command.kind == "configured":
            module = types.SimpleNamespace(
                Config=importlib.import_module(command.module).Config, run=lambda config: pytest.fail("it ran")
            )
            monkeypatch.setitem(sys.modules, command.module, module)
    monkeypatch.chdir(ROOT)
    fault_of_sollune.cache_clear()
    text = "```bash\nmake distill CONFIG='configs/sd15.yaml configs/cards/24gb.yaml'  # a comment\n"
    text += "sollune distill --config configs/tiny.yaml mine.yaml --train.seed 3 && make test\n```\n"
    assert [fault_of(words) for _, words in command_lines(page_of(tmp_path, text))] == [None, None, None]
    fault_of_sollune.cache_clear()


def test_a_block_that_fails_is_named_by_its_place(tmp_path: Path) -> None:
    message = failures([("a.md:3", "x = 1"), ("b.md:7", "x")], tmp_path)
    assert "b.md:7" in message
    assert "NameError" in message
    assert "a.md:3" not in message
