"""The gates that the embedded teacher has to pass before it is shipped."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from stages.prompts import derived_seed
from stages.system.atomic import atomic_write
from stages.tiny.fit import SEED, Scenes, draw_scenes
from stages.tiny.score import accuracies, score
from stages.tiny.world import ATTRIBUTES, world_grammar

MODEL = Path(__file__).with_name("model")
PICTURES = 2000
PROMPTS = 500


def complete_sentences(scenes: Scenes) -> list[str]:
    """The sentence of each picture with nothing unsaid, so that every attribute is judged."""
    labels = scenes.labels.tolist()
    words = [[world_grammar().words_of(name)[i] for name, i in zip(ATTRIBUTES, row, strict=True)] for row in labels]
    return [world_grammar().compose(dict(zip(ATTRIBUTES, row, strict=True))) for row in words]


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Pictures in [-1, 1], encoded and decoded."""
    parts = [vae.decode(vae.encode(rows).latent_dist.mean).sample for rows in pictures.split(100)]
    return torch.cat(parts).clamp(-1, 1)


def training_sentences(count: int) -> list[str]:
    """Sentences the teacher can be asked."""
    return [world_grammar().prompt(SEED + 2, index).text for index in range(count)]


def held_out_sentences(count: int) -> list[str]:
    """Sentences that name, one after the other, the colour-shape pairs that no training picture showed."""
    pairs, sizes, places = world_grammar().never, world_grammar().words_of("size"), world_grammar().words_of("place")
    return [
        world_grammar().compose({"size": sizes[i % 2], **pairs[i % len(pairs)], "place": places[i // 2 % len(places)]})
        for i in range(count)
    ]


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
    """What the judge says of true pictures, of the same through the autoencoder, and of the teacher's."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    scenes = draw_scenes(PICTURES, seed=SEED + 1)
    truth, sentences = scenes.normalised(torch.arange(PICTURES)), complete_sentences(scenes)
    sources: dict[str, Callable[[], tuple[Sequence[str], Tensor]]] = {
        "judge on true pictures": lambda: (sentences, truth / 2 + 0.5),
        "through the autoencoder": lambda: (sentences, reconstruct(pipeline.vae, truth) / 2 + 0.5),
        "teacher": lambda: ((texts := training_sentences(PROMPTS)), generate_pictures(pipeline, texts)),
        "teacher, held-out pairs": lambda: (
            (texts := held_out_sentences(PROMPTS // 5)),
            generate_pictures(pipeline, texts),
        ),
    }
    return {name: accuracies(score(*source())) for name, source in sources.items()}


MIN_ACCURACY = {"judge on true pictures": 0.99, "through the autoencoder": 0.98, "teacher": 0.95}
MIN_ACCURACY_ALL = {"teacher": 0.85}
COLUMNS = (*ATTRIBUTES, "all")


def passes(name: str, row: Mapping[str, float]) -> bool:
    """Whether a source reaches its gate; what nothing said (nan) cannot fail."""
    each_attribute = not any(row[column] < MIN_ACCURACY.get(name, 0.0) for column in ATTRIBUTES)
    return each_attribute and row["all"] >= MIN_ACCURACY_ALL.get(name, 0.0)


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The gates as a Markdown table, in percent."""
    lines = [f"| % right | {' | '.join(COLUMNS)} | gate |", f"|---|{'---|' * (len(COLUMNS) + 1)}"]
    for name, row in found.items():
        cells = ["-" if math.isnan(row[column]) else f"{100 * row[column]:.1f}" for column in COLUMNS]
        gate = ("passed" if passes(name, row) else "MISSED") if name in MIN_ACCURACY else "none"
        lines.append(f"| {name} | {' | '.join(cells)} | {gate} |")
    return "\n".join(lines)


README = """---
license: mit
---
# The embedded teacher

A whole diffusers folder with the anatomy of Stable Diffusion 1.5, small, trained from scratch on the world of
`stages/tiny/world.py`. It is remade by `python -m stages.tiny fit` (about an hour on two
cores, with `--parts teacher` in one process and the rest in another), and measured by `python -m stages.tiny check`:

{table}

Judged are {pictures} pictures that no part was fitted to, and {prompts} prompts at 25 DDIM steps and guidance 5 by the
stock pipeline. Held-out pairs are the five colour-shape pairs of `grammar.yaml` that no training picture showed.
The weights are MIT, like the code.
"""


def check(model: Path = MODEL) -> bool:
    """Measure the gates, print them and write them into the model's README; whether every gate is passed."""
    found = measure_accuracies(model)
    print(table(found))
    atomic_write(model / "README.md", README.format(table=table(found), pictures=PICTURES, prompts=PROMPTS))
    return all(passes(name, row) for name, row in found.items())
