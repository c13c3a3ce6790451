"""A student for other programs: `sollune export RUN` writes a diffusers folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from configs.load import load, request, resolved_yaml
from configs.refusal import Refused
from configs.strict import Strict
from stages.export.diffusers import export_diffusers
from stages.nets.saved import load_student, load_teacher_parts, open_run

__all__ = ["Config", "export_diffusers", "main", "run"]

DTYPES = {"float16": torch.float16, "float32": torch.float32}
USAGE = "usage: sollune export RUN [--checkpoint N] [--out DIR] [--dtype float16|float32] [--flow-shift S]"


class Config(Strict):
    """Write a run's model as a diffusers folder, <out>/diffusers: `sollune export RUN`."""

    run: Path = Field(description="run folder, such as runs/tiny/distill")
    checkpoint: int | None = Field(None, ge=0, description="checkpoint, in samples seen; none takes the newest")
    out: Path | None = Field(None, description="folder that will hold diffusers/; none takes RUN/export")
    dtype: Literal["float16", "float32"] = Field("float16", description="type of the weights")
    flow_shift: float = Field(
        1.0, gt=0, description="shift of the sampling grid written into the scheduler, a pure number"
    )


def run(config: Config) -> Path:
    """Export one checkpoint; returns the diffusers folder."""
    saved = open_run(config.run, config.checkpoint)
    parts = load_teacher_parts(saved.origin, torch.device("cpu"), torch.float32)
    facts = saved.origin.facts(parts, saved.samples)
    out = config.out or saved.folder / "export"
    return export_diffusers(
        load_student(saved, parts), parts.folder, out, facts, DTYPES[config.dtype], config.flow_shift
    )


def main(argv: Sequence[str]) -> int:
    """`sollune export RUN ...`."""
    words = ["--run", *argv] if argv and not argv[0].startswith("-") else list(argv)
    if not words:
        raise Refused(f"export: which run? - {USAGE}")
    asked = request(words)
    config = load(Config, "export", asked.files, asked.options)
    if asked.print_config:
        print(resolved_yaml(config, "export"), end="")
    else:
        print(f"{run(config)}: written and read back")
    return 0
