"""The figures of `benchmarks.few_steps` from what was sampled, with intervals, and their tables."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.few_steps_models import Pictures, all_right
from stages.evaluate.distances.estimators import (
    answer_differences,
    frechet_distance,
    frechet_floor,
    kernel_distance,
    kernel_floor,
    pooled_variation,
    prompt_variation,
    variation_floor,
)
from stages.evaluate.paired import BOOTSTRAP_RESAMPLES, interval_of, relative_errors
from stages.sampling.sampler import Sampler
from stages.tiny.world import ATTRIBUTES, parse_attributes, world_grammar
from stages.train.journal import JOURNAL_FILE

Samples: TypeAlias = Mapping[str, Pictures]
"""Row of a table -> pictures."""
NORMAL_975 = 1.959964
LIMIT = 0.95
"""A distance is within the floor up to this quantile of it."""
RIGHT_MARKS, ERROR_MARK = {4: 0.985, 2: 0.98, 1: 0.96}, (4, "5", 0.06)
"""Least share of pictures all right by windows; windows, guidance and greatest paired error."""


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` independent trials."""
    z2 = NORMAL_975**2
    centre, half = share + z2 / (2 * count), NORMAL_975 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)


def mean_interval(values: Float[Tensor, "runs prompts"]) -> tuple[float, float]:
    """The 95 % interval of the mean over runs and prompts, both resampled: each prompt is one for all runs."""
    generator = torch.Generator().manual_seed(0)
    runs, prompts = values.shape
    means = []
    for _ in range(BOOTSTRAP_RESAMPLES):
        rows = torch.randint(runs, (runs,), generator=generator)
        columns = torch.randint(prompts, (prompts,), generator=generator)
        means.append(values.mean(0)[columns].mean() if runs == 1 else values[rows].mean(0)[columns].mean())
    return interval_of(torch.stack(means).double())


def right_and_error(
    texts: Sequence[str], of_runs: Sequence[Pictures], reference: Pictures
) -> Mapping[str, Mapping[str, Any]]:
    """Share of pictures all right and paired error: mean, interval, and the values of the runs.

    The share's interval counts each prompt once, as if its pictures of all runs were right or wrong together.
    """
    right = torch.stack([all_right(texts, one.answers) for one in of_runs]).double()
    errors = torch.stack([relative_errors(one.latents, reference.latents) for one in of_runs])
    share = float(right.mean())
    return {
        "right": {"mean": share, "interval": share_interval(share, len(texts)), "runs": right.mean(1).tolist()},
        "error": {"mean": float(errors.mean()), "interval": mean_interval(errors), "runs": errors.mean(1).tolist()},
    }


def by_row(of_runs: Sequence[Samples]) -> dict[str, list[Pictures]]:
    """Row -> the pictures of each run that has it, in the order of the first one."""
    names = dict.fromkeys(name for samples in of_runs for name in samples)
    return {name: [samples[name] for samples in of_runs if name in samples] for name in names}


def against_floor(values: Sequence[float], floor: Float[Tensor, " swaps"]) -> dict[str, Any]:
    """The mean of the runs' distances, their values, and how many are within the floor."""
    limit = float(floor.quantile(LIMIT))
    return {"mean": sum(values) / len(values), "runs": list(values), "within": sum(one <= limit for one in values)}


def floor_of(floor: Float[Tensor, " swaps"]) -> dict[str, float]:
    """Mean and limit of a floor."""
    return {"mean": float(floor.mean()), "limit": float(floor.quantile(LIMIT))}


def guidance_results(
    texts: Sequence[str],
    reference: Pictures,
    real: Pictures,
    own: Pictures,
    teachers: Samples,
    of_runs: Sequence[Samples],
) -> Mapping[str, Any]:
    """Everything under one guidance scale: `real` and `own` are the teacher's from other noises and from the same.

    Features are divided by their root mean variance in `real`; the Frechet distance is a share of their total variance.
    """
    unit = real.features.double().var(0).mean().sqrt()
    others, count = real.features / unit, real.features.shape[1]
    floors = {
        "frechet": frechet_floor(own.features / unit, others) / count,
        "kid": kernel_floor(own.features / unit, others),
    }
    distances: dict[str, Callable[[Tensor], float]] = {
        "frechet": lambda features: frechet_distance(features / unit, others) / count,
        "kid": lambda features: kernel_distance(features / unit, others),
    }
    rows = {}
    for name, pictures in {**{name: [one] for name, one in teachers.items()}, **by_row(of_runs)}.items():
        measured = {
            key: against_floor([distance(one.features) for one in pictures], floors[key])
            for key, distance in distances.items()
        }
        rows[name] = {**right_and_error(texts, pictures, reference), **measured}
    other = float(relative_errors(real.latents, reference.latents).mean())
    return {"rows": rows, "floors": {key: floor_of(one) for key, one in floors.items()}, "error_other_noise": other}


