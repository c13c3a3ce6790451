"""LoRA: a student whose weights are frozen and whose low-rank adapters are trained (peft's layers).

Hu et al. 2021 (arXiv:2106.09685): W x becomes W x + (alpha / rank) B A x, where B begins at zero.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from configs.values import Strict
from stages.nets.student import Student
from stages.system.refusal import Refused

LayerKind: TypeAlias = Literal["attention", "feed_forward", "resnet"]

LAYER_SUFFIXES: Mapping[LayerKind, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "resnet": ("conv1", "conv2", "conv_shortcut"),
}
"""How diffusers' names for the layers of each kind end."""
ADAPTER_NAME = "default"


class LoraConfig(Strict):
    """Adapters of low rank beside the weights, which stay as they are."""

    rank: int = Field(16, ge=1, description="rank of each adapter")
    alpha: int | None = Field(None, ge=1, description="adapters count alpha / rank times; none takes the rank: once")
    modules: tuple[LayerKind, ...] = Field(
        ("attention",), min_length=1, description="layers that get one: attention (q, k, v, out), feed_forward, resnet"
    )
    seed: int = Field(0, description="seed of the adapters' first halves; the second ones begin at zero")

    @property
    def scale(self) -> float:
        """The factor alpha / rank of B A."""
        return (self.alpha or self.rank) / self.rank


def add_adapters(student: Student, config: LoraConfig) -> Student:
    """The same student with fresh adapters, its only trainable parameters, which change nothing yet.

    Raises `Refused` without peft.
    """
    if find_spec("peft") is None:
        raise Refused("lora: peft is not installed - pip install 'sollune[lora]', or train without lora")
    from peft import LoraConfig as PeftConfig

    targets = [name for kind in config.modules for name in LAYER_SUFFIXES[kind]]
    student.requires_grad_(False)
    alpha = config.alpha or config.rank
    student.unet.add_adapter(PeftConfig(r=config.rank, lora_alpha=alpha, target_modules=targets), ADAPTER_NAME)
    _init_adapters(adapter_parameters(student), config.seed)
    return student


def adapter_parameters(student: Student) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in the student: `<layer>.lora_A.default.weight` and `lora_B`."""
    return {name: value for name, value in student.named_parameters() if f".{ADAPTER_NAME}." in name}


def lora_state_dict(student: Student, scale: float) -> dict[str, Tensor]:
    """The adapters in diffusers' layout, `unet.<layer>.lora_A.weight`, with the scale multiplied into B."""
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): (scale * value if ".lora_B." in name else value).detach().cpu().clone()
        for name, value in adapter_parameters(student).items()
    }


def merge_adapters(student: Student) -> Student:
    """The same student, frozen, with its adapters, if it has any, added to its weights."""
    if adapter_parameters(student):
        student.unet.fuse_lora()
        student.unet.unload_lora()
    return student.requires_grad_(False)


def load_adapters(student: Student, tensors: Mapping[str, Any]) -> None:
    """Load adapters in place; raises `RuntimeError` unless they are exactly this student's."""
    own = {name: value for name, value in student.state_dict().items() if f".{ADAPTER_NAME}." not in name}
    student.load_state_dict({**own, **tensors})


def _init_adapters(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """Sample each A again: from peft's distribution, but not from the global generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in parameters.items():
            if ".lora_A." in name:
                initial = nn.init.kaiming_uniform_(torch.empty(value.shape), a=math.sqrt(5), generator=generator)
                value.copy_(initial)
