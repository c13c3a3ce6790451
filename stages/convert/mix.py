"""A mix of fine-tunes as the user writes it, `--mix A:0.6 B:0.4`, as a teacher made from the base teacher."""

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from configs.load import first_error
from stages.system.refusal import Refused, format_value
from stages.system.text import split_number
from stages.teacher_files.source import MixedModel, TeacherSource

DECIMALS = 12
"""To which what is left of the base is rounded, so that weights of the sum 1 leave nothing of it."""
EXAMPLE = "--mix A:0.6 B:0.4"


def mixed_teacher(base: TeacherSource, words: Sequence[str]) -> TeacherSource:
    """The base teacher plus the weighted differences of fine-tunes to it, of words MODEL:WEIGHT.

    A base that is itself a mix or has LoRAs is written out: base + sum of w (m - base) keeps 1 - sum of w of what was
    put into it. Raises `Refused` for a word without a model or a usable weight, and for a model that comes twice.
    """
    if not words:
        raise Refused(f"--mix: names no model - write {EXAMPLE}")
    added: dict[str, MixedModel] = {}
    for word in words:
        one = _parse_word(word)
        if added.setdefault(_place(one.model), one) is not one:
            raise Refused(f"--mix: {format_value(one.model)}: comes twice - write it once, with the sum of its weights")
    kept = round(1 - math.fsum(one.weight for one in added.values()), DECIMALS)
    mix = {_place(one.model): one.model_copy(update={"weight": one.weight * kept}) for one in base.mix}
    for place, one in added.items():
        own = mix.get(place)
        mix[place] = one.model_copy(update={"weight": round(one.weight + own.weight, DECIMALS)}) if own else one
    loras = tuple(lora.model_copy(update={"scale": lora.scale * kept}) for lora in base.loras) if kept else ()
    return base.model_copy(update={"mix": tuple(one for one in mix.values() if one.weight), "loras": loras})


def _place(model: str) -> str:
    """One name of a file or folder that can be written in several ways."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _parse_word(word: str) -> MixedModel:
    """The model and weight of one word: split at its last colon if a number follows, as a name may hold colons."""
    model, weight = split_number(word)
    if weight is None:
        _, colon, number = word.rpartition(":")
        reason = f"{format_value(number)} is no weight" if colon and not number.strip() else "has no weight"
        raise Refused(f"--mix: {format_value(word)}: {reason} - write the model, a colon and a number, as in {EXAMPLE}")
    content = {"model": model, "weight": weight}
    try:
        return MixedModel.model_validate(content)
    except ValidationError as error:
        _, problem = first_error(error, MixedModel, content)
        remedy = "" if " - " in problem else f" - write MODEL:WEIGHT, as in {EXAMPLE}"
        raise Refused(f"--mix: {format_value(word)}: {problem}{remedy}") from error
