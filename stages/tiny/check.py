"""The gates that the embedded teacher has to pass before it is shipped."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from stages.prompts import derived_seed
from stages.tiny.fit import SEED, Scenes, draw_scenes
from stages.tiny.score import score, shares
from stages.tiny.world import grammar

MODEL = Path(__file__).with_name("model")
PICTURES = 2000
PROMPTS = 500


def complete_sentences(scenes: Scenes) -> list[str]:
    """The sentence of each picture with nothing unsaid, so that every attribute is judged."""
    names = ("size", "colour", "shape", "place", "background")
    words = [
        [grammar().words_of(name)[i] for name, i in zip(names, row, strict=True)] for row in scenes.labels.tolist()
    ]
    return [grammar().say(dict(zip(names, row, strict=True))) for row in words]


@torch.inference_mode()
def through(vae: AutoencoderKL, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Pictures in [-1, 1], encoded and decoded."""
    parts = [vae.decode(vae.encode(rows).latent_dist.mean).sample for rows in pictures.split(100)]
    return torch.cat(parts).clamp(-1, 1)


def asked(count: int, held_out: bool) -> list[str]:
    """Sentences the teacher can be asked; `held_out` ones name a colour-shape pair it was never shown."""
    sentences = []
    for index in range(count):
        text = grammar().prompt(SEED + 2, index).text
        if held_out:
            pair = grammar().never[index % len(grammar().never)]
            whole = {"size": ("small", "large")[index % 2], "place": grammar().words_of("place")[index % 3]}
            text = grammar().say({"size": whole["size"], **pair, "place": whole["place"]})
        sentences.append(text)
    return sentences


def painted(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> Float[Tensor, "b 3 64 64"]:
    """Pictures of the stock pipeline: 25 DDIM steps, guidance 5, one seed a picture."""
    pictures = []
    for first in range(0, len(texts), 50):
        batch = list(texts[first : first + 50])
        seeds = [torch.Generator().manual_seed(derived_seed("check", first + i)) for i in range(len(batch))]
        pictures.append(
            pipeline(batch, num_inference_steps=25, guidance_scale=5.0, generator=seeds, output_type="pt").images
        )
    return torch.cat(pictures)


def gates(model: Path = MODEL) -> dict[str, Mapping[str, float]]:
    """What the judge says of true pictures, of the same through the autoencoder, and of the teacher's."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    scenes = draw_scenes(PICTURES, seed=SEED + 1)
    truth, sentences = scenes.normalised(torch.arange(PICTURES)), complete_sentences(scenes)
    sources: dict[str, Callable[[], tuple[Sequence[str], Tensor]]] = {
        "judge on true pictures": lambda: (sentences, truth / 2 + 0.5),
        "through the autoencoder": lambda: (sentences, through(pipeline.vae, truth) / 2 + 0.5),
        "teacher": lambda: ((texts := asked(PROMPTS, False)), painted(pipeline, texts)),
        "teacher, held-out pairs": lambda: ((texts := asked(PROMPTS // 5, True)), painted(pipeline, texts)),
    }
    return {name: shares(score(*source())) for name, source in sources.items()}


LEAST = {"judge on true pictures": 0.99, "through the autoencoder": 0.98, "teacher": 0.95}
LEAST_ALL = {"teacher": 0.85}


def check(model: Path = MODEL) -> bool:
    """Print the table of `gates`; whether every gate is passed."""
    passed = True
    for name, row in gates(model).items():
        least, least_all = LEAST.get(name, 0.0), LEAST_ALL.get(name, 0.0)
        fine = row["all"] >= least_all and not any(value < least for key, value in row.items() if key != "all")
        passed &= fine
        figures = " ".join(f"{key} {100 * value:5.1f}" for key, value in row.items())
        print(f"{name:26s} {figures}  {'pass' if fine else 'FAIL'}", flush=True)
    return passed
