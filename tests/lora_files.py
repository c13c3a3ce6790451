"""LoRA files for the embedded teacher, of random pairs, in each naming under which such files are spread."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.teacher_files.ldm_names import ldm_name

TEACHER = Path("stages/tiny/model")
WEIGHTS = {
    "unet": TEACHER / "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": TEACHER / "text_encoder/model.safetensors",
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
OTHER_LINEAR = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""`<component>.<layer>` -> down and up."""
Tensors = dict[str, Tensor]


def embedded_weights() -> Tensors:
    """The embedded teacher's UNet and text encoder, by `<component>.<name>`."""
    return {f"{part}.{name}": value for part, file in WEIGHTS.items() for name, value in load_file(file).items()}


def random_pairs(*suffixes: str, rank: int = 3, seed: int = 0) -> Pairs:
    """Pairs for all layers whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for key, weight in embedded_weights().items():
        layer = key.removesuffix(".weight")
        if layer != key and layer.endswith(tuple(f".{suffix}" for suffix in suffixes)):
            down = torch.randn(rank, *weight.shape[1:], generator=generator) / 8
            ones = weight.shape[2:] and (1, 1)
            pairs[layer] = down, torch.randn(weight.shape[0], rank, *ones, generator=generator) / 8
    assert pairs
    return pairs


def kohya(pairs: Pairs, alpha: float | None = 2.0, text_prefix: str = "lora_te") -> Tensors:
    def name(layer: str) -> str:
        part, _, rest = layer.partition(".")
        return f"{'lora_unet' if part == 'unet' else text_prefix}_{rest.replace('.', '_')}"

    return _kohya(pairs, name, alpha)


def kohya_ldm(pairs: Pairs, alpha: float | None = 2.0) -> Tensors:
    """With the layers of the UNet named as in the LDM layout."""

    def name(layer: str) -> str:
        part, _, rest = layer.partition(".")
        if part == "unet":
            rest = ldm_name(f"{layer}.weight", 1, 4).removeprefix("model.diffusion_model.").removesuffix(".weight")
        return f"{'lora_unet' if part == 'unet' else 'lora_te'}_{rest.replace('.', '_')}"

    return _kohya(pairs, name, alpha)


def _kohya(pairs: Pairs, name: Callable[[str], str], alpha: float | None) -> Tensors:
    tensors: Tensors = {}
    for layer, (down, up) in pairs.items():
        tensors[f"{name(layer)}.lora_down.weight"] = down
        tensors[f"{name(layer)}.lora_up.weight"] = up
        if alpha is not None:
            tensors[f"{name(layer)}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(pairs: Pairs) -> Tensors:
    return _dotted(pairs, lambda layer: (f"{layer}.lora_A", f"{layer}.lora_B"))


def peft_without_prefix(pairs: Pairs) -> Tensors:
    return {key.removeprefix("unet."): value for key, value in peft(pairs).items()}


def diffusers(pairs: Pairs) -> Tensors:
    def names(layer: str) -> tuple[str, str]:
        middle = "lora" if layer.startswith("unet.") else "lora_linear_layer"
        return f"{layer}.{middle}.down", f"{layer}.{middle}.up"

    return _dotted(pairs, names)


def old_diffusers(pairs: Pairs) -> Tensors:
    """The names of attention processors, for attention alone."""

    def names(layer: str) -> tuple[str, str]:
        stem, last = layer.removesuffix(".0").rsplit(".", 1)
        last = last.replace("_proj", "") if last.startswith("out") else last.removesuffix("_proj")
        last = last if last.startswith("to_") else f"to_{last}"
        stem = f"{stem}.processor" if layer.startswith("unet.") else stem
        return f"{stem}.{last}_lora.down", f"{stem}.{last}_lora.up"

    return _dotted(pairs, names)


def _dotted(pairs: Pairs, names: Callable[[str], tuple[str, str]]) -> Tensors:
    tensors = {}
    for layer, values in pairs.items():
        tensors |= {f"{name}.weight": value for name, value in zip(names(layer), values, strict=True)}
    return tensors


def write(tensors: Tensors, file: Path, metadata: Mapping[str, str] | None = None) -> Path:
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, file, {"format": "pt", **dict(metadata or {})}
    )
    return file
