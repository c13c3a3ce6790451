"""The fine-tunes of a mix, opened and compared with the base by what their files state: anatomy, words, prediction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.flow.schedule import unscaled_alpha_bar
from stages.system.refusal import Refused, format_value
from stages.teacher_files.assembly import Assembly
from stages.teacher_files.base import PART_WORDS, open_beside
from stages.teacher_files.checkpoint.expected import TEXT_PREFIX
from stages.teacher_files.checkpoint.layout import IGNORED
from stages.teacher_files.checkpoint.stored import LazyTensor
from stages.teacher_files.folder import broken_model, read_json
from stages.teacher_files.parts import Part
from stages.teacher_files.schedule import ABSOLUTE, RELATIVE, RESCALE_KEY
from stages.teacher_files.source import MixedModel, TeacherSource

WORD = "mix"
"""How messages begin."""
REMEDY = "a mix takes fine-tunes of its base alone: leave this one out"
MIXED_COMPONENTS = ("unet", "text_encoder")
SHAPELESS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "unet": {"attention_head_dim": 8, "norm_num_groups": 32},
    "text_encoder": {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
"""Entries of a config that change what is computed and no shape -> the libraries' values where they are left out."""


@dataclass(frozen=True)
class FineTune:
    """A model of a mix, whose mixed parts have the anatomy of the base's."""

    model: str
    """As it was named."""
    weight: float
    parts: Mapping[str, Part]

    @property
    def subject(self) -> str:
        """How messages about it begin."""
        return f"{WORD}: {self.model}"


def open_fine_tunes(source: TeacherSource, made: Assembly) -> list[FineTune]:
    """The fine-tunes of a source, their notes and files noted; raises `Refused` for one that does not fit the base."""
    return [_open(source, one, number, made) for number, one in enumerate(source.mix, start=1)]


def all_tensors(part: Part) -> dict[str, LazyTensor]:
    """The weights of a part by the names of stored files, also of layers that an earlier clip skip left out."""
    tensors = {**(part.tensors or {}), **part.skipped}
    kept = {name: value for name, value in tensors.items() if not IGNORED[part.component](name)}
    return {stored_name(part.component, name): value for name, value in kept.items()}


def stored_name(component: str, name: str) -> str:
    """The one name of a tensor: libraries write those of text encoders with and without a prefix."""
    return TEXT_PREFIX + name.removeprefix(TEXT_PREFIX) if component == "text_encoder" else name


def _open(source: TeacherSource, one: MixedModel, number: int, made: Assembly) -> FineTune:
    own = open_beside(one.model, made, WORD, REMEDY)
    subject = f"{WORD}: {one.model}"
    _check_prediction(subject, source, own, made)
    if own.folder is not None:
        _check_schedule(subject, own, made)
        _check_words(subject, own, made)
    parts = {component: own.part(component).with_tensors() for component in MIXED_COMPONENTS}
    for component, part in parts.items():
        _check_anatomy(subject, made.part(component).with_tensors(), part)
    if own.part("text_encoder") is made.part("text_encoder"):
        made.notes.append(f"{subject}: is a UNet alone, so the text encoder stays the base's")
    made.notes += own.notes
    _note_files(own, parts, number, made)
    return FineTune(one.model, one.weight, parts)


def _note_files(own: Assembly, parts: Mapping[str, Part], number: int, made: Assembly) -> None:
    """Note the files of a fine-tune, by its number in the mix and what they hold of it."""
    for file in own.sources:
        made.add_source(f"{WORD} {number}", file.path)
    for component, part in parts.items():
        for path in part.weight_files if own.folder is not None else ():
            made.add_source(f"{WORD} {number} {component}", path)


def _check_prediction(subject: str, source: TeacherSource, own: Assembly, made: Assembly) -> None:
    """Raise `Refused` where a fine-tune states another prediction than that of the base."""
    config = read_json(made.configs / "scheduler" / "scheduler_config.json")
    base = {
        "prediction_type": made.stated.get("prediction_type") or config.get("prediction_type") or "epsilon",
        "zero_terminal_snr": bool(made.stated.get("zero_terminal_snr", config.get(RESCALE_KEY))),
    }
    if source.prediction != "auto":
        base["prediction_type"] = source.prediction
    if source.zero_terminal_snr != "auto":
        base["zero_terminal_snr"] = source.zero_terminal_snr == "true"
    repair = ", or repair its scheduler_config.json" if own.folder is not None else ""
    for key, value in base.items():
        if (stated := own.stated.get(key)) is not None and stated != value:
            raise Refused(
                f"{subject}: its files state {key} {format_value(stated)}, the base has {value}, and such weights do "
                f"not add up - {REMEDY}{repair}"
            )


