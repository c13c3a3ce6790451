"""Any source of prompts, and the prompts of a split."""

from typing import Annotated

from pydantic import Field, JsonValue

from configs.refusal import Refused
from stages.prompts.grammar import GrammarSource
from stages.prompts.hub import HubSource
from stages.prompts.mixture import MixtureSource
from stages.prompts.prompt import VALIDATION_ONE_IN, Prompt, Split, split_of
from stages.prompts.symbolic import SymbolicSource
from stages.prompts.table import TableSource
from stages.prompts.text_file import FileSource

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
    for tried, prompt in enumerate(source.endless(seed)):
        if len(found) == count:
            break
        if tried > 1000 * (count + VALIDATION_ONE_IN):
            raise Refused(f"prompts: {len(found)} of {count} {split} prompts found - the source has too few sentences")
        if split_of(prompt.text) == split:
            found.append(prompt)
    return found
