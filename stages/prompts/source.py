"""Several sources in fixed proportions.

Any source of prompts, and the prompts of a split.

What was wrong with a list of prompts: nothing is dropped without being told.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from configs.values import Strict
from stages.prompts.grammar import GrammarSource
from stages.prompts.hub import HubSource
from stages.prompts.prompt import VALIDATION_ONE_IN, Prompt, Split, derived_seed, split_of
from stages.prompts.symbolic import SymbolicSource
from stages.prompts.table import FileSource, TableSource
from stages.system.refusal import Refused

SingleSource = Annotated[
    SymbolicSource | GrammarSource | FileSource | TableSource | HubSource, Field(discriminator="source")
]


class WeightedSource(Strict):
    """One source of a mixture."""

    weight: int = Field(1, ge=1, le=10_000, description="prompts from here, relative to the other parts")
    prompts: SingleSource


class MixtureSource(Strict):
    """Prompts of several sources, interleaved as evenly as their weights allow."""

    source: Literal["mixture"] = Field("mixture", description="what kind of source")
    parts: tuple[WeightedSource, ...] = Field(min_length=1, description="list of {weight, prompts: {source, ...}}")

    def identity(self) -> str:
        """What the prompts depend on."""
        said = [f"{part.weight} {part.prompts.source} {part.prompts.identity()}" for part in self.parts]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()

    def format_lines(self) -> list[str]:
        """How each part is read."""
        return [line for part in self.parts for line in part.prompts.format_lines()]

    def unusable_rows(self, prompt_count: int) -> dict[str, list[str]]:
        """The places of unusable rows of all parts, by reason."""
        found: dict[str, list[str]] = {}
        for part, taken in zip(self.parts, self._part_counts(prompt_count), strict=True):
            for fault, places in part.prompts.unusable_rows(taken).items():
                found.setdefault(fault, []).extend(places)
        return found

    def iter_prompts(self, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompts start, start + 1, ...: number i is number j of part p, both a function of i and the weights."""
        turns = self.part_order()
        drawn = [
            part.prompts.iter_prompts(derived_seed("mixture", seed, p), taken)
            for p, (part, taken) in enumerate(zip(self.parts, self._part_counts(start), strict=True))
        ]
        index = start
        while True:
            p = turns[index % len(turns)]
            prompt = next(drawn[p])
            said = (("part", f"{p + 1} of {len(self.parts)}: {self.parts[p].prompts.source}"), *prompt.derivation)
            yield Prompt(prompt.text, prompt.class_name, prompt.seed, said)
            index += 1

    def part_order(self) -> tuple[int, ...]:
        """Whose turn it is in one round of sum(weights) prompts: always the part that is furthest behind its share."""
        weights = [part.weight for part in self.parts]
        credit, turns = [0] * len(weights), []
        for _ in range(sum(weights)):
            credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
            turns.append(credit.index(max(credit)))
            credit[turns[-1]] -= sum(weights)
        return tuple(turns)

    def _part_counts(self, count: int) -> list[int]:
        """How many of the first `count` prompts come from each part."""
        turns = self.part_order()
        rounds, rest = divmod(count, len(turns))
        return [rounds * part.weight + turns[:rest].count(p) for p, part in enumerate(self.parts)]


PromptSource = Annotated[
    SymbolicSource | GrammarSource | FileSource | TableSource | HubSource | MixtureSource,
    Field(discriminator="source"),
]


def source_identity(source: PromptSource, seed: int) -> dict[str, JsonValue]:
    """What a list of prompts depends on, for a recipe."""
    return {"source": source.source, "sha256": source.identity(), "seed": seed}


def prompts(source: PromptSource, seed: int, split: Split, count: int) -> list[Prompt]:
    """The first `count` prompts of a split; a longer list begins with the shorter one.

    Raises `Refused` when the source has no sentence of that split (looked for among 1000 times as many).
    """
    found: list[Prompt] = []
    for tried, prompt in enumerate(source.iter_prompts(seed)):
        if len(found) == count:
            break
        if tried > 1000 * (count + VALIDATION_ONE_IN):
            raise Refused(f"prompts: {len(found)} of {count} {split} prompts found - the source has too few sentences")
        if split_of(prompt.text) == split:
            found.append(prompt)
    return found


@dataclass(frozen=True)
class SourceReport:
    """Counts and first places; unusable rows were left out, the other prompts are there."""

    prompts: int
    omitted: Mapping[str, Sequence[str]]
    """Reason -> places in the source."""
    repeated: Sequence[str]
    """Sentences that had been asked before; their pictures have seeds of their own."""
    truncated: Sequence[str]
    """Sentences whose end the teacher does not read."""
    longest: int | None = None
    """Tokens that the teacher reads; none when it was not asked."""
    format_lines: Sequence[str] = ()
    """How each file of the source was read."""

    def lines(self) -> list[str]:
        """One line, one more for each file that was read, and for each thing that is not as it should be."""
        said = [f"prompts: {self.prompts}", *(f"prompts: {line}" for line in self.format_lines)]
        said += omission_lines(self.omitted)
        if self.repeated:
            said.append(f"prompts: {len(self.repeated)} said before, kept (the first: {self.repeated[0]!r})")
        if self.truncated:
            first = self.truncated[0]
            said.append(
                f"prompts: {len(self.truncated)} longer than {self.longest} tokens, cut there (the first: {first!r})"
            )
        return said


def source_report(source: PromptSource, prompts: Sequence[Prompt], tokenizer: Any = None) -> SourceReport:
    """What is to be said about prompts taken from a source; lengths only where the teacher's tokenizer is known."""
    texts = [prompt.text for prompt in prompts]
    seen: set[str] = set()
    repeated = [text for text in texts if text in seen or seen.add(text)]  # type: ignore[func-returns-value]
    longest = tokenizer.model_max_length if tokenizer is not None else None
    faults = source.unusable_rows(VALIDATION_ONE_IN * len(texts))
    return SourceReport(len(texts), faults, repeated, truncated_texts(tokenizer, texts), longest, source.format_lines())


def omission_lines(faults: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each reason why rows of a source were left out."""
    return [f"prompts: {len(places)} {fault}, left out (the first: {places[0]})" for fault, places in faults.items()]


def truncation_lines(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[str]:
    """A line about the texts (place, text) whose end a model does not read; none where all is read, or unknown."""
    long = set(truncated_texts(tokenizer, [text for _, text in texts]))
    places = [place for place, text in texts if text in long]
    if not places:
        return []
    return [
        f"prompts: {len(places)} longer than {tokenizer.model_max_length} tokens, cut there (the first: {places[0]})"
    ]


def truncated_texts(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """The texts with more tokens than a model reads; none where its tokenizer is not known."""
    if tokenizer is None:
        return []
    counts = token_counts(tokenizer, texts)
    return [text for text, count in zip(texts, counts, strict=True) if count > tokenizer.model_max_length]


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, begin and end included, nothing cut."""
    return [len(ids) for ids in tokenizer(list(texts), truncation=False).input_ids] if texts else []
