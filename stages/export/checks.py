"""The checks of an export, one function each: what was read from the disk against what it should hold."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stages.nets.features import copy_without_hooks
from stages.nets.student import Student
from stages.system.refusal import Refused

EXPORT_REMEDY = "export the run again"
SELF_ATTENTION = re.compile(r"(\.attn1\.to_)[qk](\.weight)$")
PROBE_TIMES = (0.1, 0.5, 0.9)
PROBE_GUIDANCE = (3.0, 5.0, 8.0)
"""Guidance scales at these times, for networks that take one."""
PROBE_LATENT_SIDE, PROBE_TOKENS = 8, 8
"""A latent of 8 x 8 and 8 tokens: the smallest that can be halved three times; a network of SD-1.x's size takes less
than a second."""


def check_values(subject: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Every tensor must be of the type that the export states, and finite."""
    for name, value in tensors.items():
        if value.dtype != dtype:
            raise Refused(f"{subject}: {name} is {value.dtype}, not {dtype} - {EXPORT_REMEDY}")
        if not value.isfinite().all():
            raise Refused(f"{subject}: {name} holds values that are no numbers - {EXPORT_REMEDY}")


def check_equal(subject: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """No tensor may be missing, unexpected, or differ in a bit; where two were exchanged, the message names both."""
    for kind, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            raise Refused(f"{subject}: {len(names)} tensors are {kind} ({min(names)} is the first) - {EXPORT_REMEDY}")
    for name, value in expected.items():
        if (shape := found[name].shape) != value.shape:
            raise Refused(f"{subject}: {name} has the shape {list(shape)}, not {list(value.shape)} - {EXPORT_REMEDY}")
        if not torch.equal(found[name], value):
            owner = next((other for other, tensor in expected.items() if torch.equal(tensor, found[name])), None)
            swapped = f" (it is {owner})" if owner else ""
            raise Refused(f"{subject}: {name} did not come back as written{swapped} - {EXPORT_REMEDY}")


def check_trained(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """Training moves every tensor: one that equals the teacher's in fp32 was not trained.

    What the teacher has not, the projection of the guidance scale, begins at zero. Query and key of a self-attention
    may stay where its values moved: over a single position, as in the middle of SD-1.x at 64 pixels, its softmax is 1
    whatever they are, and their gradient 0.
    """
    unmoved = [
        name
        for name, value in student.items()
        if torch.equal(value.detach().cpu().float(), teacher.get(name, torch.zeros_like(value)).cpu().float())
    ]
    same = [name for name in unmoved if _value_beside(name) not in student.keys() - set(unmoved)]
    if same:
        raise Refused(
            f"export: {len(same)} of {len(student)} tensors are still the teacher's ({same[0]} is the first) - "
            "distill the student before it is exported"
        )


def _value_beside(name: str) -> str | None:
    """For the query or the key of a self-attention: the name of its value."""
    return SELF_ATTENTION.sub(r"\1v\2", name) if SELF_ATTENTION.search(name) else None


def check_not_teacher(subject: str, found: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """The teacher's weights under the flow scheduler would give noise, which no other check would notice.

    Rounding may hide how far a single tensor moved, never how far all of them did.
    """
    if found.keys() >= teacher.keys() and all(
        torch.equal(found[name], value.to(found[name].dtype)) for name, value in teacher.items()
    ):
        raise Refused(f"{subject}: these are the teacher's weights under the student's name - {EXPORT_REMEDY}")


def rounding_tolerance(tensor_count: int, dtype: torch.dtype) -> float:
    """The most that rounding usually explains of the relative error of an output, the weights stored as `dtype`.

    Storing moves each weight by at most u = eps / 2 of itself, each at random. The N layers share the output, so that
    their errors, added in squares, leave about u of it: the embedded student's is .8 u in fp16, an untrained network's
    up to 2.8 u, and 8 u are allowed. One lost bias makes 5e-3.
    """
    return 4 * torch.finfo(dtype).eps + arithmetic_tolerance(tensor_count)


def arithmetic_tolerance(tensor_count: int) -> float:
    """The most that the arithmetic in fp32 explains of the relative error of an output.

    It adds its own u = eps / 2 at each of N layers, sqrt(N) u if they are independent: the embedded student and an
    untrained network show .2 and .6 of that against float64, and twice is allowed.
    """
    return math.sqrt(tensor_count) * torch.finfo(torch.float32).eps


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def probe_velocities(student: Student) -> Tensor:
    """The velocities at `PROBE_TIMES` and random latents, the same in each call; [3, c, 8, 8] on the CPU."""
    generator, config, device = torch.Generator().manual_seed(0), student.unet.config, student.unet.device
    count, side = len(PROBE_TIMES), PROBE_LATENT_SIDE
    x = torch.randn(count, config["in_channels"], side, side, generator=generator)
    cond = torch.randn(count, PROBE_TOKENS, config["cross_attention_dim"], generator=generator)
    s = torch.tensor(PROBE_TIMES, dtype=torch.float64)
    guidance = torch.tensor(PROBE_GUIDANCE, device=device) if student.embeds_guidance else None
    return student.velocity(x.to(device), s.to(device), cond.to(device), guidance).cpu()


def check_velocities(subject: str, found: Student, expected: Student, dtype: torch.dtype) -> None:
    """A velocity at three times must be the student's own, but for the rounding of its weights to `dtype`.

    Some networks amplify that rounding beyond `rounding_tolerance`. Only then a copy of the student with rounded
    weights decides, from which the arithmetic alone may differ.
    """
    velocities, wanted = probe_velocities(found), probe_velocities(expected)
    count = len(expected.unet.state_dict())
    errors = [relative_error(v, own) for v, own in zip(velocities, wanted, strict=True)]
    if all(error <= rounding_tolerance(count, dtype) for error in errors):
        return
    rounded = probe_velocities(_rounded(expected, dtype))
    most = arithmetic_tolerance(count)
    for s, v, v_expected in zip(PROBE_TIMES, velocities, rounded, strict=True):
        if not (error := relative_error(v, v_expected)) <= most:
            raise Refused(
                f"{subject}: its velocity at s = {s} is {error:.1e} away from that of the student with rounded "
                f"weights, arithmetic explains {most:.1e} - {EXPORT_REMEDY}"
            )


def _rounded(student: Student, dtype: torch.dtype) -> Student:
    """A copy with the values that an export in `dtype` stores."""
    return Student(copy_without_hooks(student.unet).to(dtype).float(), student.vp_bridge).eval()


def check_scheduler(subject: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The scheduler must be the expected one in every setting: one for noise prediction would give noise."""
    kind, wanted = found.get("prediction_type", "epsilon"), expected["prediction_type"]
    if kind != wanted:
        raise Refused(f"{subject}: prediction_type is {kind}, the student predicts {wanted} - {EXPORT_REMEDY}")
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise Refused(f"{subject}: {key} is {found.get(key)!r}, not {expected.get(key)!r} - {EXPORT_REMEDY}")
