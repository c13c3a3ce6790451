"""How often the pairs of a LoRA file count: peft's settings in the metadata of files that diffusers wrote."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.system.refusal import Refused, format_value, in_one_line
from stages.system.text import parse_json
from stages.teacher_files.checkpoint.stored import TensorFile
from stages.teacher_files.lora.names import TEXT_MODEL

METADATA_KEY = "lora_adapter_metadata"
"""Key of the JSON; its own keys begin with `unet.` and `text_encoder.`."""
METADATA_REMEDY = "save it again with save_lora_weights"
HARMLESS_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Those that leave the weights beside the pairs as they are; others, such as pissa, change the model itself."""
MAX_SETTING = 1e9
MODULE_NAME = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class AdapterSettings:
    """peft's settings of one component."""

    where: str
    """Subject of messages."""
    values: Mapping[str, Any]

    def alpha_over_rank(self, weight: str, rank: int) -> float:
        """The factor of the pair of a weight `<component>.<name>.weight`.

        Raises `Refused` where the stated rank is another than the pair's.
        """
        layer = weight.partition(".")[2].removesuffix(".weight").removeprefix(TEXT_MODEL)
        stated = self._of_layer("rank_pattern", "r", layer, rank)
        if stated != rank:
            raise Refused(f"{self.where}: {layer} has the rank {rank}, the metadata say {stated:g} - {METADATA_REMEDY}")
        alpha = self._of_layer("alpha_pattern", "lora_alpha", layer, rank)
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _of_layer(self, patterns_key: str, key: str, layer: str, rank: int) -> float:
        """A setting of one layer: of the first pattern that the end of its name matches, else the general one."""
        patterns = self.values.get(patterns_key) or {}
        value = self.values.get(key, rank)
        for pattern, stated in patterns.items() if isinstance(patterns, Mapping) else ():
            if not MODULE_NAME.fullmatch(pattern):
                raise Refused(f"{self.where}: {patterns_key}: {format_value(pattern)} is no layer - {METADATA_REMEDY}")
            name = pattern.removeprefix("^").removeprefix(TEXT_MODEL)
            if layer == name or (not pattern.startswith("^") and layer.endswith(f".{name}")):
                value = stated
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_SETTING:
            raise Refused(f"{self.where}: {key} is {format_value(value)}, not a usable number - {METADATA_REMEDY}")
        return float(value)


def adapter_settings(file: TensorFile) -> dict[str, AdapterSettings]:
    """Component -> its settings in a file's metadata; empty where they state none.

    Raises `Refused` for metadata that cannot be read, and for a method that is more than low-rank pairs.
    """
    if METADATA_KEY not in file.metadata:
        return {}
    where = f"lora: {file.path}: {METADATA_KEY}"
    try:
        content = parse_json(file.metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise Refused(f"{where}: is not JSON ({in_one_line(error)}) - {METADATA_REMEDY}") from error
    if not isinstance(content, Mapping):
        raise Refused(f"{where}: is not a mapping but {format_value(content)} - {METADATA_REMEDY}")
    found: dict[str, AdapterSettings] = {}
    for component in ("unet", "text_encoder"):
        prefix = f"{component}."
        values = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
        if values:
            _check_method(where, values)
            found[component] = AdapterSettings(where, values)
    return found


def _check_method(where: str, values: Mapping[str, Any]) -> None:
    remedy = "merge it with the program that made it and name the merged model"
    if values.get("use_dora"):
        raise Refused(f"{where}: use_dora is set, and DoRA also rescales the weights - {remedy}")
    if (initialisation := values.get("init_lora_weights")) not in HARMLESS_INITIALISATIONS:
        shown = format_value(initialisation)
        raise Refused(f"{where}: init_lora_weights is {shown}, which changes the model beside the pairs - {remedy}")
