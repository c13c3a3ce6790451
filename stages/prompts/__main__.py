"""`sollune prompts show N|sample|stats`: look at prompts before a teacher is run on them."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from configs.arguments import path_argument
from configs.load import load, parse_common_options
from configs.values import Strict
from stages.prompts import Prompt, PromptSource, SymbolicSource, omission_lines, source_report, split_of
from stages.prompts.source import token_counts
from stages.system.ending import run_to_exit_code
from stages.system.refusal import Parser, Refused, format_value
from stages.system.storage.attached import attach_all

MAX_NUMBER, MAX_COUNT = 10**18, 10**7
"""Far beyond what is looked at."""


class Config(Strict):
    """Look at prompts; --config takes the source and the seed of its cache_teacher section."""

    model_config = ConfigDict(extra="ignore")  # the section has more settings than these

    prompts: PromptSource = Field(SymbolicSource(), description="where the sentences come from")
    seed: int = Field(0, description="seed of the prompts and of their pictures")


def show(args: argparse.Namespace, config: Config) -> None:
    """Print prompt number N, and with --tree how it was made."""
    prompt = next(config.prompts.iter_prompts(config.seed, args.number))
    _print_omissions(config.prompts, args.number + 1)
    print(prompt.text)
    print(f"class {prompt.class_name}, split {split_of(prompt.text)}, picture seed {prompt.seed}")
    if args.tree:
        for depth, (name, choice) in enumerate(prompt.derivation):
            print(f"{'   ' * depth}└─ {name}: {choice}")


def sample(args: argparse.Namespace, config: Config) -> None:
    """Print the first prompts with their classes."""
    for number, prompt in enumerate(islice(config.prompts.iter_prompts(config.seed), args.count)):
        print(f"{number:>6}  {prompt.text}  [{prompt.class_name}]")
    _print_omissions(config.prompts, args.count)


def stats(args: argparse.Namespace, config: Config) -> None:
    """Print what the first prompts cover, how long they are, and what is wrong with them."""
    prompts = list(islice(config.prompts.iter_prompts(config.seed), args.count))
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    print("\n".join(source_report(config.prompts, prompts, tokenizer).lines()))
    texts = [prompt.text for prompt in prompts]
    print(f"distinct   {len(set(texts))}")
    lengths = {"words": [len(text.split()) for text in texts]}
    if tokenizer is not None:
        lengths["tokens"] = token_counts(tokenizer, texts)
    for unit, counts in lengths.items():
        print(f"{unit:<11}mean {sum(counts) / len(counts):.1f}, longest {max(counts)}")
    print("\n".join(coverage(prompts)))


def _print_omissions(source: PromptSource, count: int) -> None:
    """Print to standard error which rows before prompt number `count` were left out."""
    for line in omission_lines(source.unusable_rows(count)):
        print(line, file=sys.stderr)


def coverage(prompts: Sequence[Prompt]) -> list[str]:
    """For the classes and each choice: how often it is made, among how many, and the most and least frequent."""
    choices: dict[str, Counter[str]] = {"class": Counter(prompt.class_name for prompt in prompts)}
    for name, choice in (item for prompt in prompts for item in prompt.derivation):
        choices.setdefault(name, Counter())[choice] += 1
    lines = [f"{'choice':<11}{'made':>6}{'of':>7}   most and least often"]
    for name, counts in choices.items():
        (often, most), (seldom, least) = counts.most_common()[0], counts.most_common()[-1]
        share = 100 * counts.total() / len(prompts)
        lines.append(f"{name:<11}{share:>5.0f}%{len(counts):>7}   {often} ({most}), {seldom} ({least})")
    return lines


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder; raises `Refused` for none, and for one without words."""
    from transformers import CLIPTokenizer

    inner = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    hint = "name a diffusers folder, or its tokenizer folder"
    if not (inner / "tokenizer_config.json").is_file():
        raise Refused(f"--tokenizer: {folder} holds no tokenizer - {hint}")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(inner), local_files_only=True)
        words = tokenizer.decode(tokenizer("a cat").input_ids, skip_special_tokens=True).split()
    except Exception as error:  # the library written in Rust raises nothing more special
        raise Refused(f"--tokenizer: {folder} cannot be read ({format_value(str(error))}) - {hint}") from error
    if words != ["a", "cat"]:
        raise Refused(f"--tokenizer: {folder} does not know words: 'a cat' comes back as {words} - {hint}")
    return tokenizer


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
    number, count = (partial(_parse_integer, *bounds) for bounds in ((0, MAX_NUMBER), (1, MAX_COUNT)))
    for name, command in COMMANDS.items():
        options = commands.add_parser(name, help=command.__doc__, description=command.__doc__, allow_abbrev=False)
        if name == "show":
            options.add_argument("number", type=number, metavar="N", help="the prompt's number, from 0")
            options.add_argument("--tree", action="store_true", help="print how it was made")
        else:
            default = 40 if name == "sample" else 2000
            options.add_argument(
                "--count", type=count, default=default, help=f"prompts to look at (default: {default})"
            )
        if name == "stats":
            options.add_argument(
                "--tokenizer", type=path_argument, metavar="FOLDER", help="model folder: lengths in its tokens"
            )
    args, rest = parser.parse_known_args(argv)
    common = parse_common_options(rest)
    config = load(Config, "cache_teacher", common.files, common.options, f"sollune prompts {args.command}")
    attach_all(config.model_dump())
    COMMANDS[args.command](args, config)
    return 0


def _parse_integer(minimum: int, maximum: int, text: str) -> int:
    digits = text.isdecimal() and len(text) <= len(str(maximum))
    if not digits or not minimum <= int(text) <= maximum:
        raise argparse.ArgumentTypeError(f"{format_value(text)} should be a number from {minimum} to {maximum}")
    return int(text)


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, sys.argv[1:]))
