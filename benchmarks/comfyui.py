"""Stable Diffusion 1.5's own size: an export of a random student, timed, and the file opened by ComfyUI's own loader.

    python -m benchmarks.comfyui --work DIR [--comfyui FOLDER] [--keep]

Without ComfyUI's folder the export alone is made: verified as every export is, and its 1130 tensors counted here. With
it (a checkout; its requirements installed, no display and no GPU needed) its loader must open the file with nothing
missing, and its ModelSamplingSD3 must give what our formula gives: x - s v(x, 1000 s). DIR needs 11 GB.
"""

import argparse
import logging
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from benchmarks.full_size import CONTEXT, make_full_size
from stages.export import export_all
from stages.export.verify_export import ExportOptions
from stages.nets.student import Student
from stages.system.refusal import Refused

COUNTS = {"model": 686, "first_stage_model": 248, "cond_stage_model": 196}
SHIFT, S = 2.5, 0.37345
MAX_RELATIVE_ERROR = 1e-2
"""ComfyUI computes on a CPU in fp32 from fp16 weights, with attention of its own."""


def main() -> int:
    """Make the student, export it, and let ComfyUI open the file."""
    args = _parse_args()
    if args.comfyui and not (args.comfyui / "comfy" / "sd.py").is_file():
        raise Refused(f"{args.comfyui}: no ComfyUI is here (comfy/sd.py is missing) - name a checkout of it")
    with print_timing("teacher of SD1.5's size, random"):
        teacher = make_full_size(args.work / "teacher")
    with print_timing("student, every tensor moved"):
        student = perturb_teacher(teacher)
    out = args.work / "distill" / "export"
    with print_timing("export in fp16, verified"):
        _, file = export_all(
            student, teacher, out, {"teacher": "random", "tail": "hold"}, ExportOptions(flow_shift=SHIFT)
        )
    check_tensor_counts(file)
    if args.comfyui:
        compare(args.comfyui, file, student)
    if not args.keep:
        shutil.rmtree(args.work)
    return 0


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, removed at the end")
    parser.add_argument("--comfyui", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    return parser.parse_args()


@contextmanager
def print_timing(what: str) -> Iterator[None]:
    """Print how long the block took, in wall and processor time, and the highest memory so far."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    passed, busy = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what}: {passed:.0f} s, {busy:.0f} s of processor, peak {peak:.1f} GB", flush=True)


def perturb_teacher(teacher: Path) -> Student:
    """The teacher's network with noise on every tensor."""
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return Student(unet.eval().requires_grad_(False))


def check_tensor_counts(file: Path) -> None:
    """Print how many tensors of each part the file holds; raises `Refused` when SD1.5 has other counts."""
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
        parameters = sum(torch.Size(opened.get_slice(name).get_shape()).numel() for name in names)
    counts = Counter(name.partition(".")[0] for name in names)
    print(f"{file.name}: {len(names)} tensors, {parameters:,} parameters, {file.stat().st_size / 1e9:.2f} GB")
    if counts != COUNTS:
        raise Refused(f"{file.name}: holds {dict(counts)}, an SD1.5 file holds {COUNTS}")


class LogCollector(logging.Handler):
    """What ComfyUI logs while it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line."""
        self.lines.append(record.getMessage())


def compare(comfyui: Path, file: Path, student: Student) -> None:
    """Open the file with ComfyUI's loader and hold one denoised latent against ours."""
    with print_timing("ComfyUI's loader"):
        model, messages = load(comfyui, file)
    slips = [line for line in messages if "missing" in line or "unexpected" in line or "left over" in line]
    print(f"ComfyUI's loader on {type(model.model).__name__}: {slips or 'nothing missing, nothing left over'}")
    with print_timing("one answer of both"):
        error = denoised_error(model, student)
    print(f"x - s v at s = {S}: {error:.1e} away from ours")
    if slips or not error < MAX_RELATIVE_ERROR:
        raise Refused(f"{file.name}: ComfyUI does not read it as it was exported")


def load(comfyui: Path, file: Path) -> tuple[Any, list[str]]:
    """The model as ComfyUI patches it for a rectified flow, and what was logged on the way."""
    sys.path.insert(0, str(comfyui))
    logged = LogCollector()
    logging.getLogger().addHandler(logged)
    logging.getLogger().setLevel(logging.INFO)
    from comfy.cli_args import args

    args.cpu = True  # before anything asks for a device
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(file), output_vae=True, output_clip=True)
    if clip is None or vae is None:
        raise Refused(f"{file.name}: ComfyUI reads no {'text encoder' if clip is None else 'VAE'} in it")
    return ModelSamplingSD3().patch(model, SHIFT)[0], logged.lines


@torch.inference_mode()
def denoised_error(model: Any, student: Student) -> float:
    """How far ComfyUI's denoised latent is from ours, relative to it."""
    import comfy.model_management

    generator = torch.Generator().manual_seed(2)
    x, cond = (torch.randn(shape, generator=generator) for shape in ((1, 4, 16, 16), (1, 77, CONTEXT)))
    comfy.model_management.load_models_gpu([model])
    theirs = model.model.apply_model(x, torch.tensor([S]), c_crossattn=cond).float()
    ours = x - S * student.velocity(x, torch.tensor([S], dtype=torch.float64), cond)
    return float((theirs - ours).norm() / ours.norm())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as refusal:
        sys.exit(f"{refusal}")
