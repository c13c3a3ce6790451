"""`sollune prompts show N|sample|stats`: look at prompts before a teacher is asked."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from configs.load import load, request
from configs.refusal import Refused
from configs.strict import Strict
from stages.prompts import Prompt, PromptSource, SymbolicSource, report, split_of, token_counts

REFUSED = 2


class Config(Strict):
    """Look at prompts; --config takes the source and the seed of its cache_teacher section."""

    model_config = ConfigDict(extra="ignore")  # the section says much more than where prompts come from

    prompts: PromptSource = Field(SymbolicSource(), description="where the sentences come from")
    seed: int = Field(0, description="seed of the prompts and of their pictures")


def show(words: argparse.Namespace, config: Config) -> None:
    """Print prompt number N, and with --tree how it came about."""
    prompt = next(config.prompts.endless(config.seed, words.number))
    print(prompt.text)
    print(f"class {prompt.class_name}, split {split_of(prompt.text)}, picture seed {prompt.seed}")
    if words.tree:
        for depth, (name, said) in enumerate(prompt.derivation):
            print(f"{'   ' * depth}└─ {name}: {said}")


def sample(words: argparse.Namespace, config: Config) -> None:
    """Print the first prompts with their classes."""
    for number, prompt in enumerate(islice(config.prompts.endless(config.seed), words.count)):
        print(f"{number:>6}  {prompt.text}  [{prompt.class_name}]")


def stats(words: argparse.Namespace, config: Config) -> None:
    """Print what the first prompts cover, how long they are, and what is wrong with them."""
    asked = list(islice(config.prompts.endless(config.seed), words.count))
    tokenizer = tokenizer_of(words.tokenizer) if words.tokenizer else None
    print("\n".join(report(config.prompts, asked, tokenizer).lines()))
    print(f"distinct   {len({prompt.text for prompt in asked})}")
    texts = [prompt.text for prompt in asked]
    _lengths("words", [len(text.split()) for text in texts])
    if tokenizer is not None:
        _lengths("tokens", token_counts(tokenizer, texts))
    print("\n".join(coverage(asked)))


def coverage(asked: Sequence[Prompt]) -> list[str]:
    """For the classes and each choice: how often it is made, among how many, and the most and least frequent."""
    made: dict[str, Counter[str]] = {"class": Counter(prompt.class_name for prompt in asked)}
    for prompt in asked:
        for name, said in prompt.derivation:
            made.setdefault(name, Counter())[said] += 1
    lines = [f"{'choice':<11}{'made':>6}{'of':>7}   most and least often"]
    for name, counts in made.items():
        (often, most), (seldom, least) = counts.most_common()[0], counts.most_common()[-1]
        share = 100 * counts.total() / len(asked)
        lines.append(f"{name:<11}{share:>5.0f}%{len(counts):>7}   {often} ({most}), {seldom} ({least})")
    return lines


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model's folder; raises `Refused` when there is none."""
    from transformers import CLIPTokenizer

    inner = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if not (inner / "tokenizer_config.json").is_file():
        raise Refused(f"--tokenizer: {folder} holds no tokenizer - name a diffusers folder, or its tokenizer folder")
    return CLIPTokenizer.from_pretrained(str(inner))


def _lengths(unit: str, counts: Sequence[int]) -> None:
    print(f"{unit:<11}mean {sum(counts) / len(counts):.1f}, longest {max(counts)}")


COMMANDS: dict[str, Callable[[argparse.Namespace, Config], None]] = {"show": show, "sample": sample, "stats": stats}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; raises `Refused` for bad input."""
    parser = argparse.ArgumentParser(
        prog="sollune prompts",
        description="Look at prompts. --config FILE takes a cache_teacher section's source and seed; "
        "--prompts.source symbolic|file|..., --prompts.path and the like, and --seed lie over it.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="show|sample|stats")
    for name, command in COMMANDS.items():
        words = commands.add_parser(name, help=command.__doc__, description=command.__doc__, allow_abbrev=False)
        if name == "show":
            words.add_argument("number", type=_number, metavar="N", help="the prompt's number, from 0")
            words.add_argument("--tree", action="store_true", help="print how it came about")
        else:
            usual = 40 if name == "sample" else 2000
            words.add_argument("--count", type=_count, default=usual, help=f"prompts to look at (default: {usual})")
        if name == "stats":
            words.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="model folder: lengths in its tokens")
    parsed, rest = parser.parse_known_args(argv)
    asked = request(rest)
    COMMANDS[parsed.command](
        parsed, load(Config, "cache_teacher", asked.files, asked.options, f"sollune prompts {parsed.command}")
    )
    return 0


def _number(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word} is no number from 0 on")
    return int(word)


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is no number from 1 on")
    return int(word)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as refusal:
        print(f"sollune: {refusal}", file=sys.stderr)
        sys.exit(REFUSED)
