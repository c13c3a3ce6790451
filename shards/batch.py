"""Rows for training: one draw of one record each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shards.record import Record


@dataclass(frozen=True)
class Batch:
    """b rows; `draw` is the row's place among the draws of its record."""

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    class_names: tuple[str, ...]
    cond: Float[Tensor, "b L d"]
    x_t: Float[Tensor, "b c h w"]
    v_cond: Float[Tensor, "b c h w"]
    v_uncond: Float[Tensor, "b c h w"]
    s: Float[Tensor, " b"]
    k: Int[Tensor, " b"]
    features: Mapping[str, Float[Tensor, "b n_b"]]
    draw: Int[Tensor, " b"]
    own_guidance: Float[Tensor, " b"] | None = None
    """float32; where `v_cond` is the picture's own velocity, the guidance scale under which it is meant to be met, at
    least 1; 0 where the teacher answered; None where he always did"""
    group: Int[Tensor, " b"] | None = None
    """which of some groups each row is told with in the journal; None where they are not told apart"""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, which: slice) -> "Batch":
        """Some of the rows."""
        told = {name: values for name, values in vars(self).items() if name != "features" and values is not None}
        return replace(
            self,
            **{name: values[which] for name, values in told.items()},
            features={block: values[which] for block, values in self.features.items()},
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Batch":
        """The same rows elsewhere; s stays float32, because a time does not survive half precision."""

        def moved(values: Tensor) -> Tensor:
            # As stored, and cast over there: a cast here would leave pinned memory and double the bytes on the way.
            return values.to(device, non_blocking=True).to(dtype)

        def placed(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, non_blocking=True)

        return replace(
            self,
            cond=moved(self.cond),
            x_t=moved(self.x_t),
            v_cond=moved(self.v_cond),
            v_uncond=moved(self.v_uncond),
            s=self.s.to(device, non_blocking=True),
            k=self.k.to(device, non_blocking=True),
            features={block: moved(values) for block, values in self.features.items()},
            draw=self.draw.to(device, non_blocking=True),
            own_guidance=placed(self.own_guidance),
            group=placed(self.group),
        )


def collate(records: Sequence[Record], draws: Sequence[int]) -> Batch:
    """Row i is draw `draws[i]` of `records[i]`."""
    rows = list(zip(records, draws, strict=True))
    return Batch(
        keys=tuple(record.key for record in records),
        texts=tuple(record.text for record in records),
        class_names=tuple(record.class_name for record in records),
        cond=torch.stack([record.cond for record in records]),
        x_t=torch.stack([record.draws.x_t[i] for record, i in rows]),
        v_cond=torch.stack([record.draws.v_cond[i] for record, i in rows]),
        v_uncond=torch.stack([record.draws.v_uncond[i] for record, i in rows]),
        s=torch.stack([record.draws.s[i] for record, i in rows]),
        k=torch.stack([record.draws.k[i] for record, i in rows]),
        features={
            block: torch.stack([record.features.by_block[block][i] for record, i in rows])
            for block in records[0].features.by_block
        },
        draw=torch.tensor(list(draws), dtype=torch.int64),
    )


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches, one after the other; they must have the same blocks, and groups all or none of them."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    own = [torch.zeros(len(batch)) if batch.own_guidance is None else batch.own_guidance for batch in batches]
    return Batch(
        keys=tuple(key for batch in batches for key in batch.keys),
        texts=tuple(text for batch in batches for text in batch.texts),
        class_names=tuple(name for batch in batches for name in batch.class_names),
        cond=joined("cond"),
        x_t=joined("x_t"),
        v_cond=joined("v_cond"),
        v_uncond=joined("v_uncond"),
        s=joined("s"),
        k=joined("k"),
        features={block: torch.cat([batch.features[block] for batch in batches]) for block in batches[0].features},
        draw=joined("draw"),
        own_guidance=None if all(batch.own_guidance is None for batch in batches) else torch.cat(own),
        group=None if batches[0].group is None else joined("group"),
    )
