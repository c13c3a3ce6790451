"""Several sources in fixed proportions."""

import hashlib
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from configs.strict import Strict
from stages.prompts.grammar import GrammarSource
from stages.prompts.hub import HubSource
from stages.prompts.prompt import Prompt, derived_seed
from stages.prompts.symbolic import SymbolicSource
from stages.prompts.table import TableSource
from stages.prompts.text_file import FileSource

Simple = Annotated[SymbolicSource | GrammarSource | FileSource | TableSource | HubSource, Field(discriminator="source")]


class Part(Strict):
    """One source of a mixture."""

    weight: int = Field(1, ge=1, le=10_000, description="prompts from here, relative to the other parts")
    prompts: Simple


class MixtureSource(Strict):
    """Prompts of several sources, interleaved as evenly as their weights allow."""

    source: Literal["mixture"] = Field("mixture", description="what kind of source")
    parts: tuple[Part, ...] = Field(min_length=1, description="list of {weight, prompts: {source, ...}}")

    def identity(self) -> str:
        """What the prompts depend on."""
        said = [f"{part.weight} {part.prompts.source} {part.prompts.identity()}" for part in self.parts]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()

    def reading(self) -> list[str]:
        """How each part is read."""
        return [line for part in self.parts for line in part.prompts.reading()]

    def faults(self, among: int) -> dict[str, list[str]]:
        """The places of unusable rows of all parts, by reason."""
        found: dict[str, list[str]] = {}
        for part, taken in zip(self.parts, self._taken(among), strict=True):
            for fault, places in part.prompts.faults(taken).items():
                found.setdefault(fault, []).extend(places)
        return found

    def endless(self, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompts start, start + 1, ...: number i is number j of part p, both a function of i and the weights."""
        turns = self.turns()
        drawn = [
            part.prompts.endless(derived_seed("mixture", seed, p), taken)
            for p, (part, taken) in enumerate(zip(self.parts, self._taken(start), strict=True))
        ]
        index = start
        while True:
            p = turns[index % len(turns)]
            prompt = next(drawn[p])
            said = (("part", f"{p + 1} of {len(self.parts)}: {self.parts[p].prompts.source}"), *prompt.derivation)
            yield Prompt(prompt.text, prompt.class_name, prompt.seed, said)
            index += 1

    def turns(self) -> tuple[int, ...]:
        """Whose turn it is in one round of sum(weights) prompts: always the part that is furthest behind its share."""
        weights = [part.weight for part in self.parts]
        credit, turns = [0] * len(weights), []
        for _ in range(sum(weights)):
            credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
            turns.append(credit.index(max(credit)))
            credit[turns[-1]] -= sum(weights)
        return tuple(turns)

    def _taken(self, count: int) -> list[int]:
        """How many of the first `count` prompts come from each part."""
        turns = self.turns()
        rounds, rest = divmod(count, len(turns))
        return [rounds * part.weight + turns[:rest].count(p) for p, part in enumerate(self.parts)]
