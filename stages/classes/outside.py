"""Prompts that no class owns: what has to stay as it was."""

from itertools import islice

from stages.classes.finding import LOOKED_AT, LOOKED_AT_PER_PROMPT, Owners
from stages.classes.spec import ClassFile
from stages.prompts import Prompt, PromptSource, Split, split_of

OUTSIDE = "(outside)"
"""Stands for them in tables."""


def outside_prompts(source: PromptSource, seed: int, split: Split, classes: ClassFile, count: int) -> list[Prompt]:
    """The first prompts outside all classes, `count` of them or as many as a long look finds."""
    owners, looked_at = Owners(classes), LOOKED_AT + LOOKED_AT_PER_PROMPT * count
    seen = islice(source.endless(seed), looked_at)
    outside = (prompt for prompt in seen if split_of(prompt.text) == split and owners.of(prompt) is None)
    return list(islice(outside, count))