def _check_schedule(subject: str, own: Assembly, made: Assembly) -> None:
    """Raise `Refused` where a folder's schedule is another than the base's, so that one timestep means two noises."""
    schedules = [read_json(one.configs / "scheduler" / "scheduler_config.json") for one in (own, made)]
    alpha_bar, expected = (unscaled_alpha_bar(config) for config in schedules)
    if alpha_bar.shape != expected.shape or not torch.allclose(alpha_bar, expected, RELATIVE, ABSOLUTE):
        table = f"from {float(alpha_bar[0]):.5f} to {float(alpha_bar[-1]):.5f} in {len(alpha_bar)} steps"
        raise Refused(
            f"{subject}: its schedule (alphas_cumprod {table}) is not that of the base - {REMEDY}, or repair its "
            "scheduler_config.json"
        )


def _check_words(subject: str, own: Assembly, made: Assembly) -> None:
    """Raise `Refused` where a folder's tokenizer has other tokens than the base's, whose vectors cannot be mixed."""
    tokens, expected = (_tokens(one.part("tokenizer").files) for one in (own, made))
    if odd := sorted(token for token in tokens.keys() | expected.keys() if tokens.get(token) != expected.get(token)):
        kinds = f"{len(odd)} token{'s' * (len(odd) > 1)}, such as {format_value(odd[0])}"
        raise Refused(
            f"{subject}: its tokenizer and the base's differ in {kinds}, so their text encoders cannot be mixed - name "
            "the file of its UNet alone, which leaves the base's text encoder"
        )


def _tokens(files: Sequence[Path]) -> dict[str, int]:
    """Token -> number in the files of a tokenizer; raises `Refused` for files that hold none."""
    held = {file.name: file for file in files}
    tokens: Any
    more: dict[Any, Any]
    if file := held.get("tokenizer.json"):
        content = read_json(file)
        model, added = content.get("model"), content.get("added_tokens") or []
        tokens = model.get("vocab") if isinstance(model, Mapping) else None
        more = {one.get("content"): one.get("id") for one in added if isinstance(one, Mapping)}
    else:
        file = held["vocab.json"]
        tokens = read_json(file)
        config = read_json(held["tokenizer_config.json"]) if "tokenizer_config.json" in held else {}
        decoder = config.get("added_tokens_decoder") or {}
        more = read_json(held["added_tokens.json"]) if "added_tokens.json" in held else {}
        if isinstance(decoder, Mapping):
            entries = {key: one for key, one in decoder.items() if key.isdecimal() and isinstance(one, Mapping)}
            more |= {one.get("content"): int(key) for key, one in entries.items()}
    if not isinstance(tokens, Mapping) or not tokens:
        raise broken_model(f"{file} holds no tokens")
    return {str(token): number for token, number in {**tokens, **more}.items()}


def _check_anatomy(subject: str, base: Part, own: Part) -> None:
    """Raise `Refused` unless a part has the tensors of the base's, and computes the same with them."""
    where, word = f"{subject}: {own.component}", PART_WORDS[own.component]
    tensors, expected = all_tensors(own), all_tensors(base)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise Refused(f"{where}: {len(missing)} tensors of the base are not there, such as {missing[0]} - {REMEDY}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise Refused(f"{where}: {len(unknown)} tensors are not in the base, such as {unknown[0]} - {REMEDY}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"{list(tensors[name].shape)}, the base's is {list(tensor.shape)}"
            raise Refused(f"{where}: tensor {name} is {shapes} - {REMEDY}")
    for key, default in SHAPELESS_DEFAULTS[own.component].items():
        value, wanted = (part.config.get(key, default) for part in (own, base))
        if value != wanted:
            raise Refused(f"{where}: {key} is {format_value(value)}, the base's {word} has {wanted} - {REMEDY}")
