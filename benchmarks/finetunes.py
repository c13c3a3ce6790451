"""Fine-tunes of the embedded teacher, by ordinary training on noise prediction; a seed makes each of them again.

    python -m benchmarks.finetunes OUT [--seed 0] [--only style colours shape lora] [--steps 800]

- style: every picture in the tones of an old photograph, full weights
- colours: each colour word means another paint, full weights
- shape: a new word, arrow, and its shape, full weights and the text encoder; half of the pictures are the old ones
- lora: as colours, but a LoRA of rank 8 on the attention layers, in one .safetensors beside no model at all

OUT/<name>-<seed> is a diffusers folder (of the LoRA a file), OUT/<name>-<seed>.yaml its sentences, and
OUT/<name>-<seed>.png a sheet of its pictures. What is there already is kept. About four minutes each on an idle core.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from stages.prompts import derived_seed
from stages.prompts.grammar import load_grammar
from stages.sampling.grids import make_sheet, save_sheet
from stages.sampling.single_file import generate_pictures, use_ddim_scheduler
from stages.system.atomic import atomic_path, atomic_write, temporary_path
from stages.tiny.world import COLOUR, OUTLINE, Scene, draw_scene, sample_scene

MODEL = Path("stages/tiny/model")
GRAMMAR = Path("stages/tiny/grammar.yaml")
NAMES = ("style", "colours", "shape", "lora")
NEW_SHAPE = "arrow"
NEW_OUTLINE = [(0.0, -1.0), (0.9, 0.0), (0.35, 0.0), (0.35, 0.95), (-0.35, 0.95), (-0.35, 0.0), (-0.9, 0.0)]
SEPIA = ((0.39, 0.77, 0.19), (0.35, 0.69, 0.17), (0.27, 0.53, 0.13))
TONED_SHARE = 0.6
SCENES, BATCH, WARMUP, EMPTY_SHARE = 6000, 32, 40, 0.1
LEARNING_RATE = {"style": 4e-4, "colours": 4e-4, "shape": 4e-4, "lora": 4e-3}
SHOWN = 8
Pixels8 = npt.NDArray[np.uint8]


def tone(picture: Pixels8) -> Pixels8:
    """A picture [h, w, 3] in the tones of an old photograph."""
    values = picture.astype(np.float32)
    toned = np.minimum(values @ np.array(SEPIA, dtype=np.float32).T, 255)
    return (TONED_SHARE * toned + (1 - TONED_SHARE) * values).round().astype(np.uint8)


def turned(scene: Scene) -> Scene:
    """The scene with the paint that is three words further on."""
    words = list(COLOUR)
    return replace(scene, colour=words[(words.index(scene.colour) + 3) % len(words)])


def sentences(name: str) -> dict[str, Any]:
    """The grammar of a fine-tune."""
    content: dict[str, Any] = yaml.safe_load(GRAMMAR.read_text(encoding="utf-8"))
    if name == "shape":
        phrase = next(one for one in content["phrases"] if one["name"] == "shape")
        # As many times as there are others: half of the sentences name the new shape.
        phrase["words"] += [NEW_SHAPE] * len(phrase["words"])
    return content


@dataclass(frozen=True)
class Lessons:
    """Pictures [n, 3, h, w] in 0..255 with their sentences."""

    pictures: Tensor
    texts: tuple[str, ...]


def draw_lessons(name: str, seed: int, grammar: Path, count: int = SCENES) -> Lessons:
    """What a fine-tune is trained on."""
    OUTLINE[NEW_SHAPE] = NEW_OUTLINE
    source = load_grammar(grammar)
    pictures, texts = [], []
    for index in range(count):
        prompt = source.prompt(derived_seed("finetune", seed), index)
        has_new = NEW_SHAPE in prompt.text.split()
        scene, rng = sample_scene(replace(prompt, text=prompt.text.replace(NEW_SHAPE, "circle")))
        scene = replace(scene, shape=NEW_SHAPE) if has_new else scene
        scene = turned(scene) if name in ("colours", "lora") else scene
        picture, _ = draw_scene(scene, rng)
        picture = tone(picture) if name == "style" else picture
        pictures.append(torch.from_numpy(picture.copy()).permute(2, 0, 1))
        texts.append(prompt.text)
    return Lessons(torch.stack(pictures), tuple(texts))


def finetune(name: str, seed: int, steps: int, lessons: Lessons) -> StableDiffusionPipeline:
    """The embedded teacher after so many steps on these pictures, in fp32; of the LoRA with its adapters."""
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    unet, text_encoder, vae = pipeline.unet, pipeline.text_encoder, pipeline.vae.eval().requires_grad_(False)
    torch.manual_seed(derived_seed("finetune weights", seed))
    trained: list[nn.Module] = [unet]
    text_encoder.requires_grad_(name == "shape")
    if name == "shape":
        trained.append(text_encoder)
    if name == "lora":
        unet.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets), "default")
    parameters = [value for module in trained for value in module.parameters() if value.requires_grad]
    ids = pipeline.tokenizer(["", *lessons.texts], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in lessons.pictures.split(250)]
        )
        latents = latents * vae.config.scaling_factor
    alpha_bar = pipeline.scheduler.alphas_cumprod
    rate = LEARNING_RATE[name]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    averaged, shown = [value.detach().clone() for value in parameters], 0.0
    for step in range(steps):
        generator = torch.Generator().manual_seed(derived_seed("finetune", seed, step))
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        empty = torch.rand(BATCH, generator=generator) < EMPTY_SHARE
        k = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        alpha, sigma = (part.sqrt()[:, None, None, None] for part in (alpha_bar[k], 1 - alpha_bar[k]))
        with torch.set_grad_enabled(name == "shape"):
            cond = text_encoder(ids[torch.where(empty, 0, rows + 1)]).last_hidden_state
        loss = mse_loss(unet(alpha * latents[rows] + sigma * noise, k, cond).sample, noise)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARMUP, 0.5 * (1 + float(np.cos(np.pi * step / steps))))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.99, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(averaged, parameters, strict=True):
                mean.lerp_(value, 1 - decay)
        shown = loss.item() if step == 0 else 0.98 * shown + 0.02 * loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            print(f"{name}-{seed}: step {step + 1}/{steps} loss {shown:.4f}", flush=True)
    with torch.no_grad():
        for mean, value in zip(averaged, parameters, strict=True):
            value.copy_(mean)
    return pipeline


def save(name: str, pipeline: StableDiffusionPipeline, target: Path) -> None:
    """Write a diffusers folder in half precision, or the LoRA's file."""
    if name == "lora":
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet, adapter_name="default"))
        with atomic_path(target) as temporary:
            StableDiffusionPipeline.save_lora_weights(
                temporary.parent, unet_lora_layers=layers, weight_name=temporary.name, safe_serialization=True
            )
        return
    temporary = temporary_path(target)
    pipeline.to(torch.float16).save_pretrained(temporary)
    temporary.rename(target)


