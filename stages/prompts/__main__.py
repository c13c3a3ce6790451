"""`sollune prompts show N|sample|stats`: look at prompts before a teacher is asked."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from configs.load import load, parse_common_options
from configs.values import Strict, path_argument
from stages.prompts import Prompt, PromptSource, SymbolicSource, omission_lines, source_report, split_of, token_counts
from stages.system.refusal import Parser, Refused, format_value

REFUSED = 2
MOST_NUMBER, MOST_COUNT = 10**18, 10**7
"""Far beyond what is looked at."""


class Config(Strict):
    """Look at prompts; --config takes the source and the seed of its cache_teacher section."""

    model_config = ConfigDict(extra="ignore")  # the section says much more than where prompts come from

    prompts: PromptSource = Field(SymbolicSource(), description="where the sentences come from")
    seed: int = Field(0, description="seed of the prompts and of their pictures")


def show(args: argparse.Namespace, config: Config) -> None:
    """Print prompt number N, and with --tree how it came about."""
    prompt = next(config.prompts.iter_prompts(config.seed, args.number))
    _print_omissions(config.prompts, args.number + 1)
    print(prompt.text)
    print(f"class {prompt.class_name}, split {split_of(prompt.text)}, picture seed {prompt.seed}")
    if args.tree:
        for depth, (name, said) in enumerate(prompt.derivation):
            print(f"{'   ' * depth}└─ {name}: {said}")


def sample(args: argparse.Namespace, config: Config) -> None:
    """Print the first prompts with their classes."""
    for number, prompt in enumerate(islice(config.prompts.iter_prompts(config.seed), args.count)):
        print(f"{number:>6}  {prompt.text}  [{prompt.class_name}]")
    _print_omissions(config.prompts, args.count)


def stats(args: argparse.Namespace, config: Config) -> None:
    """Print what the first prompts cover, how long they are, and what is wrong with them."""
    asked = list(islice(config.prompts.iter_prompts(config.seed), args.count))
    tokenizer = tokenizer_of(args.tokenizer) if args.tokenizer else None
    print("\n".join(source_report(config.prompts, asked, tokenizer).lines()))
    print(f"distinct   {len({prompt.text for prompt in asked})}")
    texts = [prompt.text for prompt in asked]
    _lengths("words", [len(text.split()) for text in texts])
    if tokenizer is not None:
        _lengths("tokens", token_counts(tokenizer, texts))
    print("\n".join(coverage(asked)))


def _print_omissions(source: PromptSource, count: int) -> None:
    """Say beside the prompts which rows before them were left out."""
    for line in omission_lines(source.unusable_rows(count)):
        print(line, file=sys.stderr)


def coverage(prompts: Sequence[Prompt]) -> list[str]:
    """For the classes and each choice: how often it is made, among how many, and the most and least frequent."""
    made: dict[str, Counter[str]] = {"class": Counter(prompt.class_name for prompt in prompts)}
    for prompt in prompts:
        for name, said in prompt.derivation:
            made.setdefault(name, Counter())[said] += 1
    lines = [f"{'choice':<11}{'made':>6}{'of':>7}   most and least often"]
    for name, counts in made.items():
        (often, most), (seldom, least) = counts.most_common()[0], counts.most_common()[-1]
        share = 100 * counts.total() / len(prompts)
        lines.append(f"{name:<11}{share:>5.0f}%{len(counts):>7}   {often} ({most}), {seldom} ({least})")
    return lines


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model's folder; raises `Refused` when there is none that knows words."""
    from transformers import CLIPTokenizer

    inner = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    way_out = "name a diffusers folder, or its tokenizer folder"
    if not (inner / "tokenizer_config.json").is_file():
        raise Refused(f"--tokenizer: {folder} holds no tokenizer - {way_out}")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(inner), local_files_only=True)
        known = tokenizer.decode(tokenizer("a cat").input_ids, skip_special_tokens=True).split()
    except Exception as error:  # the library written in Rust raises nothing more special
        raise Refused(f"--tokenizer: {folder} cannot be read ({format_value(str(error))}) - {way_out}") from error
    if known != ["a", "cat"]:
        raise Refused(f"--tokenizer: {folder} does not know words: 'a cat' comes back as {known} - {way_out}")
    return tokenizer


def _lengths(unit: str, counts: Sequence[int]) -> None:
    print(f"{unit:<11}mean {sum(counts) / len(counts):.1f}, longest {max(counts)}")


COMMANDS: dict[str, Callable[[argparse.Namespace, Config], None]] = {"show": show, "sample": sample, "stats": stats}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; raises `Refused` for bad input."""
    parser = Parser(
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
            words.add_argument(
                "--tokenizer", type=path_argument, metavar="FOLDER", help="model folder: lengths in its tokens"
            )
    parsed, rest = parser.parse_known_args(argv)
    asked = parse_common_options(rest)
    COMMANDS[parsed.command](
        parsed, load(Config, "cache_teacher", asked.files, asked.options, f"sollune prompts {parsed.command}")
    )
    return 0


def _number(word: str) -> int:
    return _parse_between(0, MOST_NUMBER, word)


def _count(word: str) -> int:
    return _parse_between(1, MOST_COUNT, word)


def _parse_between(least: int, most: int, word: str) -> int:
    digits = word.isdecimal() and len(word) <= len(str(most))
    if not digits or not least <= int(word) <= most:
        raise argparse.ArgumentTypeError(f"{format_value(word)} should be a number from {least} to {most}")
    return int(word)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as refusal:
        print(f"sollune: {refusal}", file=sys.stderr)
        sys.exit(REFUSED)
