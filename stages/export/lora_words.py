"""What a file of adapters says of itself: above all, on which model it belongs."""

import json

from stages.export.content import fingerprint
from stages.nets.lora import LoraConfig
from stages.nets.saved import Origin
from stages.nets.student import Student


def diffusers_words(
    name: str, config: LoraConfig, origin: Origin, samples: int, base: Student, tensor_hash: str
) -> dict[str, str]:
    """The metadata of both layouts; `name` is what the base's single file is called, without its ending.

    No date and no author: the same export gives the same bytes.
    """
    wants = f"the flow model {name} that these adapters were trained beside (its export), not its teacher"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{name} LoRA (sollune)",
        "modelspec.description": f"Adapters for {wants}.",
        "modelspec.hash_sha256": tensor_hash,
        "sollune.base": wants,
        "sollune.base_student_sha256": fingerprint(base),
        "sollune.lora": json.dumps(config.model_dump(mode="json"), sort_keys=True),
        "sollune.prediction": origin.target,
        "sollune.recipe_sha256": origin.recipe_sha256,
        "sollune.samples_seen": str(samples),
    }


def kohya_words(
    name: str, config: LoraConfig, origin: Origin, samples: int, base: Student, tensor_hash: str
) -> dict[str, str]:
    """The same, and the keys by which pickers of LoRA files know one (formats.md 4.2)."""
    told = diffusers_words(name, config, origin, samples, base, tensor_hash)
    rank = str(config.rank)
    convolutions = {"conv_dim": rank, "conv_alpha": rank} if "resnet" in config.modules else {}
    return told | {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,  # the scale is within the weights
        "ss_network_args": json.dumps(convolutions, sort_keys=True),
        "ss_sd_model_name": f"{name}.safetensors",
        "ss_output_name": f"{name}-lora",
        "ss_training_comment": f"for {told['sollune.base']}",
        "sshs_model_hash": tensor_hash.removeprefix("0x"),
    }
