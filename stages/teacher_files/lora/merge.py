"""LoRA files merged into the weights of a teacher, tensor by tensor, so that no model is held twice.

Hu et al. 2021 (arXiv:2106.09685): W becomes W + scale * (alpha / rank) * up @ down. LoCon does the same to a
convolution: `down` has its kernel and `up` is 1x1. With a `mid` (Tucker's decomposition) `down` is 1x1 too, and the
kernel is that of `mid`.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stages.system.refusal import Refused, escape_unprintable, format_value
from stages.teacher_files.checkpoint.stored import TensorFile
from stages.teacher_files.lora.names import Role, layer_spellings, other_method, other_model, parse_key
from stages.teacher_files.lora.settings import AdapterSettings, adapter_settings
from stages.teacher_files.parts import open_tensor_source
from stages.teacher_files.source import LoraFile

OTHER_REMEDY = "take a LoRA that was made for this kind of model"
DAMAGE_REMEDY = "fetch the file again"
PAIR: tuple[Role, Role] = ("down", "up")
ROLES: tuple[Role, ...] = (*PAIR, "mid")
RAW_PEFT_PREFIX = "base_model.model."
MAX_SHOWN_KEY = 160
"""The longest key of an SD-1.x model has about 110 characters."""
LARGE_DIFFERENCE = 1e30
"""A weight is far smaller, and fp32 ends at 3e38."""
PLAIN_REMEDY = "take a plain LoRA, or merge it with the program that made it and name the merged model"
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LowRankPair:
    """The difference that one file makes to one weight."""

    file: TensorFile
    keys: Mapping[Role, str]
    """Role -> key in the file; `down` and `up` are there."""
    factor: float
    """scale * alpha / rank."""

    def difference(self, shape: Sequence[int]) -> Tensor:
        """The difference, of a weight's shape, fp32."""
        down, up = (self.file.tensors[self.keys[role]].read().float().flatten(1) for role in PAIR)
        if "mid" not in self.keys:
            product = up @ down
        else:
            mid = self.file.tensors[self.keys["mid"]].read().float()
            product = torch.einsum("or,rsk,si->oik", up, mid.reshape(*mid.shape[:2], -1), down)
        return (self.factor * product).reshape(*shape)


@dataclass(frozen=True)
class LoraMerge:
    """LoRA files that fit a model, in the order in which they are merged."""

    pairs: Mapping[str, Sequence[LowRankPair]]
    """Weight `<component>.<name>` -> its differences."""

    @property
    def components(self) -> frozenset[str]:
        """The parts of the model that are changed, which become fp32."""
        return frozenset(key.partition(".")[0] for key in self.pairs)

    def scaled(self, factor: float) -> "LoraMerge":
        """The same with every difference times a factor."""
        pairs = {key: [replace(pair, factor=factor * pair.factor) for pair in own] for key, own in self.pairs.items()}
        return LoraMerge(pairs)

    def merged(self, key: str, weight: Tensor) -> Tensor:
        """The weight with its differences, fp32; of a component that is not changed the weight itself."""
        if key.partition(".")[0] not in self.components or not weight.is_floating_point():
            return weight
        total = weight.float()
        for pair in self.pairs.get(key, ()):
            total = total + pair.difference(weight.shape)
        return total


def open_loras(loras: Sequence[LoraFile], shapes: Shapes, layers_per_block: int) -> LoraMerge:
    """Read and check LoRA files for a model whose tensors `<component>.<diffusers' name>` have these shapes.

    `layers_per_block` is the UNet's. Only UNet and text encoder count. Every tensor is read once, so that nothing is
    left to refuse later. Raises `Refused` for a file that is not whole or holds something else than
    low-rank pairs, and for a key that finds no place or whose shape does not fit, with the file and the key.
    """
    targets = {key: shape for key, shape in shapes.items() if _takes_a_pair(key, shape)}
    spellings = layer_spellings(targets, layers_per_block)
    pairs: defaultdict[str, list[LowRankPair]] = defaultdict(list)
    for lora in loras:
        for key, pair in _read_pairs(lora, spellings, targets).items():
            pairs[key].append(pair)
    return LoraMerge(dict(pairs))