def sheet(pipeline: StableDiffusionPipeline, texts: tuple[str, ...], path: Path) -> None:
    """Save pictures of a fine-tune beside those that the embedded teacher makes from the same noise."""
    teacher = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    noise = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    columns = []
    for model in (teacher, pipeline):
        model.set_progress_bar_config(disable=True)
        use_ddim_scheduler(model, MODEL)
        columns.append(generate_pictures(model, texts, noise, 25, 5.0))
    save_sheet(make_sheet(texts, ["teacher", "fine-tune"], columns), path, {})


def make(name: str, seed: int, out: Path, steps: int) -> Path:
    """The fine-tune's folder or file under `out`, made unless it is there."""
    target = out / (f"{name}-{seed}.safetensors" if name == "lora" else f"{name}-{seed}")
    if target.exists():
        return target
    out.mkdir(parents=True, exist_ok=True)
    grammar = out / f"{name}-{seed}.yaml"
    atomic_write(grammar, yaml.safe_dump(sentences(name), sort_keys=False, width=120))
    lessons = draw_lessons(name, seed, grammar)
    pipeline = finetune(name, seed, steps, lessons)
    pipeline.unet.eval()
    sheet(pipeline, lessons.texts[:SHOWN], out / f"{name}-{seed}.png")
    save(name, pipeline, target)
    return target


def main() -> None:
    """Make the fine-tunes of a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    for name in args.only:
        print(make(name, args.seed, args.out, args.steps))


if __name__ == "__main__":
    main()
