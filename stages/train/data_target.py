"""The data itself as a target: a picture teaches its own velocity eps - x0, under ever fresh noise.

A picture comes with the guidance scale under which it is to be drawn, and the loss lets the student meet eps - x0 under
that guidance: a student whose conditional branch learns what guidance made is guided twice when it is sampled (in the
embedded world its share of right pictures fell from .98 to .57).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.refusal import Refused
from shards.batch import Batch
from shards.record import Record
from stages.flow.path import Linear, point
from stages.flow.timesteps import TimestepDensity
from stages.prompts import derived_seed


@dataclass(frozen=True)
class DataTarget:
    """The pictures that teach themselves, by key; a row's noise and time are a function of its sample number alone."""

    x0: Mapping[str, Float[Tensor, "c h w"]]
    guidance: Mapping[str, float]
    """the scale under which each is to be drawn"""
    seed: int
    density: TimestepDensity

    @classmethod
    def of(
        cls, records: Iterable[Record], guidance: Mapping[str, float], seed: int, density: TimestepDensity
    ) -> "DataTarget":
        """The pictures of these records (32 KiB each at SD1.5's size), each at its scale, or that which painted it.

        Raises `Refused` naming one with a scale below 1, under which v_cond hardly shows.
        """
        x0: dict[str, Tensor] = {}
        scales: dict[str, float] = {}
        for record in records:
            x0[record.key], scales[record.key] = record.x0, guidance.get(record.key, record.guidance_scale)
            if scales[record.key] < 1:
                raise Refused(
                    f"record {record.key} ({record.text!r}): target is data, but it was painted at guidance "
                    f"{scales[record.key]:.3g} - paint at guidance 1 or above, or let it teach the teacher's velocities"
                )
        return cls(x0, scales, seed, density)

    def put(self, batch: Batch, samples: Int[np.ndarray, " b"]) -> Batch:
        """The batch with each row of these pictures noised anew; `samples` are the numbers of its rows.

        There x_t = (1 - s) x0 + s eps, v_cond = eps - x0, and `own_guidance` is the picture's. `v_uncond`, `k` and the
        features stay those of the stored state, and count for nothing.
        """
        rows = [row for row, key in enumerate(batch.keys) if key in self.x0]
        if not rows:
            return batch
        drawn = [self._draw(int(samples[row]), self.x0[batch.keys[row]].float()) for row in rows]
        s, x_t, v = (torch.stack(column) for column in zip(*drawn, strict=True))
        at, scales = torch.tensor(rows), torch.tensor([self.guidance[batch.keys[row]] for row in rows])
        return replace(
            batch,
            s=batch.s.index_copy(0, at, s.to(batch.s.dtype)),
            x_t=batch.x_t.index_copy(0, at, x_t.to(batch.x_t.dtype)),
            v_cond=batch.v_cond.index_copy(0, at, v.to(batch.v_cond.dtype)),
            own_guidance=torch.zeros(len(batch)).index_copy(0, at, scales),
        )

    def _draw(self, sample: int, x0: Float[Tensor, "c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Time, state and velocity of one sample, drawn on the CPU."""
        generator = torch.Generator().manual_seed(derived_seed("data", self.seed, sample))
        s = self.density.sample(1, generator).float()
        eps = torch.randn(x0.shape, generator=generator)
        return s[0], point(Linear(), x0[None], eps[None], s)[0], eps - x0
