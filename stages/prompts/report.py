"""What was wrong with a list of prompts: nothing is dropped without being told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.prompts.prompt import VALIDATION_ONE_IN, Prompt
from stages.prompts.source import PromptSource


@dataclass(frozen=True)
class SourceReport:
    """Counts and first places; unusable rows were left out, the other prompts are there."""

    prompts: int
    left_out: Mapping[str, Sequence[str]]
    """Reason -> places in the source."""
    repeated: Sequence[str]
    """Sentences that had been asked before; their pictures have seeds of their own."""
    too_long: Sequence[str]
    """Sentences whose end the teacher does not read."""
    longest: int | None = None
    """Tokens that the teacher reads; none when it was not asked."""
    reading: Sequence[str] = ()
    """How each file of the source was read."""

    def lines(self) -> list[str]:
        """One line, one more for each file that was read, and for each thing that is not as it should be."""
        said = [f"prompts: {self.prompts}", *(f"prompts: {line}" for line in self.reading)]
        said += omission_lines(self.left_out)
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
    longest = tokenizer.model_max_length if tokenizer is not None else None
    faults = source.faults(VALIDATION_ONE_IN * len(texts))
    return SourceReport(len(texts), faults, repeated, too_long(tokenizer, texts), longest, source.reading())


def omission_lines(faults: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each reason why rows of a source were left out."""
    return [f"prompts: {len(places)} {fault}, left out (the first: {places[0]})" for fault, places in faults.items()]


def truncation_lines(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[str]:
    """A line about the texts (place, text) whose end a model does not read; none where all is read, or unknown."""
    long = set(too_long(tokenizer, [text for _, text in texts]))
    places = [place for place, text in texts if text in long]
    if not places:
        return []
    return [
        f"prompts: {len(places)} longer than {tokenizer.model_max_length} tokens, cut there (the first: {places[0]})"
    ]


def too_long(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """The texts with more tokens than a model reads; none where its tokenizer is not known."""
    if tokenizer is None:
        return []
    counts = token_counts(tokenizer, texts)
    return [text for text, count in zip(texts, counts, strict=True) if count > tokenizer.model_max_length]


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, begin and end included, nothing cut."""
    return [len(ids) for ids in tokenizer(list(texts), truncation=False).input_ids] if texts else []
