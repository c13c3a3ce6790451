"""The accuracies that the embedded teacher must reach before it is shipped."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from stages.prompts import derived_seed
from stages.system.atomic import atomic_write
from stages.tiny.embedded import SEED
from stages.tiny.folder import MODEL
from stages.tiny.scenes import Scenes
from stages.tiny.score import accuracies, score
from stages.tiny.world import ATTRIBUTES, draw_scenes, world_grammar

PICTURES = 2000
PROMPTS = 500


def complete_sentences(scenes: Scenes) -> list[str]:
    """The full sentence of each picture, so that every attribute is scored."""
    grammar = world_grammar()
    return [
        grammar.compose({name: grammar.words_of(name)[i] for name, i in zip(ATTRIBUTES, row, strict=True)})
        for row in scenes.labels.tolist()
    ]


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Pictures in [-1, 1], encoded and decoded."""
    parts = [vae.decode(vae.encode(rows).latent_dist.mean).sample for rows in pictures.split(100)]
    return torch.cat(parts).clamp(-1, 1)


def held_out_sentences(count: int) -> list[str]:
    """Sentences that name, in turn, the colour-shape pairs that are in no training picture."""
    grammar = world_grammar()
    pairs, sizes, places = grammar.never, grammar.words_of("size"), grammar.words_of("place")
    return [
        grammar.compose({"size": sizes[i % 2], **pairs[i % len(pairs)], "place": places[i // 2 % len(places)]})
        for i in range(count)
    ]


def load_pipeline(model: Path) -> StableDiffusionPipeline:
    """A teacher in the stock pipeline with DDIM, without progress bars."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_pictures(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> Float[Tensor, "b 3 64 64"]:
    """Pictures of the stock pipeline: 25 DDIM steps, guidance 5, one seed a picture."""
    pictures = []
    for first in range(0, len(texts), 50):
        batch = list(texts[first : first + 50])
        seeds = [torch.Generator().manual_seed(derived_seed("check", first + i)) for i in range(len(batch))]
        pictures.append(
            pipeline(batch, num_inference_steps=25, guidance_scale=5.0, generator=seeds, output_type="pt").images
        )
    return torch.cat(pictures)


def measure_accuracies(model: Path = MODEL) -> dict[str, Mapping[str, float]]:
    """Accuracies of true pictures, of the same through the autoencoder, and of the teacher's, by the classifier."""
    pipeline = load_pipeline(model)
    scenes = draw_scenes(PICTURES, seed=SEED + 1)
    truth, sentences = scenes.normalised(torch.arange(PICTURES)), complete_sentences(scenes)
    prompts = [world_grammar().prompt(SEED + 2, index).text for index in range(PROMPTS)]
    held_out = held_out_sentences(PROMPTS // 5)
    scores = {
        "classifier on true pictures": score(sentences, truth / 2 + 0.5),
        "through the autoencoder": score(sentences, reconstruct(pipeline.vae, truth) / 2 + 0.5),
        "teacher": score(prompts, generate_pictures(pipeline, prompts)),
        "teacher, held-out pairs": score(held_out, generate_pictures(pipeline, held_out)),
    }
    return {name: accuracies(values) for name, values in scores.items()}


MIN_ACCURACY = {"classifier on true pictures": 0.99, "through the autoencoder": 0.98, "teacher": 0.95}
MIN_ACCURACY_ALL = {"teacher": 0.85}


def passes(name: str, row: Mapping[str, float]) -> bool:
    """Whether a source reaches its minima; an attribute that no sentence names (nan) cannot fail."""
    any_below = any(row[attribute] < MIN_ACCURACY.get(name, 0.0) for attribute in ATTRIBUTES)
    return not any_below and row["all"] >= MIN_ACCURACY_ALL.get(name, 0.0)


def table(rows: Mapping[str, Mapping[str, float]], gates: Mapping[str, str]) -> str:
    """The accuracies as a Markdown table, in percent; gates: source -> its word in a last column."""
    columns = list(next(iter(rows.values())))
    head = [*columns, "gate"] if gates else columns
    lines = [f"| % right | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for name, row in rows.items():
        cells = ["-" if math.isnan(row[column]) else f"{100 * row[column]:.1f}" for column in columns]
        cells += [gates.get(name, "none")] if gates else []
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


README = """---
license: mit
---
# The embedded teacher

A whole diffusers folder with the anatomy of Stable Diffusion 1.5, small, trained from scratch on the world of
`stages/tiny/world.py`. It is remade by `python -m stages.tiny fit` (about an hour on two
cores, with `--parts teacher` in one process and the rest in another), and measured by `python -m stages.tiny check`:

{table}

Scored are {pictures} pictures that no part was fitted to, and {prompts} prompts at 25 DDIM steps and guidance 5 by the
stock pipeline. Held-out pairs are the five colour-shape pairs of `grammar.yaml` that are in no training picture.
The weights are MIT, like the code.
"""


def check(model: Path = MODEL) -> bool:
    """Measure the accuracies, print them and write them into the model's README; whether all reach their minimum."""
    rows = measure_accuracies(model)
    gates = {name: "passed" if passes(name, row) else "MISSED" for name, row in rows.items() if name in MIN_ACCURACY}
    text = table(rows, gates)
    print(text)
    atomic_write(model / "README.md", README.format(table=text, pictures=PICTURES, prompts=PROMPTS))
    return all(passes(name, row) for name, row in rows.items())
