"""What David sees in a student, block by block and along the time: the three numbers, and the lambda that follows.

`sollune david show RUN`: a picture of what David sees in a run's student, at its start and now.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from torch import Tensor

from configs.values import Strict, path_argument
from configs.yaml_text import read_yaml
from shards.batch import Batch
from shards.reader import Reader
from stages.david.assessment import Assessor, BlockAssessment, assess, bins_of, reduce
from stages.david.fusion import RawAssessment, compute_lambdas
from stages.david.running import RunningAssessment
from stages.flow.timesteps import bin_of_step
from stages.nets.graft import graft_time_embedding
from stages.nets.saved import SavedRun, cache_folder, load_run_teacher, load_student, open_run
from stages.nets.student import Student, make_vp_bridge
from stages.nets.teacher import Teacher
from stages.system.atomic import atomic_path
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Parser, Refused, in_one_line
from stages.train.assessor import DavidConfig, load_or_fit_assessor, make_running_assessment
from stages.train.journal import read_step_lines
from stages.train.validation import read_first_states

MAX_COLUMNS = 20
"""Equal parts of the teacher's steps in a map; fewer where David has fewer bins."""


@dataclass(frozen=True)
class AssessmentMaps:
    """Maps of nblocks rows and as many columns as parts of the time; a part without a state is nan."""

    timestep_error: Float[Tensor, "n_blocks parts"]
    pattern_error: Float[Tensor, "n_blocks parts"]
    coherence: Float[Tensor, "n_blocks parts"]
    lambdas: Float[Tensor, "n_blocks parts"]


@torch.no_grad()
def student_features(student: Student, batches: Iterator[Batch], uncond: Tensor) -> dict[str, Float[Tensor, "m n"]]:
    """What each block says at the states of these batches."""
    said: dict[str, list[Tensor]] = {}
    for batch in batches:
        batch = batch.to(uncond.device, torch.float32)
        for block, feature in student(batch.x_t, batch.s, batch.cond, uncond).features.items():
            said.setdefault(block, []).append(feature)
    return {block: torch.cat(parts) for block, parts in said.items()}


def assessment_maps(
    assessor: Assessor,
    running_assessment: RunningAssessment,
    student_features: Mapping[str, Float[Tensor, "m n"]],
    teacher_features: Mapping[str, Float[Tensor, "m n"]],
    k: Int[Tensor, " m"],
) -> AssessmentMaps:
    """The maps of a student's features against the teacher's at the same states, at the teacher's steps k."""
    bins = bins_of(k, assessor)
    assessed = assess(assessor, student_features, teacher_features, bins)
    count = min(MAX_COLUMNS, assessor.bins)
    part = bin_of_step(k, count, assessor.steps)
    columns = [masked_assessment(assessed, part == i, assessor.bins, running_assessment) for i in range(count)]
    maps = (torch.stack(maps, dim=1) for maps in zip(*columns, strict=True))
    return AssessmentMaps(*maps)


