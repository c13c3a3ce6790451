"""Is what a network predicts found, whatever its folder states? Epsilon, v, and v with zero terminal SNR.

    python -m benchmarks.prediction RUN OUT [--samples 25600 12800]

The v networks are distilled from RUN/cache with target vp_v, one on the teacher's schedule and one on its rescaling to
zero terminal SNR, in OUT; what is there already is kept. Then each of the three is labelled as each of the three: right
labels have to be taken, wrong ones refused. About five minutes for 12,800 samples on an idle core.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from configs.load import load
from stages import distill
from stages.flow.bridge import Bridge, TailPolicy
from stages.flow.schedule import NoiseSchedule, rescale_zero_terminal_snr
from stages.nets.components import load_components
from stages.nets.measured_teacher import load_measured_teacher
from stages.nets.prediction import measure_prediction
from stages.nets.student import Target
from stages.system.refusal import Refused
from stages.teacher_files.source import TeacherSource

EMBEDDED = Path("stages/tiny/model")
LABELS = {
    "epsilon": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False},
    "v, zero SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}
FEW = ("--validation.states", "20", "--grid.sampler.steps", "4", "--david.fit.steps", "2")


def distill_v(run: Path, out: Path, samples: int, rescaled: bool) -> Path:
    """The exported folder of a v network, distilled unless it is there."""
    folder = out / "distill" / "export" / "diffusers"
    if not (out / "distill" / "COMPLETE").exists():
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "cache").exists():
            (out / "cache").symlink_to((run / "cache").resolve())
        plain = distill.make_vp_bridge

        def rescaled_bridge(_target: Target, schedule: NoiseSchedule, tail: TailPolicy) -> Bridge:
            alpha_bar = rescale_zero_terminal_snr(schedule.alpha_bar)
            return Bridge(NoiseSchedule(alpha_bar, "v_prediction"), tail)

        options = ["--run", str(out), "--target", "vp_v", "--graft", "false", "--train.max-samples", str(samples), *FEW]
        try:
            if rescaled:
                distill.make_vp_bridge = rescaled_bridge  # type: ignore[assignment]
            distill.run(load(distill.Config, "distill", [Path("configs/tiny.yaml")], options))
        finally:
            distill.make_vp_bridge = plain
    return folder


def labelled(folder: Path, label: str, target: Path) -> Path:
    """A copy of a model's folder whose config states `label`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    (target / "sollune.json").unlink(missing_ok=True)
    config = json.loads((EMBEDDED / "scheduler" / "scheduler_config.json").read_text())
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, **LABELS[label]}))
    return target


def main() -> None:
    """Print what was measured of each network, and what became of each label."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, nargs=2, default=(25600, 12800), help="of the v networks")
    args = parser.parse_args()
    folders = {
        "epsilon": EMBEDDED,
        "v": distill_v(args.run, args.out / "v", args.samples[0], rescaled=False),
        "v, zero SNR": distill_v(args.run, args.out / "zero", args.samples[1], rescaled=True),
    }
    device, right = torch.device("cpu"), 0
    for name, folder in folders.items():
        measured = measure_prediction(load_components(str(folder), device, torch.float32))
        print(f"{name}: {measured.text}\n" + "\n".join(measured.table()))
        for label in LABELS:
            try:
                load_measured_teacher(
                    TeacherSource(location=str(labelled(folder, label, args.out / "labelled"))), device
                )
                taken = True
            except Refused:
                taken = False
            right += taken == (label == name)
            print(f"  labelled {label}: {'taken' if taken else 'refused'}")
    print(f"{right} of {len(folders) * len(LABELS)} right")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
