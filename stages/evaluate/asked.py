"""What an exam of classes asks: prompts of each that no training saw, and prompts outside of all."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice

from stages.classes import OUTSIDE, ClassFile, class_prompts, outside_prompts
from stages.pictures import photographs
from stages.prompts import Prompt, PromptSource


def exam_prompts(source: PromptSource, seed: int, classes: ClassFile, pictures: int) -> Mapping[str, Sequence[Prompt]]:
    """So many prompts of each class, and outside of all where there are any; photographs are asked for what they show.

    Raises `Refused` naming a class that has too few.
    """
    asked = {spec.name: pictures if spec.is_painted else 0 for spec in classes.classes}
    found = class_prompts(source, seed, "validation", classes, asked)
    for spec in classes.classes:
        if not spec.is_painted:
            found[spec.name] = list(islice(cycle(photographs(spec)), pictures))
    outside = outside_prompts(source, seed, "validation", classes, pictures)
    return {**found, OUTSIDE: outside} if outside else found
