"""How well digits can be read: real ones, the same through a teacher's autoencoder, and those that it generates."""

from collections.abc import Mapping
from pathlib import Path

import torch

from stages.system.refusal import Refused
from stages.tiny.check import generate_pictures, load_pipeline, reconstruct, table
from stages.tiny.digits.score import score
from stages.tiny.digits.world import DIGITS, draw_held_out
from stages.tiny.judge import accuracies

SEED, PROMPTS = 19, 500


def measure_accuracies(model: Path, prompts: int = PROMPTS) -> dict[str, Mapping[str, float]]:
    """The judge's accuracies on held-out digits, on the same through the autoencoder, and on the teacher's pictures."""
    pipeline = load_pipeline(model)
    scenes = draw_held_out(SEED)
    truth = scenes.normalised(torch.arange(len(scenes.texts)))
    texts = [DIGITS.grammar().prompt(SEED, index).text for index in range(prompts)]
    scores = {
        "real digits, held out": score(scenes.texts, truth / 2 + 0.5),
        "through the autoencoder": score(scenes.texts, reconstruct(pipeline.vae, truth) / 2 + 0.5),
        "teacher": score(texts, generate_pictures(pipeline, texts)),
    }
    return {name: accuracies(values) for name, values in scores.items()}


def check(model: Path) -> None:
    """Measure the accuracies and print them; raises `Refused` where there is no teacher."""
    if not (model / "model_index.json").is_file():
        raise Refused(f"--model: {model}: holds no teacher - make one with python -m stages.tiny digits")
    print(table(measure_accuracies(model), {}))
