"""One .safetensors file of Stable Diffusion 1.5's size as a teacher: memory and time of opening it, and of two prompts.

    python -m benchmarks.single_file FOLDER

Random weights in half precision, 2.1 GB; FOLDER takes 10 GB while it is made, 5 GB afterwards. Each part runs in a
process of its own, whose peak of resident memory is printed beside the bytes of the weights.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.full_size import make_full_size
from stages.teacher_files.ldm_names import ldm_name, to_ldm
from stages.teacher_files.open import open_teacher_files
from stages.teacher_files.source import TeacherSource
from stages.teacher_files.variants import WEIGHT_FILES

FEW_STATES = (
    "--render.states.steps",
    "4",
    "--render.states.trajectory-states",
    "2",
    "--render.states.renoised-states",
    "1",
)
LAYERS, LEVELS = 2, 4


def make_file(file: Path, configs: Path) -> None:
    """Write the single file and the folder of its configs, without weights."""
    if not file.exists():
        make_full_size(configs)
        tensors = {}
        for part, (name, _) in WEIGHT_FILES.items():
            with safe_open(configs / part / name, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - no mapping
                    value = stored.get_tensor(key)
                    if value.is_floating_point():
                        full = f"{part}.{key}"
                        tensors[ldm_name(full, LAYERS, LEVELS)] = to_ldm(full, value.half()).contiguous()
        save_file(tensors, file)
        for part, (name, _) in WEIGHT_FILES.items():
            (configs / part / name).unlink()


def open_alone(file: Path, configs: Path) -> None:
    """Open the file in this process, and print what that took."""
    before, start = _peak_bytes(), time.perf_counter()
    opened = open_teacher_files(TeacherSource(location=str(file), config=str(configs)))
    result = {
        "seconds": time.perf_counter() - start,
        "before": before,
        "peak": _peak_bytes(),
        "folder": str(opened.folder),
    }
    print(json.dumps(result))


def _peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
    return resource.getrusage(who).ru_maxrss * 1024


def main() -> None:
    """Print one line for each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=("make", "open"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    file, configs = args.folder / "model.safetensors", args.folder / "configs"
    if args.part == "make":
        make_file(file, configs)
        return
    if args.part == "open":
        open_alone(file, configs)
        return
    # In a process of its own, because a child's peak begins at its parent's.
    alone = [sys.executable, "-m", "benchmarks.single_file", str(args.folder), "--part"]
    subprocess.run([*alone, "make"], check=True)
    size = file.stat().st_size
    print(f"file: {size / 1e9:.2f} GB, weights in fp32: {2 * size / 1e9:.2f} GB")
    environment = {**os.environ, "XDG_CACHE_HOME": str(args.folder / "home")}
    for name in ("opened", "opened again"):
        output = subprocess.run([*alone, "open"], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        result = json.loads(output.splitlines()[-1])
        print(
            f"{name}: {result['seconds']:.0f} s, {(result['peak'] - result['before']) / 1e6:,.0f} MB above the imports"
        )
    cache = [
        sys.executable, "-m", "stages", "cache-teacher", "--config", "configs/tiny.yaml", "--count", "1",
        "--validation-count", "1", "--teacher", str(file), "--teacher.config", str(configs), *FEW_STATES,
    ]  # fmt: skip
    for name, more in (("plan of two prompts", ["--plan"]), ("cache of two prompts", [])):
        start = time.perf_counter()
        run = ["--run", str(args.folder / "run"), *more]
        output = subprocess.run([*cache, *run], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        peak = _peak_bytes(resource.RUSAGE_CHILDREN)
        print(f"{name}: {time.perf_counter() - start:.0f} s, peak memory {peak / 2**30:.2f} GiB")
        print("\n".join(f"    {line}" for line in output.splitlines() if line))


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
