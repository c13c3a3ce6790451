"""A safetensors file with reproducible bytes, and the metadata by which other programs and ours know it.

The library writes metadata in an order that changes from call to call, so the header is written here: eight bytes of
length, JSON with sorted keys padded to a multiple of eight, the tensors in the order of their names.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.values import PictureSize
from stages.system.refusal import Refused

SAFETENSORS_TYPES = {torch.float16: "F16", torch.float32: "F32"}
CHUNK_BYTES = 1 << 24
HEADER_HASH_KEY = "sollune_header_sha256"
STUDENT_KEY = "student_sha256"
FACT_KEYS = {
    "prediction": "prediction",
    "path": "path",
    "time_scale": "time_scale",
    "flow_shift": "shift",
    "tail": "tail_policy",
    "recipe_sha256": "recipe_sha256",
    "teacher_sha256": "teacher_sha256",
    "student_sha256": STUDENT_KEY,
    "samples": "samples_seen",
    "sizes": "sizes",
    "clip_skip": "clip_skip",
    "windows": "windows",
    "guidance_range": "guidance_range",
    "mix": "mix",
    "loras": "loras",
    "vae": "vae",
}
"""A fact of `sollune.json` -> its key in the file, behind `sollune.`."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file; raises `KeyError` for a type other than fp16 and fp32, `OSError` as the disk does."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors):
        value = tensors[name]
        start, end = end, end + value.nbytes
        header[name] = {
            "dtype": SAFETENSORS_TYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(tensor_bytes(tensors[name]) for name in sorted(tensors))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor on the CPU, little-endian."""
    content: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over all that follows the header, in ModelSpec's spelling (formats.md 4.1)."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(tensor_bytes(tensors[name]))
    return f"0x{sha.hexdigest()}"


def hash_file_tensors(path: Path) -> str:
    """The same hash as `hash_tensors`, from the bytes of a written file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
    return f"0x{sha.hexdigest()}"


def with_header_hash(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with a hash over itself, by which a later change is noticed."""
    return {**metadata, HEADER_HASH_KEY: _header_hash(metadata)}


def has_valid_header_hash(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata is as it was written; files of early versions carry no hash and count as such."""
    hashed = {key: value for key, value in metadata.items() if key != HEADER_HASH_KEY}
    return metadata.get(HEADER_HASH_KEY, _header_hash(hashed)) == _header_hash(hashed)


def _header_hash(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()


def teacher_name(facts: Mapping[str, Any]) -> str:
    """The last word of the teacher's hub id or folder; raises `Refused` when the facts name no teacher."""
    name = str(facts.get("base_model") or facts.get("teacher") or "").rpartition("/")[2]
    if not name:
        raise Refused("export: sollune.json names no teacher (base_model or teacher) - export the run again")
    return name


def model_name(facts: Mapping[str, Any]) -> str:
    """The default name of a student: its teacher's, with `-classes` behind it where it was fine-tuned on classes."""
    return f"{teacher_name(facts)}-classes" if "classes" in facts else teacher_name(facts)


def scale_text(scale: float) -> str:
    """A guidance scale in names and metadata: 5, 7.5."""
    return f"{scale:.12g}"


def single_file_name(facts: Mapping[str, Any], name: str | None, unet_only: bool, fold: float | None = None) -> str:
    """The single file's name, which must hold `flow`: SD.Next goes by it.

    `fold` is the guidance scale in the weights of a student of few steps.
    """
    stem = (name or model_name(facts)).removesuffix("-flow")
    few = "" if fold is None else f"-{facts['windows']}step-w{scale_text(fold)}"
    return f"{stem}{few}{'-unet' if unet_only else ''}-flow.safetensors"


def title_suffix(facts: Mapping[str, Any], unet_only: bool, fold: float | None = None) -> str:
    """What stands behind the model's name in the title of its single file."""
    few = "" if fold is None else f" {facts['windows']} steps w {scale_text(fold)}"
    return f"{few}{' UNet' if unet_only else ''} flow (sollune)"


def single_file_metadata(
    facts: Mapping[str, Any],
    resolution: PictureSize,
    tensor_hash: str,
    name: str | None = None,
    unet_only: bool = False,
    fold: float | None = None,
) -> dict[str, str]:
    """ModelSpec 1.0.1 for other programs, `sollune.*` for ours; `resolution` is the standard size of the pictures.

    `fold` is the guidance scale in the weights of a student of few steps.

    `sd3` is the one word for a velocity that a program acts on: SwarmUI then samples on the straight path. No date and
    no author: the same export gives the same bytes (formats.md 4.1).
    """
    layer = int(facts.get("clip_skip", 0)) + 1
    skip = (
        f" Clip skip {layer}: in ComfyUI CLIPSetLastLayer with {-layer}, in SwarmUI CLIP Stop At Layer {-layer}."
        if layer > 1
        else ""
    )
    few = "" if fold is None else f" Steps {facts['windows']}, cfg 1: the guidance is in the weights."
    behind = "UNETLoader" if unet_only else "the loader"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": f"{name or model_name(facts)}{title_suffix(facts, unet_only, fold)}",
        "modelspec.resolution": str(resolution),
        "modelspec.description": "A Stable Diffusion 1.x model that answers with the velocity of the straight path."
        + ("" if fold is None else f" For {facts['windows']} steps, guidance {scale_text(fold)} within the weights."),
        "modelspec.hash_sha256": tensor_hash,
        "modelspec.prediction_type": "sd3",
        "modelspec.usage_hint": (
            f"Rectified flow: in ComfyUI put ModelSamplingSD3 with shift {facts['flow_shift']:g} behind {behind}; "
            f"in SwarmUI set Sigma Shift to {facts['flow_shift']:g}. Sampler euler, scheduler simple.{few}{skip}"
        ),
        **({"modelspec.encoder_layer": str(layer)} if layer > 1 else {}),
        **({"modelspec.license": str(facts["license"])} if "license" in facts else {}),
        **{f"sollune.{key}": _metadata_text(facts[fact]) for fact, key in FACT_KEYS.items() if fact in facts},
        **({} if fold is None else {"sollune.guidance": scale_text(fold)}),
    }


def _metadata_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
