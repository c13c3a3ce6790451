"""How the golden data was made: `python -m tests.golden.make tests/golden/data`, at 0f4666d, before names were changed.

A teacher with random weights (8 channels, 64x64 pictures), a cache of eight prompts, a run of 12 samples with its
checkpoint at 8, its export, and the pictures and journal of a run on two classes. Later versions read all of it
(test_golden.py). On one machine two versions make the same bytes: `python -m tests.golden.make FOLDER EARLIER` names
the files that differ from those of EARLIER, made at the same path; figures of time and memory aside.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from stages.tiny import anatomy

WIDTH = 16
COMMON = ["--config", "configs/tiny.yaml"]
CACHE = ["--count", "8", "--validation-count", "2", "--render.records-per-shard", "4", "--render.states.steps", "4"]
TRAIN = ["--train.max-samples", "12", "--train.batch-size", "4", "--train.checkpoint-every-samples", "8"]
TRAIN += ["--train.optimizer.warmup-samples", "4", "--train.journal-every-samples", "4"]
DAVID = ["--david.fit.steps", "3", "--david.fit.bins", "10", "--david.fit.patterns", "4"]
DAVID += ["--david.fit.dimensions", "12", "--david.fusion.warmup-samples", "4", "--validation.states", "6"]
DAVID += ["--grid.sampler.steps", "2"]
CLASSES = """
classes:
  - {name: stars, pattern: star/*, priority: top}
  - {name: rest, pattern: "[!s]*", priority: low}
"""
PICTURES = ["--count", "4", "--gate.score", "0", "--exam.pictures", "2", "--exam.sampler.steps", "2"]
PICTURES += ["--render.records-per-shard", "4", "--render.states.steps", "4"]
MEASURED = {"samples_per_second", "memory_gib", "seconds", "window_seconds", "data_wait_seconds"}
MEASURED |= {"bookkeeping_seconds", "paused_seconds"}
STAYS = ("journal.jsonl", "config.yaml", "origin.json", "COMPLETE", "david", "export")
"""What of the run is kept, beside the checkpoint at 8."""


def build_teacher(folder: Path) -> None:
    """A folder with the anatomy of Stable Diffusion 1.x, as narrow as it goes."""
    torch.manual_seed(0)
    tokenizer = anatomy.build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=anatomy.TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=1.0,
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=anatomy.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def sollune(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "stages", *words], check=True)


def main(folder: Path) -> None:
    build_teacher(folder / "teacher")
    run = folder / "run"
    sollune("cache-teacher", *COMMON, "--run", str(run), "--teacher", str(folder / "teacher"), *CACHE)
    sollune("distill", *COMMON, "--run", str(run), *TRAIN, *DAVID)
    classes = folder / "classes.yaml"
    classes.write_text(CLASSES)
    sollune("finetune-classes", *COMMON, "--run", str(run), "--classes", str(classes), *TRAIN, *PICTURES)
    for name in STAYS:
        (folder / "distill").mkdir(exist_ok=True)
        shutil.move(run / "distill" / name, folder / "distill" / name)
    (folder / "distill" / "checkpoints").mkdir()
    shutil.move(run / "distill" / "checkpoints" / "000000008", folder / "distill" / "checkpoints" / "000000008")
    for name in ("checkpoints", "export", "grids", "tensorboard"):
        shutil.rmtree(run / "classes" / name)
    shutil.move(run / "classes", folder / "classes")
    shutil.move(run / "cache", folder / "cache")
    shutil.move(run / "cache.yaml", folder / "cache.yaml")
    shutil.rmtree(run)


def content(path: Path) -> object:
    """The bytes of a file; of a journal its lines without times and memory use."""
    if path.name != "journal.jsonl":
        return path.read_bytes()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def differing(one: Path, other: Path) -> list[str]:
    """Files of two folders that are not the same, or lie in one of them alone."""
    names = {str(path.relative_to(top)) for top in (one, other) for path in top.rglob("*") if path.is_file()}
    both = [name for name in names if (one / name).is_file() and (other / name).is_file()]
    return sorted(names - set(both)) + sorted(name for name in both if content(one / name) != content(other / name))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    for earlier in sys.argv[2:]:
        print("differ:", ", ".join(differing(Path(sys.argv[1]), Path(earlier))) or "none")
