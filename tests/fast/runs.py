"""Small runs of the training for few steps: their command lines."""

from pathlib import Path

CONFIG = ("--config", "configs/tiny.yaml")
FEW_PROMPTS = (
    "--count", "12", "--validation-count", "5", "--render.records-per-shard", "6", "--render.states.steps", "8",
)  # fmt: skip
GRID = ("--grid.prompts", "a purple heart", "--grid.sampler.steps", "3")
FEW = (
    "--fast.train.max-samples", "24", "--fast.train.batch-size", "4", "--fast.train.checkpoint-every-samples", "12",
    "--fast.train.journal-every-samples", "8", "--fast.train.optimizer.warmup-samples", "4",
    "--fast.validation-states", "8", *GRID,
)  # fmt: skip


def command(run: Path, *words: str) -> list[str]:
    """The command line of a training of 24 samples on a run folder."""
    return ["distill", *CONFIG, "--run", str(run), *FEW, *words]
