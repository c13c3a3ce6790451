"""Defects of the original experiment that no setting of the product can have, as changes of the rows to train on.

docs/david.md describes the original's trainer. Its third defect of this kind, the teacher under the student's name, is
an arm's `model: teacher_as_student`: the product refuses to export that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from shards.batch import Batch
from shards.reader import Reader
from shards.stream.order import Indices
from stages.ablation.study import DefectName
from stages.cached_training import Alteration
from stages.flow.bridge import Bridge
from stages.flow.path import per_sample
from stages.flow.schedule import NoiseSchedule
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed

DEFAULT_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
"""Of diffusers' DDPMScheduler, where nothing is set; Stable Diffusion has scaled_linear from 0.00085 to 0.012."""

RowChange: TypeAlias = Callable[[Batch, Teacher], Batch]


def noise_input(batch: Batch, teacher: Teacher) -> Batch:
    """The same prompts and times with white noise as the state at every time, and the teacher's answers there.

    The original's "clean" latents were noise themselves, so its states were of unit variance on the teacher's path at
    every step. A state's noise follows from its record and its place there.
    """
    places = zip(batch.keys, batch.state_index.tolist(), strict=True)
    noise = torch.stack([_noise_of(key, place, batch.x_s[0]) for key, place in places])
    ones = torch.ones(len(batch))
    scale = teacher.bridge.teacher_input(ones, batch.s.float())  # x g(s) is the network's input
    x_s = (noise / per_sample(scale, noise)).half()
    device, dtype = teacher.uncond.device, torch.float32
    moved = replace(batch, x_s=x_s).to(device, dtype)
    output = teacher.predict(moved.x_s, moved.s, moved.k, moved.cond, teacher.uncond)
    # Copies, because training cannot take tensors of inference mode.
    v_cond, v_uncond = (v.cpu().half().clone() for v in (output.v_cond, output.v_uncond))
    features = {block: output.features[block].cpu().to(old.dtype).clone() for block, old in batch.features.items()}
    return replace(batch, x_s=x_s, v_cond=v_cond, v_uncond=v_uncond, features=features)


def default_schedule(batch: Batch, teacher: Teacher) -> Batch:
    """The same states and noise predictions, read by the library's default schedule instead of the teacher's own.

    The teacher's input x g(s) at step k stays, and so does its eps_hat = x + (1 - s) v; the time, the state on the
    linear path and the velocity follow from the wrong alpha and sigma of that step.
    """
    own, wrong = teacher.bridge, default_bridge(teacher)
    s, k = batch.s.double(), batch.k
    wrong_s = wrong.s_of_k(k)
    x = batch.x_s.double()
    network_input = own.teacher_input(x, s)
    wrong_scale = wrong.teacher_input(torch.ones_like(s), wrong_s)
    wrong_x = network_input / per_sample(wrong_scale, x)

    def velocity(v: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        eps_hat = x + per_sample(1 - s, x) * v.double()
        return ((eps_hat - wrong_x) / per_sample(1 - wrong_s, x)).float()

    return replace(
        batch, x_s=wrong_x.float(), s=wrong_s.float(), v_cond=velocity(batch.v_cond), v_uncond=velocity(batch.v_uncond)
    )


def default_bridge(teacher: Teacher) -> Bridge:
    """The bridge of the library's default schedule, of as many steps as the teacher's."""
    config = {**DEFAULT_BETAS, "num_train_timesteps": teacher.components.schedule.steps}
    return Bridge(NoiseSchedule.from_config({**config, "prediction_type": "epsilon"}), teacher.bridge.tail)


ROW_CHANGES: Mapping[DefectName, RowChange] = {"noise_input": noise_input, "default_schedule": default_schedule}
"""In the order in which they act: the state first, then how it is read."""


class AlteredReader(Reader):
    """A reader whose rows are changed after they are read."""

    def __init__(self, reader: Reader, change: Callable[[Batch], Batch]) -> None:
        self.__dict__.update(reader.__dict__)
        self._change = change
        self.workers = 0  # a change may ask the teacher, which serves one thread

    def gather(self, records: Indices, state_indices: Indices) -> Batch:
        """The changed rows."""
        return self._change(super().gather(records, state_indices))


def alteration_of(defects: Sequence[DefectName]) -> Alteration | None:
    """What these defects change of a training; None for none."""
    if not defects:
        return None
    changes = [change for name, change in ROW_CHANGES.items() if name in defects]

    def alter_reader(reader: Reader, teacher: Teacher) -> Reader:
        def change_rows(batch: Batch) -> Batch:
            for change in changes:
                batch = change(batch, teacher)
            return batch

        return AlteredReader(reader, change_rows)

    return Alteration(" + ".join(name for name in ROW_CHANGES if name in defects), alter_reader)


def _noise_of(key: str, state_index: int, like: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
    seed = derived_seed(f"noise as the state {key}", 0, state_index)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
