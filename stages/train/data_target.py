"""The data itself as a target: a picture that nobody asked the teacher about teaches eps - x0, under ever fresh noise.

Only the conditional branch can learn from it, and only if the picture is a draw of what that branch should paint. A
picture that was painted with guidance w > 1 is not: a student that learns the guided pictures as its conditional branch
is guided twice when it is sampled (in the embedded world its share of right pictures fell from .98 to .57). So such
pictures teach the teacher's own velocities, and are refused here.
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

UNGUIDED = 1.0


@dataclass(frozen=True)
class DataTarget:
    """The pictures that teach themselves, by key; a row's noise and time are a function of its sample number alone."""

    x0: Mapping[str, Float[Tensor, "c h w"]]
    seed: int
    density: TimestepDensity

    @classmethod
    def of(cls, records: Iterable[Record], seed: int, density: TimestepDensity) -> "DataTarget":
        """The pictures of these records (32 KiB each at SD1.5's size).

        Raises `Refused` naming one that guidance made.
        """
        x0: dict[str, Tensor] = {}
        for record in records:
            if record.guidance_scale != UNGUIDED:
                raise Refused(
                    f"record {record.key} ({record.text!r}): target is data, but it was painted at guidance "
                    f"{record.guidance_scale:.3g}, and a student that learns such pictures is guided twice when it is "
                    "sampled - let it teach the teacher's velocity, or paint at guidance 1"
                )
            x0[record.key] = record.x0
        return cls(x0, seed, density)

    def put(self, batch: Batch, samples: Int[np.ndarray, " b"]) -> Batch:
        """The batch with each row of these pictures noised anew; `samples` are the numbers of its rows.

        There x_t = (1 - s) x0 + s eps and v_cond = eps - x0. `v_uncond`, `k` and the features stay those of the stored
        state, and count for nothing.
        """
        rows = [row for row, key in enumerate(batch.keys) if key in self.x0]
        if not rows:
            return batch
        drawn = [self._draw(int(samples[row]), self.x0[batch.keys[row]].float()) for row in rows]
        s, x_t, v = (torch.stack(column) for column in zip(*drawn, strict=True))
        at = torch.tensor(rows)
        return replace(
            batch,
            s=batch.s.index_copy(0, at, s.to(batch.s.dtype)),
            x_t=batch.x_t.index_copy(0, at, x_t.to(batch.x_t.dtype)),
            v_cond=batch.v_cond.index_copy(0, at, v.to(batch.v_cond.dtype)),
            answered=torch.ones(len(batch), dtype=torch.bool).index_fill(0, at, False),
        )

    def _draw(self, sample: int, x0: Float[Tensor, "c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Time, state and velocity of one sample, drawn on the CPU."""
        generator = torch.Generator().manual_seed(derived_seed("data", self.seed, sample))
        s = self.density.sample(1, generator).float()
        eps = torch.randn(x0.shape, generator=generator)
        return s[0], point(Linear(), x0[None], eps[None], s)[0], eps - x0
