"""What a fine-tune changed of a teacher, added to the teacher's student: student + factor (fine-tune - base).

The student began as the base teacher's weights, and its own weights moved little from there, so a change of the
teacher's weights acts on the student's activations nearly as on the teacher's. Tensors are handled one by one: beside
the three models no more than two tensors are in memory.
"""

from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from stages.nets.student import Student
from stages.system.refusal import Refused

SHAPELESS_ENTRIES = ("attention_head_dim", "norm_num_groups")
"""Entries of an SD-1.x config that change what a UNet computes and none of its shapes."""


@torch.no_grad()
def add_difference(
    student: Student, base: UNet2DConditionModel, fine_tune: UNet2DConditionModel, factor: float = 1.0
) -> None:
    """Add `factor` times what the fine-tune changed of the base teacher to the student, in place and in fp32.

    The time embedding takes the plain difference too: leaving out either layer, or both, changed the paired error of a
    fine-tune by less than .002 of .424, twice the standard error.

    Raises `Refused` where the three are not of one anatomy, for a changed tensor of integers, of which no part can be
    added, and for a sum that is not finite; the student is then no longer of use.
    """
    refuse_other_anatomy(student.unet, base, "the base's teacher")
    refuse_other_anatomy(base, fine_tune, "the fine-tune")
    weights = student.unet.state_dict()  # shares the memory of the parameters
    for name, own, other in _tensor_pairs(base, fine_tune):
        if torch.equal(own, other):
            continue  # adding zero would turn -0 into 0
        if not own.is_floating_point():
            raise Refused(f"fine-tune: unet: {name}: integers that differ from the base's - take --start graft")
        target = weights[name]
        target.add_((other - own).to(target), alpha=factor)
        if not bool(target.isfinite().all()):
            raise Refused(
                f"fine-tune: unet: {name}: its difference to the base's teacher is not finite on the student - "
                "take --start graft"
            )


@torch.no_grad()
def relative_distance(base: UNet2DConditionModel, fine_tune: UNet2DConditionModel) -> float:
    """The root mean square, over all matrices and kernels, of sqrt(2) |b - a| / sqrt(|a|^2 + |b|^2).

    About |b - a| / |a| where that is small, 0 for the same UNet, and sqrt(2) for unrelated weights of any scale, which
    are orthogonal. Each tensor counts by its number of values, so that no single one, however large, decides. Vectors
    are left out: the gains of norms are near 1 in every model. Raises `Refused` for another anatomy.
    """
    refuse_other_anatomy(base, fine_tune, "the fine-tune")
    total, count = 0.0, 0
    for _, own, other in _tensor_pairs(base, fine_tune):
        if not own.is_floating_point() or own.ndim < 2:
            continue
        norms = _squared_norm(own) + _squared_norm(other)
        total += own.numel() * 2 * _squared_norm(other - own) / norms if norms else 0.0
        count += own.numel()
    return (total / count) ** 0.5 if count else 0.0


def refuse_other_anatomy(expected: UNet2DConditionModel, unet: UNet2DConditionModel, subject: str) -> None:
    """Raise `Refused` unless both have the same tensors, and compute the same with them."""
    remedy = "a difference needs two UNets of one anatomy: name another base run"
    shapes, other = ({name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (expected, unet))
    if odd := sorted(shapes.keys() ^ other.keys()):
        raise Refused(f"{subject}: unet: {len(odd)} tensors that one of two has alone, such as {odd[0]} - {remedy}")
    if odd := [name for name, shape in shapes.items() if other[name] != shape]:
        sizes = f"{list(other[odd[0]])}, not {list(shapes[odd[0]])}"
        raise Refused(f"{subject}: unet: {len(odd)} tensors of another shape, such as {odd[0]}: {sizes} - {remedy}")
    for entry in SHAPELESS_ENTRIES:
        if unet.config[entry] != expected.config[entry]:
            raise Refused(f"{subject}: unet: {entry}: {unet.config[entry]}, not {expected.config[entry]} - {remedy}")


def _tensor_pairs(base: UNet2DConditionModel, fine_tune: UNet2DConditionModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, tensor of the base and of the fine-tune, those of half precision in fp32, both where the base is."""
    others = fine_tune.state_dict()
    for name, own in base.state_dict().items():
        dtype = torch.float32 if own.is_floating_point() else own.dtype
        yield name, own.to(dtype), others[name].to(own.device, dtype)


def _squared_norm(values: Tensor) -> float:
    return float(values.norm(dtype=torch.float64).square())
