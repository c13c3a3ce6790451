"""What was wrong with a list of prompts: nothing is dropped without being told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.prompts.prompt import VALIDATION_ONE_IN, Prompt
from stages.prompts.source import PromptSource


@dataclass(frozen=True)
class SourceReport:
    """Counts and first places; empty and undecodable rows were left out, the other prompts are there."""

    prompts: int
    left_out: Mapping[str, Sequence[str]]
    """Reason -> places in the source."""
    repeated: Sequence[str]
    """Sentences that had been asked before; their pictures have seeds of their own."""
    too_long: Sequence[str]
    """Sentences whose end the teacher does not read."""
    longest: int | None = None
    """Tokens that the teacher reads; none when it was not asked."""

    def lines(self) -> list[str]:
        """One line, and one more for each thing that is not as it should be."""
        said = [f"prompts: {self.prompts}"]
        for fault, places in self.left_out.items():
            said.append(f"prompts: {len(places)} {fault}, left out (the first: {places[0]})")
        if self.repeated:
            said.append(f"prompts: {len(self.repeated)} said before, kept (the first: {self.repeated[0]!r})")
        if self.too_long:
            first = self.too_long[0]
            said.append(
                f"prompts: {len(self.too_long)} longer than {self.longest} tokens, cut there (the first: {first!r})"
            )
        return said


def report(source: PromptSource, asked: Sequence[Prompt], tokenizer: Any = None) -> SourceReport:
    """What is to be said about prompts taken from a source; lengths only where the teacher's tokenizer is known."""
    texts = [prompt.text for prompt in asked]
    seen: set[str] = set()
    repeated = [text for text in texts if text in seen or seen.add(text)]  # type: ignore[func-returns-value]
    counts = token_counts(tokenizer, texts) if tokenizer is not None else []
    longest = tokenizer.model_max_length if tokenizer is not None else None
    too_long = [text for text, count in zip(texts, counts, strict=False) if longest is not None and count > longest]
    return SourceReport(len(texts), source.faults(VALIDATION_ONE_IN * len(texts)), repeated, too_long, longest)


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, begin and end included, nothing cut."""
    return [len(ids) for ids in tokenizer(list(texts), truncation=False).input_ids] if texts else []
