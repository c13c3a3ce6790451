"""All prompt sources, their mixture, the prompts of a split, and the report on a list of prompts."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, JsonValue

from configs.values import Strict
from stages.prompts.grammar import GrammarSource
from stages.prompts.hub import HubSource
from stages.prompts.prompt import VALIDATION_ONE_IN, Prompt, Split, derived_seed, split_of
from stages.prompts.symbolic import SymbolicSource
from stages.prompts.table import FileSource, TableSource
from stages.system.refusal import Refused

SingleSource: TypeAlias = SymbolicSource | GrammarSource | FileSource | TableSource | HubSource
"""Every source but the mixture, distinguished by the field `source`: a new source is added here alone."""


class WeightedSource(Strict):
    """One source of a mixture."""

    weight: int = Field(1, ge=1, le=10_000, description="prompts from here, relative to the other parts")
    prompts: Annotated[SingleSource, Field(discriminator="source")]


class MixtureSource(Strict):
    """Prompts of several sources, interleaved as evenly as their weights allow."""

    source: Literal["mixture"] = Field("mixture", description="what kind of source")
    parts: tuple[WeightedSource, ...] = Field(min_length=1, description="list of {weight, prompts: {source, ...}}")

    def identity(self) -> str:
        """A digest of all that the prompts depend on."""
        parts = [f"{part.weight} {part.prompts.source} {part.prompts.identity()}" for part in self.parts]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def format_lines(self) -> list[str]:
        """How each part is read."""
        return [line for part in self.parts for line in part.prompts.format_lines()]

    def unusable_rows(self, prompt_count: int) -> dict[str, list[str]]:
        """The places of unusable rows of all parts, by reason."""
        faults: dict[str, list[str]] = {}
        for part, part_count in zip(self.parts, self._part_counts(prompt_count), strict=True):
            for fault, places in part.prompts.unusable_rows(part_count).items():
                faults.setdefault(fault, []).extend(places)
        return faults

    def iter_prompts(self, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompts start, start + 1, ...: number i is number j of part p, both a function of i and the weights."""
        order = self._part_order()
        iterators = [
            part.prompts.iter_prompts(derived_seed("mixture", seed, p), part_count)
            for p, (part, part_count) in enumerate(zip(self.parts, self._part_counts(start), strict=True))
        ]
        index = start
        while True:
            p = order[index % len(order)]
            prompt = next(iterators[p])
            part = ("part", f"{p + 1} of {len(self.parts)}: {self.parts[p].prompts.source}")
            yield Prompt(prompt.text, prompt.class_name, prompt.seed, (part, *prompt.derivation))
            index += 1

    def _part_order(self) -> tuple[int, ...]:
        """The part of each of the sum(weights) prompts of a round: always the one furthest behind its share."""
        weights = [part.weight for part in self.parts]
        credit, order = [0] * len(weights), []
        for _ in range(sum(weights)):
            credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
            order.append(credit.index(max(credit)))
            credit[order[-1]] -= sum(weights)
        return tuple(order)

    def _part_counts(self, count: int) -> list[int]:
        """How many of the first `count` prompts come from each part."""
        order = self._part_order()
        rounds, rest = divmod(count, len(order))
        return [rounds * part.weight + order[:rest].count(p) for p, part in enumerate(self.parts)]


PromptSource = Annotated[SingleSource | MixtureSource, Field(discriminator="source")]


def source_identity(source: PromptSource, seed: int) -> dict[str, JsonValue]:
    """What a list of prompts depends on, for a recipe."""
    return {"source": source.source, "sha256": source.identity(), "seed": seed}


def prompts(source: PromptSource, seed: int, split: Split, count: int) -> list[Prompt]:
    """The first `count` prompts of a split; a longer list begins with the shorter one.

    Raises `Refused` when the source has no sentence of that split (looked for among 1000 times as many).
    """
    chosen: list[Prompt] = []
    for tried, prompt in enumerate(source.iter_prompts(seed)):
        if len(chosen) == count:
            break
        if tried > 1000 * (count + VALIDATION_ONE_IN):
            raise Refused(f"prompts: {len(chosen)} of {count} {split} prompts found - the source has too few sentences")
        if split_of(prompt.text) == split:
            chosen.append(prompt)
    return chosen


@dataclass(frozen=True)
class SourceReport:
    """What is notable about a list of prompts; unusable rows are not in it, repeated and truncated prompts are."""

    prompts: int
    omitted: Mapping[str, Sequence[str]]
    """Reason -> places in the source."""
    repeated: Sequence[str]
    """Sentences that were in the list before; their pictures have seeds of their own."""
    truncated: Sequence[str]
    """Sentences whose end the teacher does not read."""
    max_tokens: int | None
    """Tokens that the teacher reads; None for an unknown tokenizer."""
    format_lines: Sequence[str]
    """How each file of the source was read."""

    def lines(self) -> list[str]:
        """One line, one more for each file that was read, and for each kind of notable prompt."""
        lines = [f"prompts: {self.prompts}", *(f"prompts: {line}" for line in self.format_lines)]
        lines += omission_lines(self.omitted)
        if self.repeated:
            lines.append(f"prompts: {len(self.repeated)} repeated, kept (the first: {self.repeated[0]!r})")
        return lines + _truncation_lines(list(map(repr, self.truncated)), self.max_tokens)


def source_report(source: PromptSource, prompts: Sequence[Prompt], tokenizer: Any = None) -> SourceReport:
    """The report on prompts taken from a source; lengths only where the teacher's tokenizer is known."""
    texts = [prompt.text for prompt in prompts]
    earlier: set[str] = set()
    repeated = [text for text in texts if text in earlier or earlier.add(text)]  # type: ignore[func-returns-value]
    omitted = source.unusable_rows(VALIDATION_ONE_IN * len(texts))
    max_tokens = tokenizer.model_max_length if tokenizer is not None else None
    truncated = _truncated_texts(tokenizer, texts)
    return SourceReport(len(texts), omitted, repeated, truncated, max_tokens, source.format_lines())


def omission_lines(omitted: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each reason why rows of a source were left out."""
    return [f"prompts: {len(places)} {fault}, left out (the first: {places[0]})" for fault, places in omitted.items()]


def truncation_lines(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[str]:
    """A line about the texts (place, text) whose end a model does not read; none where all is read, or unknown."""
    if tokenizer is None:
        return []
    truncated = set(_truncated_texts(tokenizer, [text for _, text in texts]))
    return _truncation_lines([place for place, text in texts if text in truncated], tokenizer.model_max_length)


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, begin and end included, nothing cut."""
    return [len(ids) for ids in tokenizer(list(texts), truncation=False).input_ids] if texts else []


def _truncated_texts(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """The texts with more tokens than a model reads; none where its tokenizer is not known."""
    if tokenizer is None:
        return []
    counts = token_counts(tokenizer, texts)
    return [text for text, count in zip(texts, counts, strict=True) if count > tokenizer.model_max_length]


def _truncation_lines(places: Sequence[str], max_tokens: int | None) -> list[str]:
    summary = f"prompts: {len(places)} longer than {max_tokens} tokens, cut there"
    return [f"{summary} (the first: {places[0]})"] if places else []
