"""What the single file says of itself: ModelSpec 1.0.1 for the programs that read it, `sollune.*` for ourselves."""

import json
from collections.abc import Mapping
from typing import Any

from configs.refusal import Refused

STUDENT = "student_sha256"
TOLD = {
    "prediction": "prediction",
    "path": "path",
    "time_scale": "time_scale",
    "flow_shift": "shift",
    "tail": "tail_policy",
    "recipe_sha256": "recipe_sha256",
    "teacher_sha256": "teacher_sha256",
    "student_sha256": STUDENT,
    "samples": "samples_seen",
}
"""A fact of `sollune.json` -> its key in the file, behind `sollune.`."""


def teacher_name(facts: Mapping[str, Any]) -> str:
    """The last word of the teacher's hub id or folder; raises `Refused` when the facts name no teacher."""
    name = str(facts.get("base_model") or facts.get("teacher") or "").rpartition("/")[2]
    if not name:
        raise Refused("export: sollune.json names no teacher (base_model or teacher) - export the run again")
    return name


def model_name(facts: Mapping[str, Any]) -> str:
    """What a student is called unless told: as its teacher, and as its story where it was fine-tuned on classes."""
    return f"{teacher_name(facts)}-classes" if "classes" in facts else teacher_name(facts)


def file_name(facts: Mapping[str, Any], name: str | None, unet_only: bool) -> str:
    """The single file's name, which must hold `flow`: SD.Next goes by it."""
    stem = (name or model_name(facts)).removesuffix("-flow")
    return f"{stem}{'-unet' if unet_only else ''}-flow.safetensors"


def metadata(
    facts: Mapping[str, Any], pixels: int, tensor_hash: str, name: str | None = None, unet_only: bool = False
) -> dict[str, str]:
    """The file's metadata; `pixels` is the side of the pictures, `tensor_hash` sha256 over the tensor bytes.

    `sd3` is the one word for a velocity that a program acts on: SwarmUI then samples on the straight path. No date and
    no author: the same export gives the same bytes (formats.md 4.1).
    """
    behind = "UNETLoader" if unet_only else "the loader"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": f"{name or model_name(facts)} {'UNet ' if unet_only else ''}flow (sollune)",
        "modelspec.resolution": f"{pixels}x{pixels}",
        "modelspec.description": "A Stable Diffusion 1.x model that answers with the velocity of the straight path.",
        "modelspec.hash_sha256": tensor_hash,
        "modelspec.prediction_type": "sd3",
        "modelspec.usage_hint": (
            f"Rectified flow: in ComfyUI put ModelSamplingSD3 with shift {facts['flow_shift']:g} behind {behind}; "
            f"in SwarmUI set Sigma Shift to {facts['flow_shift']:g}. Sampler euler, scheduler simple."
        ),
        **({"modelspec.license": str(facts["license"])} if "license" in facts else {}),
        **{f"sollune.{key}": _said(facts[fact]) for fact, key in TOLD.items() if fact in facts},
    }


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
