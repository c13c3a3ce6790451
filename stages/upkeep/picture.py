"""A record drawn: its picture, and what the teacher saw in each of its states."""

from pathlib import Path

import torch

from shards.record import Record
from stages.cluster import device_of
from stages.evaluate.grid import save_sheet, sheet
from stages.flow.bridge import x0_from_velocity
from stages.nets.components import load_components
from stages.nets.teacher import Teacher


def draw(record: Record, teacher: str, path: Path) -> None:
    """A row of pictures as PNG: x0, then x0_hat = x_t - s v_cond of each state, from noise to data."""
    parts = load_components(teacher, device_of("auto"), torch.float32)
    draws = record.draws
    seen = x0_from_velocity(draws.x_t.float(), draws.v_cond.float(), draws.s)
    order = draws.s.argsort(descending=True)
    latents = torch.cat([record.x0.float()[None], seen[order]]).to(parts.unet.device)
    pictures = Teacher(parts, "hold").decode(latents)
    heads = ["x0", *(f"s {float(draws.s[i]):.3f}" for i in order)]
    settings = {"key": record.key, "text": record.text, "s": draws.s[order].tolist()}
    save_sheet(sheet([record.text], heads, [picture[None] for picture in pictures]), path, settings)
