"""The laws of an export, one function each: it looks at what lies on the disk, and refuses in its own words."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from configs.refusal import Refused
from stages.nets.student import Student

TIMES = (0.1, 0.5, 0.9)
AGAIN = "export the run again"
SIDE, WORDS = 8, 8
"""A latent of 8 x 8 and 8 tokens: the smallest that goes through three halvings, and a network of SD-1.x's size answers
within a second."""


def same_names(where: str, found: Mapping[str, Tensor], meant: Mapping[str, Tensor]) -> None:
    """No tensor may be missing, unexpected or of another shape."""
    for kind, names in (("missing", meant.keys() - found.keys()), ("unexpected", found.keys() - meant.keys())):
        if names:
            raise Refused(f"{where}: {len(names)} tensors are {kind} ({min(names)} is the first) - {AGAIN}")
    for name, value in meant.items():
        if found[name].shape != value.shape:
            raise Refused(f"{where}: {name} has the shape {list(found[name].shape)}, not {list(value.shape)} - {AGAIN}")


def one_type(where: str, found: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Every tensor must be of the type that the export says it has."""
    for name, value in found.items():
        if value.dtype != dtype:
            raise Refused(f"{where}: {name} is {value.dtype}, not {dtype} - {AGAIN}")


def only_numbers(where: str, found: Mapping[str, Tensor]) -> None:
    """No value may be infinite or no number."""
    for name, value in found.items():
        if not value.isfinite().all():
            raise Refused(f"{where}: {name} holds values that are no numbers - {AGAIN}")


def taught(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """Training moves every tensor: one that is still the teacher's, in fp32, was never taught."""
    same = [name for name, value in student.items() if torch.equal(value.detach().cpu().float(), teacher[name].float())]
    if same:
        raise Refused(
            f"export: {len(same)} of {len(student)} tensors are still the teacher's ({same[0]} is the first) - "
            "distill the student before it is exported"
        )


def not_the_teachers(where: str, found: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """Under our scheduler the teacher's weights would paint noise, and nothing else would tell.

    Rounding may hide how far a single tensor went, never how far all of them did.
    """
    if found.keys() == teacher.keys() and all(
        torch.equal(value, teacher[name].to(value.dtype)) for name, value in found.items()
    ):
        raise Refused(f"{where}: these are the teacher's weights under the student's name - {AGAIN}")


def equal(where: str, found: Mapping[str, Tensor], meant: Mapping[str, Tensor]) -> None:
    """Every tensor must be the meant one to the last bit of its type."""
    for name, value in meant.items():
        if not torch.equal(found[name], value):
            raise Refused(f"{where}: {name} did not come back as written{_taken_for(found[name], meant)} - {AGAIN}")


def _taken_for(value: Tensor, meant: Mapping[str, Tensor]) -> str:
    """Whose tensor stands there instead, if it is anybody's."""
    owner = next((name for name, other in meant.items() if torch.equal(other, value)), None)
    return f" (it is {owner})" if owner else ""


def rounding(tensors: int, dtype: torch.dtype) -> float:
    """The most that rounding explains of the relative error of a network's answer, its weights stored as `dtype`.

    Storing moves each weight by at most u = eps / 2 of itself, each at random. The N layers share the answer, so that
    their errors, added in squares, leave about u of it: the embedded student's is .8 u in fp16, an untrained network's
    up to 2.8 u, and 8 u are allowed. The arithmetic in fp32 adds its own u at each of N layers, sqrt(N) u if they are
    independent: those two show .2 and .6 of that against float64, and twice is allowed. One lost bias makes 5e-3.
    """
    stored, arithmetic = (torch.finfo(kind).eps / 2 for kind in (dtype, torch.float32))
    return 8 * stored + 2 * math.sqrt(tensors) * arithmetic


def relative(found: Tensor, meant: Tensor) -> float:
    """|found - meant| / |meant|."""
    return float((found - meant).norm() / meant.norm())


@torch.inference_mode()
def same_velocities(where: str, found: Student, meant: Student, dtype: torch.dtype) -> None:
    """One velocity at three times must be the student's own, but for the rounding of its weights to `dtype`."""
    generator = torch.Generator().manual_seed(0)
    config = meant.unet.config
    device = meant.unet.device
    x = torch.randn(len(TIMES), config["in_channels"], SIDE, SIDE, generator=generator)
    cond = torch.randn(len(TIMES), WORDS, config["cross_attention_dim"], generator=generator)
    s = torch.tensor(TIMES, dtype=torch.float64)
    told = meant.velocity(x.to(device), s.to(device), cond.to(device)).cpu()
    read = found.velocity(x, s, cond)
    most = rounding(len(meant.unet.state_dict()), dtype)
    for time, one, other in zip(TIMES, read, told, strict=True):
        if not (error := relative(one, other)) <= most:
            raise Refused(
                f"{where}: its velocity at s = {time} is {error:.1e} away from the student's, rounding explains "
                f"{most:.1e} - {AGAIN}"
            )


def same_scheduler(where: str, found: Mapping[str, Any], meant: Mapping[str, Any]) -> None:
    """The scheduler must be the meant one in every setting: one for noise prediction would make noise."""
    said, asked = found.get("prediction_type", "epsilon"), meant["prediction_type"]
    if said != asked:
        raise Refused(f"{where}: prediction_type is {said}, the student answers with {asked} - {AGAIN}")
    for key in sorted(meant.keys() | found.keys()):
        if found.get(key) != meant.get(key):
            raise Refused(f"{where}: {key} is {found.get(key)!r}, not {meant.get(key)!r} - {AGAIN}")
