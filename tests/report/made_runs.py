"""Made-up run folders for the report: every file that a run leaves behind, in small."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from configs.values import PictureSize
from stages.nets.run_folder import Origin
from stages.sampling.grids import make_sheet, save_sheet

PROMPTS = ("a red star", 'a blue <b>ring</b> & "more"', "<script>alert('x')</script>")
BLOCKS = ("down_0", "mid", "up_0")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def make_run(
    folder: Path,
    seed: int = 0,
    checkpoints: Sequence[int] = (320, 640),
    max_samples: int = 640,
    prompts: Sequence[str] = PROMPTS,
    windows: int | None = None,
    complete: bool = True,
    evaluation: Mapping[str, Any] | None = None,
    classes: bool = False,
    sizes: Sequence[str] = (),
    rate: float = 0.01,
) -> Path:
    """A run that wrote a journal line every 64 samples, and a validation and a grid at each checkpoint."""
    folder.mkdir(parents=True)
    digests = {part: f"{number:x}" * 64 for number, part in enumerate(PARTS, 1)}
    guidance = None if windows is None else (1.0, 8.0)
    origin = Origin("models/teacher", digests, "hold", "f" * 64, windows=windows, guidance_range=guidance, sizes=())
    origin.save(folder)
    write_settings(folder, seed, max_samples, windows, prompts)
    lines = [step_line(samples, seed, rate, windows, classes) for samples in range(64, max(checkpoints) + 1, 64)]
    lines += [validation_line(samples, seed, rate, windows) for samples in checkpoints]
    lines += [exam_line(samples) for samples in checkpoints if classes]
    write_lines(folder, sorted(lines, key=lambda line: line["samples"]))
    for number, samples in enumerate(checkpoints):
        weights = folder / "checkpoints" / f"{samples:09d}" / "ema.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"")
        make_grid(folder, samples, prompts, windows, 0.2 * number, sizes)
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps({"samples": max(checkpoints), **evaluation}))
    if classes:
        (folder / "per_class.csv").write_text(
            "class,priority,all_before,all_after\nstars,top,0.5,0.9\n(outside),,0.9,0.8\n"
        )
    if complete:
        (folder / "COMPLETE").write_text(f"{max(checkpoints)}\n")
    return folder


def write_settings(
    folder: Path, seed: int, max_samples: int, windows: int | None = None, prompts: Sequence[str] = PROMPTS
) -> None:
    """`config.yaml`."""
    train = {"max_samples": max_samples, "seed": seed}
    settings = {"run": str(folder), "train": train, "windows": [windows] if windows else None, "fast": {"train": train},
                "grid": {"prompts": list(prompts)}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump({"distill": settings}))


def write_lines(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """The journal."""
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def step_line(samples: int, seed: int, rate: float, windows: int | None, classes: bool) -> dict[str, Any]:
    """The means over the steps before `samples`."""
    loss = 1 / (1 + rate * samples) + 0.01 * seed
    blocks = {} if windows else {name: loss * (1 + number) for number, name in enumerate(BLOCKS)}
    by_class = {"flow_by_class": {"stars": loss, "(outside)": None}} if classes else {}
    return {
        "samples": samples, "loss": loss, "flow": loss, "guidance": loss / 3, "block_term": loss / 2, "blocks": blocks,
        "lambdas": dict.fromkeys(blocks, 1 + samples / 1000), "flow_by_s": [loss, None, float("nan"), loss / 2],
        "window_seconds": 2.0, "paused_seconds": 1.0, "samples_per_second": 32.0, **by_class,
    }  # fmt: skip


def validation_line(samples: int, seed: int, rate: float, windows: int | None) -> dict[str, Any]:
    """The errors at a checkpoint."""
    error = 0.5 / (1 + rate * samples) + 0.01 * seed
    if windows:
        by_s = [error] * windows
        return {"samples": samples, "kind": "validation", "landing": error, "landing_by_s": by_s, "end": 2 * error,
                "seconds": 1.0}  # fmt: skip
    by_s = [error, error / 2, None, error]
    return {"samples": samples, "kind": "validation", "held_out": error, "held_out_by_s": by_s, "seen": error / 2,
            "seen_by_s": by_s, "seen_new_noise": error, "seen_new_noise_by_s": by_s}  # fmt: skip


def exam_line(samples: int) -> dict[str, Any]:
    """The exam of classes at a checkpoint."""
    shares = {"stars": samples / 1000, "(outside)": 0.9}
    return {"samples": samples, "kind": "classes", "wrong": 0.5, "all": shares, "paired_error": shares, "lost": shares}


def paired(score: float, steps: int = 25) -> dict[str, Any]:
    """An evaluation whose student has this paired score."""
    errors = {"steps": steps, "student": score, "floor": 0.0, "ceiling": 1.0, "score": score}
    return {"paired": {"student": [{**errors, "interval": [score - 0.01, score + 0.01]}]}, "size": "40x40"}


def gates(*passed: bool) -> dict[str, Any]:
    """An evaluation with limits that are kept or missed."""
    return {"gates": [{"name": f"limit {number}", "found": 0.1, "asked": "<= 0.2", "passed": one}
                      for number, one in enumerate(passed)]}  # fmt: skip


def make_grid(
    folder: Path, samples: int, prompts: Sequence[str], windows: int | None, shade: float, sizes: Sequence[str] = ()
) -> Path:
    """A comparison grid whose pictures are of one grey each: row / 10 + column / 4, the students' darker by `shade`."""
    titles = ["teacher 25", "student 25", f"student {windows or 4}"]
    shapes = [PictureSize.parse(size) for size in sizes] or [PictureSize(40, 40)]
    columns = [
        torch.stack([
            torch.full((3, size.height, size.width), max(0.0, row / 10 + column / 4 - shade * (column > 0)))
            for row in range(len(prompts))
        ])
        for size in shapes
        for column in range(3)
    ]  # fmt: skip
    titles = titles if len(sizes) < 2 else [f"{size} {title}" for size in sizes for title in titles]
    settings: dict[str, Any] = {"samples": samples, "prompts": list(prompts), "sampler": {"steps": 25}}
    settings |= {"sizes": list(sizes)} if len(sizes) > 1 else {}
    settings |= {"columns": titles, "rows": list(prompts), "windows": windows} if windows else {}
    path = folder / "grids" / f"{samples:09d}.png"
    save_sheet(make_sheet(prompts, titles, columns), path, settings)
    return path