def masked_assessment(
    assessments: Mapping[str, BlockAssessment], mask: Tensor, bins: int, running_assessment: RunningAssessment
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Timestep error, pattern error, coherence and lambda of every block over the states that lie here."""
    if not mask.any():
        nothing = torch.full((len(assessments),), float("nan"))
        return nothing, nothing, nothing, nothing
    found = reduce({block: _select_rows(one, mask) for block, one in assessments.items()}, bins)
    three = [torch.stack(list(of.values())) for of in (found.timestep_error, found.pattern_error, found.coherence)]
    raw = [torch.stack([getattr(one, name)[mask].mean() for one in assessments.values()]) for name in RAW_FIELDS]
    spoken = compute_lambdas(RawAssessment(*three, *raw), running_assessment.formula_parameters)
    e_t, e_p, coherence, weight = (values.cpu() for values in (*three, spoken))
    return e_t, e_p, coherence, weight


RAW_FIELDS = ("cross_entropy", "entropy")


def _select_rows(assessment: BlockAssessment, mask: Tensor) -> BlockAssessment:
    fields = ("excess", "divergence", "coherence", *RAW_FIELDS)
    return BlockAssessment(**{name: getattr(assessment, name)[mask] for name in fields})


C = TypeVar("C", bound=Strict)

CPU = torch.device("cpu")
PANELS = (
    ("timestep_error", "timestep error", "magma", (0.0, 1.0)),
    ("pattern_error", "pattern error", "magma", (0.0, 1.0)),
    ("coherence", "coherence", "magma_r", (0.0, 1.0)),
    ("lambdas", "lambda", "viridis", None),
)


def show(run: SavedRun, out: Path, state_count: int) -> Path:
    """Draw teacher, student at start and student now, on states of prompts that no training saw."""
    told = read_distill_config(run)
    config, journal = config_section(run, told, "david", DavidConfig), lambda_history(run.folder)
    refuse_unwritable(out)
    parts = load_run_teacher(run.origin, CPU, torch.float32)
    teacher = Teacher(parts, run.origin.tail)
    assessor = load_or_fit_assessor(config, cache_folder(run.folder), run.folder, CPU, parts.schedule.steps)
    voice = make_running_assessment(assessor, config.fusion, CPU)

    held = list(read_first_states(Reader(cache_folder(run.folder), "validation"), state_count))
    k = torch.cat([batch.k for batch in held])
    target = {b: torch.cat([batch.features[b].float() for batch in held]) for b in assessor.blocks}

    start = Student.from_teacher(parts.unet, make_vp_bridge(run.origin.target, parts.schedule, run.origin.tail)).eval()
    if told.get("graft", True):
        graft_time_embedding(start.unet, teacher.bridge)
    rows = {"teacher": assessment_maps(assessor, voice, target, target, k)}
    for name, student in (("at start", start), (f"after {run.samples}", load_student(run, parts))):
        rows[name] = assessment_maps(assessor, voice, student_features(student, iter(held), teacher.uncond), target, k)
    plot(rows, assessor, journal, out)
    return out


def lambda_history(folder: Path) -> dict[int, dict[str, float]]:
    """Samples seen -> what David's word made of each block's weight, as the journal tells it."""
    return {
        line["samples"]: line["lambdas"] for line in read_step_lines(folder) if isinstance(line.get("lambdas"), dict)
    }


def read_distill_config(run: SavedRun) -> dict[str, Any]:
    """The configuration that a run of distillation left beside its checkpoints."""
    path = run.folder / "config.yaml"
    try:
        said: dict[str, Any] = read_yaml(path, str(path), "name a folder such as runs/tiny/distill")["distill"]
        if not isinstance(said, dict):
            raise TypeError(f"distill is {said!r}")
    except (KeyError, TypeError) as error:
        raise Refused(
            f"{path}: tells of no distillation ({in_one_line(error)}) - name a folder such as runs/tiny/distill"
        ) from error
    return said


def config_section(run: SavedRun, distill_config: dict[str, Any], section: str, kind: type[C]) -> C:
    """One section of the configuration that a run left, its defaults where it is silent."""
    try:
        return kind.model_validate(distill_config.get(section, {}))
    except ValidationError as error:
        slip = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("distill", section, *slip["loc"])))
        raise Refused(
            f"{run.folder / 'config.yaml'}: {where}: {slip['msg']} - start the run's command again, it writes it"
        ) from error


def plot(rows: dict[str, AssessmentMaps], assessor: Assessor, history: dict[int, dict[str, float]], out: Path) -> None:
    """A row of heat maps for each network, blocks downwards and time to the right; below, lambda over the training."""
    import matplotlib as mpl

    blocks, extent = assessor.blocks, (0, assessor.steps, len(assessor.blocks) - 0.5, -0.5)

    mpl.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(15, 2.6 * len(rows) + 3), layout="constrained")
    grid = figure.add_gridspec(len(rows) + 1, len(PANELS))
    spoken = torch.cat([sight.lambdas.flatten() for sight in rows.values()])
    span = (float(spoken[spoken.isfinite()].min()), float(spoken[spoken.isfinite()].max()))
    for line, (name, sight) in enumerate(rows.items()):
        for column, (field, title, colours, limits) in enumerate(PANELS):
            axis = figure.add_subplot(grid[line, column])
            values: Tensor = getattr(sight, field)
            low, high = limits or span
            image = axis.imshow(values.numpy(), aspect="auto", cmap=colours, vmin=low, vmax=high, extent=extent)
            axis.set_title(f"{name}: {title}", fontsize=9)
            axis.set_yticks(range(len(blocks)), blocks, fontsize=7)
            axis.tick_params(axis="x", labelsize=7)
            axis.set_xlabel("teacher's step k", fontsize=7)
            figure.colorbar(image, ax=axis)
    axis = figure.add_subplot(grid[len(rows), :])
    for block in blocks:
        axis.plot(list(history), [lambdas.get(block, torch.nan) for lambdas in history.values()], label=block)
    axis.set_title("lambda of each block's loss over the training, as it was used", fontsize=9)
    axis.set_xlabel("samples", fontsize=8)
    axis.legend(fontsize=7, ncols=3)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    """`sollune david show RUN [--out FILE.png]`."""
    parser = Parser(prog="sollune david", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="show")
    words = commands.add_parser("show", help="draw what David sees in a run's student", allow_abbrev=False)
    words.add_argument(
        "run", type=path_argument, metavar="RUN", help="folder of a distillation, such as runs/tiny/distill"
    )
    words.add_argument(
        "--checkpoint", type=int, help="in samples seen (default: the one it ended with, else its newest)"
    )
    words.add_argument("--states", type=int, default=600, help="states of held-out prompts (default: 600)")
    words.add_argument("--out", type=path_argument, help="picture (default: RUN/david/seen.png)")
    asked = parser.parse_args(argv)
    if asked.states < 1:
        raise Refused(f"--states {asked.states}: should be 1 or more")
    run = open_run(asked.run, asked.checkpoint)
    print(show(run, asked.out or run.folder / "david" / "seen.png", asked.states))
    return 0
