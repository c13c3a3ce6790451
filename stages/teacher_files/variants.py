"""Which of the weight files of a diffusers folder are read: names alone decide, of files on a disk or on a hub."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

WEIGHT_FILES: Mapping[str, tuple[str, ...]] = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin"),
}
"""Part -> the plain names of its weights: of equal precision the first is read, whole or in the shards that
`<name>.index.json` lists. A variant has its word before the ending: `model.fp16.safetensors`."""
PRECISIONS = {"": 0, "fp32": 1, "float32": 1, "fp16": 3, "float16": 3, "half": 3, "bf16": 4, "bfloat16": 4, "fp8": 5}
"""A word of a variant -> its place, fullest first: fp16 has more digits than bf16, which has more range."""
OTHER_VARIANT = 2
"""The place of a variant whose name says nothing of precision, such as non_ema."""
VARIANT_ORDER = ("ema_only", "ema", "non_ema")
"""Of variants of one precision the averaged weights first; then any other, by its name."""


class WeightFile(NamedTuple):
    """The file that the weights of one part are read from, or the index of its shards."""

    variant: str
    kind: int
    """Place of its format: whole safetensors, its shards, whole .bin, its shards."""
    name: str

    @property
    def precision(self) -> int:
        """The place of its variant's precision, the fullest first."""
        words = re.split(r"[._]", self.variant)
        return max((PRECISIONS[word] for word in words if word in PRECISIONS), default=OTHER_VARIANT)

    @property
    def variant_order(self) -> tuple[int, str]:
        """The place of its variant among those of one precision."""
        known = next((i for i, name in enumerate(VARIANT_ORDER) if self.variant.startswith(name)), len(VARIANT_ORDER))
        return known, self.variant


def weight_file_of(part: str, name: str) -> WeightFile | None:
    """What the name of a file in the folder of a part says; None for a shard and for what are no weights."""
    for i, plain in enumerate(WEIGHT_FILES[part]):
        stem, _, ending = plain.rpartition(".")
        pattern = rf"{re.escape(stem)}(?:\.([A-Za-z0-9_.]+))?\.{ending}(\.index(?:\.([A-Za-z0-9_.]+))?\.json)?"
        if match := re.fullmatch(pattern, name):
            return WeightFile(match[1] or match[3] or "", 2 * i + bool(match[2]), name)
    return None


def plain_name(part: str, name: str) -> str:
    """The name under which libraries read a weight file without naming its variant; any other name as it is."""
    file = weight_file_of(part, name)
    if file is None:
        return name
    plain = WEIGHT_FILES[part][file.kind // 2]
    return f"{plain}.index.json" if file.kind % 2 else plain


def choose_weights(names_by_part: Mapping[str, Collection[str]]) -> dict[str, WeightFile]:
    """Part -> the weights that are read, for the parts that have any.

    The fullest precision of each part; where several variants have it, one that all parts have, and of one variant
    safetensors before .bin, a whole file before shards.
    """
    candidates: dict[str, list[WeightFile]] = {}
    for part, names in names_by_part.items():
        files = [file for name in names if (file := weight_file_of(part, name))]
        if files:
            fullest = min(file.precision for file in files)
            candidates[part] = [file for file in files if file.precision == fullest]
    variants = [{file.variant for file in files} for files in candidates.values()]
    common = set.intersection(*variants) if variants else set()

    def order(file: WeightFile) -> tuple[bool, tuple[int, str], int]:
        return file.variant not in common, file.variant_order, file.kind

    return {part: min(files, key=order) for part, files in candidates.items()}