def shift_results(
    texts: Sequence[str], reference: Pictures, sampled: Sequence[tuple[Sampler, Sequence[Pictures]]]
) -> Mapping[str, Any]:
    """Share all right and paired error by grid."""
    return {
        f"{grid.steps} steps, {grid.solver}, shift {grid.shift:g}": right_and_error(texts, pictures, reference)
        for grid, pictures in sampled
    }


def diversity_results(
    texts: Sequence[str], own: Pictures, real: Pictures, of_runs: Sequence[Samples]
) -> Mapping[str, Any]:
    """For each attribute, total variation against the teacher's answers from other noises, with the floor.

    `pooled` is of the answers to all sentences that leave it unsaid together, `by_prompt` the mean over sentences.
    """
    results: dict[str, Any] = {}
    for place, attribute in enumerate(ATTRIBUTES):
        unsaid = torch.tensor([attribute not in parse_attributes(text) for text in texts])
        if not unsaid.any():
            continue
        words = world_grammar().words_of(attribute)

        def answers(pictures: Pictures, place: int = place, unsaid: Tensor = unsaid) -> Int[Tensor, "prompts noises"]:
            return pictures.answers[:, place].view(len(texts), -1)[unsaid]

        def shares(pictures: Sequence[Pictures], words: tuple[str, ...] = words) -> dict[str, float]:
            counts = torch.cat([answers(one).flatten() for one in pictures]).bincount(minlength=len(words)).double()
            return dict(zip(words, (counts / counts.sum()).tolist(), strict=True))

        difference = answer_differences(answers(own), answers(real), len(words))
        measures = {"pooled": pooled_variation, "by_prompt": prompt_variation}
        floors = {key: variation_floor(difference, measure) for key, measure in measures.items()}
        rows: dict[str, Any] = {}
        for name, pictures in by_row(of_runs).items():
            of_row = [answer_differences(answers(one), answers(real), len(words)) for one in pictures]
            rows[name] = {
                **{
                    key: against_floor([float(measure(one)) for one in of_row], floors[key])
                    for key, measure in measures.items()
                },
                "same_as_teacher": sum(float((answers(one) == answers(own)).double().mean()) for one in pictures)
                / len(pictures),
                "shares": shares(pictures),
            }
        results[attribute] = {
            "prompts": int(unsaid.sum()),
            "teacher_shares": shares([own, real]),
            "floors": {key: floor_of(one) for key, one in floors.items()},
            "rows": rows,
        }
    return results


def phase_seconds(run: Path) -> float | None:
    """Seconds of a run's training steps and validations, by its journal; starting and exporting are not in it.

    None where the journal is not kept.
    """
    file = run / JOURNAL_FILE
    if not file.is_file():
        return None
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return float(sum(line.get("window_seconds", 0.0) + line.get("seconds", 0.0) for line in lines))


def marks(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Each mark of a figure that was measured: the mark, the figure, and whether it is met."""
    reached: dict[str, Any] = {}
    for w, measured in results["guidance"].items():
        for windows, least in RIGHT_MARKS.items():
            if row := measured["rows"].get(run_name(windows)):
                value = row["right"]["mean"]
                reached[f"{run_name(windows)}, guidance {w}: all right >= {least}"] = (value, value >= least)
        windows, of_guidance, most = ERROR_MARK
        if w == of_guidance and (row := measured["rows"].get(run_name(windows))):
            value = row["error"]["mean"]
            reached[f"{run_name(windows)}, guidance {w}: paired error <= {most}"] = (value, value <= most)
    return {name: {"value": value, "met": met} for name, (value, met) in reached.items()}


def run_name(windows: int) -> str:
    """The row of a student of few steps."""
    return f"{windows} windows, {windows} step{'s' if windows > 1 else ''}"
