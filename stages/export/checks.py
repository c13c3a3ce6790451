"""The laws of an export, one function each: it looks at what lies on the disk, and refuses in its own words."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stages.nets.student import Student
from stages.system.refusal import Refused

PROBE_TIMES = (0.1, 0.5, 0.9)
EXPORT_REMEDY = "export the run again"
PROBE_LATENT_SIDE, PROBE_TOKENS = 8, 8
"""A latent of 8 x 8 and 8 tokens: the smallest that goes through three halvings, and a network of SD-1.x's size answers
within a second."""


def check_names_and_shapes(subject: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """No tensor may be missing, unexpected or of another shape."""
    for kind, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            raise Refused(f"{subject}: {len(names)} tensors are {kind} ({min(names)} is the first) - {EXPORT_REMEDY}")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise Refused(
                f"{subject}: {name} has the shape {list(found[name].shape)}, not {list(value.shape)} - {EXPORT_REMEDY}"
            )


def check_dtype(subject: str, found: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Every tensor must be of the type that the export says it has."""
    for name, value in found.items():
        if value.dtype != dtype:
            raise Refused(f"{subject}: {name} is {value.dtype}, not {dtype} - {EXPORT_REMEDY}")


def check_finite(subject: str, found: Mapping[str, Tensor]) -> None:
    """No value may be infinite or no number."""
    for name, value in found.items():
        if not value.isfinite().all():
            raise Refused(f"{subject}: {name} holds values that are no numbers - {EXPORT_REMEDY}")


def check_trained(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """Training moves every tensor: one that is still the teacher's, in fp32, was never taught."""
    same = [name for name, value in student.items() if torch.equal(value.detach().cpu().float(), teacher[name].float())]
    if same:
        raise Refused(
            f"export: {len(same)} of {len(student)} tensors are still the teacher's ({same[0]} is the first) - "
            "distill the student before it is exported"
        )


def check_not_teacher(subject: str, found: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """Under our scheduler the teacher's weights would paint noise, and nothing else would tell.

    Rounding may hide how far a single tensor went, never how far all of them did.
    """
    if found.keys() == teacher.keys() and all(
        torch.equal(value, teacher[name].to(value.dtype)) for name, value in found.items()
    ):
        raise Refused(f"{subject}: these are the teacher's weights under the student's name - {EXPORT_REMEDY}")


def check_equal(subject: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every tensor must be the meant one to the last bit of its type."""
    for name, value in expected.items():
        if not torch.equal(found[name], value):
            raise Refused(
                f"{subject}: {name} did not come back as written{_swapped_with_text(found[name], expected)} - "
                f"{EXPORT_REMEDY}"
            )


def _swapped_with_text(value: Tensor, expected: Mapping[str, Tensor]) -> str:
    """Whose tensor stands there instead, if it is anybody's."""
    owner = next((name for name, other in expected.items() if torch.equal(other, value)), None)
    return f" (it is {owner})" if owner else ""


def rounding_tolerance(tensor_count: int, dtype: torch.dtype) -> float:
    """The most that rounding explains of the relative error of a network's answer, its weights stored as `dtype`.

    Storing moves each weight by at most u = eps / 2 of itself, each at random. The N layers share the answer, so that
    their errors, added in squares, leave about u of it: the embedded student's is .8 u in fp16, an untrained network's
    up to 2.8 u, and 8 u are allowed. The arithmetic in fp32 adds its own u at each of N layers, sqrt(N) u if they are
    independent: those two show .2 and .6 of that against float64, and twice is allowed. One lost bias makes 5e-3.
    """
    stored, arithmetic = (torch.finfo(kind).eps / 2 for kind in (dtype, torch.float32))
    return 8 * stored + 2 * math.sqrt(tensor_count) * arithmetic


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - meant| / |meant|."""
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def check_velocities(subject: str, found: Student, expected: Student, dtype: torch.dtype) -> None:
    """One velocity at three times must be the student's own, but for the rounding of its weights to `dtype`."""
    generator = torch.Generator().manual_seed(0)
    config = expected.unet.config
    device = expected.unet.device
    x = torch.randn(len(PROBE_TIMES), config["in_channels"], PROBE_LATENT_SIDE, PROBE_LATENT_SIDE, generator=generator)
    cond = torch.randn(len(PROBE_TIMES), PROBE_TOKENS, config["cross_attention_dim"], generator=generator)
    s = torch.tensor(PROBE_TIMES, dtype=torch.float64)
    told = expected.velocity(x.to(device), s.to(device), cond.to(device)).cpu()
    read = found.velocity(x, s, cond)
    most = rounding_tolerance(len(expected.unet.state_dict()), dtype)
    for time, one, other in zip(PROBE_TIMES, read, told, strict=True):
        if not (error := relative_error(one, other)) <= most:
            raise Refused(
                f"{subject}: its velocity at s = {time} is {error:.1e} away from the student's, rounding explains "
                f"{most:.1e} - {EXPORT_REMEDY}"
            )


def check_scheduler(subject: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The scheduler must be the meant one in every setting: one for noise prediction would make noise."""
    said, asked = found.get("prediction_type", "epsilon"), expected["prediction_type"]
    if said != asked:
        raise Refused(f"{subject}: prediction_type is {said}, the student answers with {asked} - {EXPORT_REMEDY}")
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise Refused(f"{subject}: {key} is {found.get(key)!r}, not {expected.get(key)!r} - {EXPORT_REMEDY}")