def _takes_a_pair(key: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the weight of a linear layer or a convolution; embedding tables are neither."""
    is_part = key.startswith(("unet.", "text_encoder."))
    return is_part and key.endswith(".weight") and len(shape) in (2, 4) and ".embeddings." not in key


def _read_pairs(lora: LoraFile, spellings: Mapping[str, str], targets: Shapes) -> dict[str, LowRankPair]:
    """Weight -> its pair in one file."""
    where = f"lora: {lora.file}"
    file = open_tensor_source(Path(lora.file), where, "name a LoRA file that is whole")
    _refuse_other_content(file)
    settings = adapter_settings(file)
    layers: dict[str, str] = {}
    pairs: dict[str, LowRankPair] = {}
    for layer, keys in _keys_by_layer(file).items():
        first = _shown(next(keys[role] for role in (*ROLES, "alpha") if role in keys))
        weight = spellings.get(layer)
        if weight is None:
            model = other_model(_shapes(file), file.metadata)
            raise Refused(f"{where}: {first} finds no place in this model{model} - {OTHER_REMEDY}")
        if weight in layers:
            raise Refused(f"{where}: {layer} and {layers[weight]} are one layer by two names - remove one of them")
        layers[weight] = layer
        if lacking := next((role for role in PAIR if role not in keys), None):
            raise Refused(f"{where}: {first} has no {lacking} beside it, and a pair is down and up - {DAMAGE_REMEDY}")
        rank = _check_shapes(file, keys, weight, targets[weight])
        largest = _largest_value(file, keys)
        ratio = _alpha_over_rank(file, keys, rank, settings.get(weight.partition(".")[0]), weight)
        pairs[weight] = LowRankPair(file, keys, lora.scale * ratio)
        if not abs(lora.scale * ratio) * rank**2 * largest <= LARGE_DIFFERENCE:
            raise Refused(
                f"{where}: {first} changes {weight} beyond all numbers at scale {lora.scale:g} (alpha / rank is "
                f"{ratio:g}) - choose a smaller scale, or another file"
            )
    return pairs


def _refuse_other_content(file: TensorFile) -> None:
    """Raise `Refused` unless every key is one of low-rank pairs."""
    where = f"lora: {file.path}"
    if not file.tensors:
        raise Refused(f"{where}: holds no tensor - {DAMAGE_REMEDY}")
    if prediction := file.metadata.get("sollune.prediction"):
        student = "flow model" if prediction == "velocity" else f"student that predicts {format_value(prediction)}"
        raise Refused(
            f"{where}: holds adapters of a {student}, by its metadata, and a teacher predicts something else - "
            "take a LoRA of the teacher's kind"
        )
    if found := other_method(file.tensors):
        raise Refused(f"{where}: {_shown(found[0])} is of {found[1]}, not of a plain LoRA - {PLAIN_REMEDY}")
    strange = [key for key in file.tensors if parse_key(key) is None]
    if len(strange) == len(file.tensors):
        raise Refused(
            f"{where}: holds no low-rank pair ({_shown(strange[0])} is its first tensor) - name a LoRA file; a "
            "whole model goes behind --teacher"
        )
    if strange:
        raise Refused(f"{where}: {_shown(strange[0])} is no part of a low-rank pair - {PLAIN_REMEDY}")
    if raw := next((key for key in file.tensors if key.startswith(RAW_PEFT_PREFIX)), None):
        raise Refused(
            f"{where}: {_shown(raw)} is peft's own spelling, whose alpha lies in another file - save it with "
            "save_lora_weights of diffusers"
        )


def _keys_by_layer(file: TensorFile) -> dict[str, dict[Role, str]]:
    """Layer as spelled in the file -> role -> key."""
    layers: dict[str, dict[Role, str]] = {}
    for key in file.tensors:
        if part := parse_key(key):
            keys = layers.setdefault(part.layer, {})
            if part.role in keys:
                raise Refused(
                    f"lora: {file.path}: {_shown(key)} and {_shown(keys[part.role])} are the same part of "
                    "one layer - remove one of them"
                )
            keys[part.role] = key
    return layers


def _check_shapes(file: TensorFile, keys: Mapping[Role, str], weight: str, shape: Sequence[int]) -> int:
    """The rank of a pair; raises `Refused` unless its parts fit each other and the weight.

    A 1x1 convolution is a linear layer: either may have the two axes of 1 or not.
    """
    where = f"lora: {file.path}"
    parts = {role: _with_kernel(file.tensors[keys[role]].shape) for role in ROLES if role in keys}
    for role, own in parts.items():
        if not own or 0 in own:
            key, shown = _shown(keys[role]), list(file.tensors[keys[role]].shape)
            raise Refused(f"{where}: {key} has the shape {shown}, which no part of a pair has - {DAMAGE_REMEDY}")
    down, up = parts["down"], parts["up"]
    mid = parts.get("mid", (down[0], down[0], *down[2:]))
    outer = up[2:] if "mid" not in parts else (*up[2:], *down[2:])
    if {up[1], *mid[:2]} != {down[0]} or set(outer) != {1}:
        shapes = ", ".join(f"{role} {list(file.tensors[keys[role]].shape)}" for role in parts)
        raise Refused(f"{where}: {_shown(keys['down'])}: {shapes} make no pair of one rank - {DAMAGE_REMEDY}")
    if (made := (up[0], down[1], *mid[2:])) != _with_kernel(shape):
        model = other_model(_shapes(file), file.metadata)
        raise Refused(
            f"{where}: {_shown(keys['down'])} is for a weight of the shape "
            f"{list(made if made[2:] != (1, 1) else made[:2])}, {weight} has {list(shape)}{model} - {OTHER_REMEDY}"
        )
    return down[0]


def _shown(key: str) -> str:
    """A key for a message: in full, as keys are longer than other values."""
    text = escape_unprintable(key)
    return text if len(text) <= MAX_SHOWN_KEY else f"{text[:MAX_SHOWN_KEY]}..."


def _shapes(file: TensorFile) -> Shapes:
    return {key: tensor.shape for key, tensor in file.tensors.items()}


def _with_kernel(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a linear layer as that of a 1x1 convolution, and of a convolution as it is; empty for any other."""
    return (*shape, 1, 1) if len(shape) == 2 else tuple(shape) if len(shape) == 4 else ()


def _largest_value(file: TensorFile, keys: Mapping[Role, str]) -> float:
    """A bound of a product of a pair's values; raises `Refused` for values that are not finite."""
    bound = 1.0
    for role, key in keys.items():
        value = file.tensors[key].read()
        if role != "alpha" and not value.is_floating_point():
            raise Refused(f"lora: {file.path}: {_shown(key)} is of type {value.dtype} - {DAMAGE_REMEDY}")
        if not bool(value.float().isfinite().all()):
            raise Refused(f"lora: {file.path}: {_shown(key)} holds values that are not finite - {DAMAGE_REMEDY}")
        bound *= 1.0 if role == "alpha" else float(value.float().abs().max())
    return bound


def _alpha_over_rank(
    file: TensorFile, keys: Mapping[Role, str], rank: int, settings: AdapterSettings | None, weight: str
) -> float:
    """The factor of a pair: by its own alpha, by the settings in the metadata, or 1 where the file states nothing."""
    where = f"lora: {file.path}"
    if "alpha" not in keys:
        return 1.0 if settings is None else settings.alpha_over_rank(weight, rank)
    key = _shown(keys["alpha"])
    if settings is not None:
        raise Refused(f"{where}: {key} and the metadata both state an alpha - save the file again with one of them")
    if math.prod(shape := file.tensors[keys["alpha"]].shape) != 1:
        raise Refused(f"{where}: {key} has the shape {list(shape)}, and an alpha is one number - {DAMAGE_REMEDY}")
    return float(file.tensors[keys["alpha"]].read()) / rank
