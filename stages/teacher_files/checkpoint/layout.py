"""The tensors of one component of a file under diffusers' names, complete and of the shapes that a config asks for."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from stages.system.refusal import Refused
from stages.teacher_files.checkpoint.expected import TEXT_PREFIX, expected_shapes
from stages.teacher_files.checkpoint.kinds import AVERAGED_COUNTERS, Contents
from stages.teacher_files.checkpoint.stored import DTYPE_NAMES, ChangedTensor, LazyTensor, StoredTensor
from stages.teacher_files.folder import read_json
from stages.teacher_files.ldm_names import LDM_PREFIXES, ldm_name

FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
AVERAGED_ROOT = "diffusion_model"
"""Before the names of averaged weights, which have their dots removed."""
OLD_VAE_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of diffusers before 0.18 -> today's."""
IGNORED: Mapping[str, Callable[[str], bool]] = {
    "unet": lambda name: False,
    "vae": lambda name: name.startswith(("loss.", "model_ema.")),
    "text_encoder": lambda name: (
        name.endswith("position_ids")
        or name.startswith(("vision_model.", "visual_projection.", "text_projection.", "logit_scale"))
    ),
}
"""What files hold beside the tensors of a component: the training's loss, the rest of CLIP."""
CONFIG_REMEDY = "name a folder of the same kind of model with --teacher.config"


def component_tensors(
    contents: Contents,
    component: str,
    configs: Path,
    subject: str,
    *,
    averaged: bool = False,
    remedy: str = CONFIG_REMEDY,
) -> dict[str, LazyTensor]:
    """The tensors of a component of a file, by diffusers' names; `averaged` takes the averaged ones of the UNet.

    Raises `Refused`, beginning with `subject`, where one is unknown, missing, of another shape or no weight; `remedy`
    is what to do then.
    """
    expected = expected_shapes(configs, component)
    names = stored_names(contents, component, configs, averaged=averaged)
    group = contents.groups["averaged" if averaged else component]
    ignored = (lambda name: name in AVERAGED_COUNTERS) if averaged else IGNORED[component]
    found: dict[str, StoredTensor] = {}
    for name, tensor in group.items():
        key = names(name)
        if ignored(name):
            continue
        if key not in expected:
            raise Refused(f"{subject}: {component}: tensor {name} is unknown to {configs} - {remedy}")
        if key in found:
            raise Refused(f"{subject}: {component}: {key} comes twice, the second time as {name} - fetch it again")
        found[key] = tensor
    if missing := sorted(expected.keys() - found.keys()):
        count = f"{len(missing)} tensor{'s' * (len(missing) > 1)}"
        raise Refused(f"{subject}: {component}: {count} missing, such as {missing[0]} - fetch it again, or {remedy}")
    return {
        key: _fitting(key, found[key], shape, component, subject, configs, remedy) for key, shape in expected.items()
    }


def stored_names(contents: Contents, component: str, configs: Path, *, averaged: bool = False) -> Callable[[str], str]:
    """The function from a file's names, without their prefix, to diffusers' names."""
    if component == "text_encoder":
        return lambda name: TEXT_PREFIX + name.removeprefix(TEXT_PREFIX)
    if not averaged and not contents.is_ldm(component):
        return _current_name
    inverse = diffusers_names(configs, component)
    if averaged:
        dotless = {AVERAGED_ROOT + name.replace(".", ""): key for name, key in inverse.items()}
        assert len(dotless) == len(inverse), "two names are one without their dots"
        return lambda name: dotless.get(name, "")
    return lambda name: inverse.get(name, "")


def diffusers_names(configs: Path, component: str) -> dict[str, str]:
    """LDM's names of a component, without prefix -> diffusers' names: the inverse of `ldm_name`."""
    layers = read_json(configs / "unet" / "config.json").get("layers_per_block", 2)
    levels = len(read_json(configs / "vae" / "config.json").get("block_out_channels", [0] * 4))
    return {
        ldm_name(f"{component}.{key}", layers, levels).removeprefix(f"{LDM_PREFIXES[component]}."): key
        for key in expected_shapes(configs, component)
    }


def _current_name(name: str) -> str:
    for old, new in OLD_VAE_ATTENTION.items():
        if ".attentions." in name and old in name:
            return name.replace(old, new)
    return name


def _fitting(
    key: str, tensor: StoredTensor, shape: tuple[int, ...], component: str, subject: str, configs: Path, remedy: str
) -> LazyTensor:
    """The tensor in the shape that is expected; the VAE's attention may be stored as 1x1 convolutions."""
    if DTYPE_NAMES[tensor.dtype] not in FLOAT_TYPES:
        raise Refused(
            f"{subject}: {component}: tensor {key} is of type {tensor.dtype}, weights are floating - {remedy}"
        )
    if tensor.shape == shape:
        return tensor
    if component == "vae" and ".attentions." in key and tensor.shape == (*shape, 1, 1):
        return ChangedTensor(tensor, shape, _without_window)
    raise Refused(
        f"{subject}: {component}: tensor {key} is {list(tensor.shape)}, {configs} says {list(shape)} - {remedy}"
    )


def _without_window(value: Tensor) -> Tensor:
    return value[:, :, 0, 0]
