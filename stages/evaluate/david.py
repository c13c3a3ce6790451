"""What David measures in a student, block by block and along the time; `sollune david show RUN` draws it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from torch import Tensor

from configs.arguments import path_argument
from configs.values import Strict
from configs.yaml_text import read_yaml
from shards.batch import Batch
from shards.reader import Reader
from stages.david.assessment import Assessor, BlockAssessment, assess, bins_of, reduce
from stages.david.fusion import PUBLISHED_BLOCK_WEIGHTS, compute_lambdas, translate_stored
from stages.david.running import RunningAssessment
from stages.flow.timesteps import bin_of_step
from stages.nets.components import Components
from stages.nets.features import last_resnets
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import SavedRun, cache_folder, load_run_teacher, load_student, open_run
from stages.nets.student import Student, make_vp_bridge
from stages.nets.student_shape import StudentConfig, prune_unet
from stages.nets.teacher import Teacher
from stages.sampling.few_steps import refuse_few_steps
from stages.system.atomic import atomic_path
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Parser, Refused, in_one_line
from stages.train.block_weighter import DavidConfig, load_or_fit_assessor, make_running_assessment
from stages.train.journal import read_step_lines
from stages.train.objective import ObjectiveConfig
from stages.train.validation import read_first_states

MAX_COLUMNS = 20
"""Equal parts of the teacher's steps in a map; fewer where David has fewer bins."""
CPU = torch.device("cpu")
PANELS = (
    ("timestep error", "magma", (0.0, 1.0)),
    ("pattern error", "magma", (0.0, 1.0)),
    ("coherence", "magma_r", (0.0, 1.0)),
    ("lambda", "viridis", None),
)
"""Title, colour map and limits, in the order of `mean_assessment`."""

ConfigT = TypeVar("ConfigT", bound=Strict)


def show(run: SavedRun, out: Path, state_count: int) -> Path:
    """Plot the assessments of the teacher, the student at its start and the student now, on held-out states."""
    history = lambda_history(run.folder)
    refuse_unwritable(out)
    states = HeldOutStates.open(run, state_count)
    maps = {"teacher": states.maps(states.features)}
    students = {"at start": states.initial_student(run), f"after {run.samples}": load_student(run, states.components)}
    for name, student in students.items():
        maps[name] = states.maps(states.student_features(student))
    plot(maps, states.assessor, history, out)
    return out


@dataclass(frozen=True)
class HeldOutStates:
    """The first m states of a run's validation prompts, and the assessor and lambda formula of that run."""

    components: Components
    teacher: Teacher
    assessor: Assessor
    running_assessment: RunningAssessment
    batches: Sequence[Batch]
    k: Int[Tensor, " m"]
    features: Mapping[str, Float[Tensor, "m n"]]
    """the teacher's, by block"""

    @classmethod
    def open(cls, run: SavedRun, state_count: int) -> "HeldOutStates":
        """On the CPU; raises `Refused` when the run is no distillation."""
        config = config_section(run, "david", DavidConfig)
        objective = config_section(run, "objective", ObjectiveConfig)
        components, cache = load_run_teacher(run.origin, CPU, torch.float32), cache_folder(run.folder)
        blocks = tuple(last_resnets(prune_unet(components.unet, run.origin.prune)))
        assessor = load_or_fit_assessor(config, cache, run.folder, CPU, components.schedule.steps, blocks)
        w = objective.weights_of(assessor.blocks, PUBLISHED_BLOCK_WEIGHTS)
        batches = list(read_first_states(Reader(cache, "validation"), state_count))
        return cls(
            components,
            Teacher(components, run.origin.tail),
            assessor,
            make_running_assessment(assessor, config.fusion, w, CPU),
            batches,
            torch.cat([batch.k for batch in batches]),
            {b: torch.cat([batch.features[b].float() for batch in batches]) for b in assessor.blocks},
        )

    def initial_student(self, run: SavedRun) -> Student:
        """The student as the run started."""
        bridge = make_vp_bridge(run.origin.target, self.components.schedule, run.origin.tail)
        settings, shape = read_distill_config(run), config_section(run, "student", StudentConfig)
        student = shape.make(self.components.unet, bridge, (settings.get("train") or {}).get("seed", 0)).eval()
        if shape.grafts(settings.get("graft"), run.origin.target):
            graft_time_embedding(student.unet, self.teacher.bridge)
        return student

    @torch.no_grad()
    def student_features(self, student: Student) -> dict[str, Float[Tensor, "m n"]]:
        """A student's pooled features at the states, by block."""
        uncond, parts = self.teacher.uncond, []
        for batch in self.batches:
            batch = batch.to(uncond.device, torch.float32)
            parts.append(student(batch.x_s, batch.s, batch.cond, uncond).features)
        return {block: torch.cat([part[block] for part in parts]) for block in parts[0]}

    def assess(self, student_features: Mapping[str, Float[Tensor, "m n"]]) -> dict[str, BlockAssessment]:
        """A student's features against the teacher's, by block."""
        return assess(self.assessor, student_features, self.features, bins_of(self.k, self.assessor))

    def mean_assessment(self, assessed: Mapping[str, BlockAssessment]) -> Float[Tensor, "4 n_blocks"]:
        """Timestep error, pattern error, coherence and lambda of every block, from means over some states."""
        mean = reduce(assessed, self.assessor.bins)
        lambdas = compute_lambdas(mean, self.running_assessment.formula_parameters)
        return torch.stack([mean.timestep_error, mean.pattern_error, mean.coherence, lambdas])

    def maps(self, student_features: Mapping[str, Float[Tensor, "m n"]]) -> Float[Tensor, "4 n_blocks parts"]:
        """`mean_assessment` of each part of the teacher's steps; nan for a part without states."""
        assessed = self.assess(student_features)
        count = min(MAX_COLUMNS, self.assessor.bins)
        part = bin_of_step(self.k, count, self.assessor.steps)
        maps = torch.full((4, len(assessed), count), torch.nan)
        for i in part.unique().tolist():
            maps[:, :, i] = self.mean_assessment({b: one.select(part == i) for b, one in assessed.items()})
        return maps


def lambda_history(folder: Path) -> dict[int, dict[str, float]]:
    """Samples -> lambda of each block, from the journal."""
    return {
        line["samples"]: line["lambdas"] for line in read_step_lines(folder) if isinstance(line.get("lambdas"), dict)
    }


def read_distill_config(run: SavedRun) -> dict[str, Any]:
    """The section of a distillation or a conversion in a run's config.yaml, as this version names its options."""
    path = run.folder / "config.yaml"
    try:
        sections: dict[str, Any] = read_yaml(path, str(path), "name a folder such as runs/tiny/distill")
        section = sections["convert" if "convert" in sections else "distill"]
        if not isinstance(section, dict):
            raise TypeError(f"its section is {section!r}")
    except (KeyError, TypeError) as error:
        raise Refused(
            f"{path}: has no distillation ({in_one_line(error)}) - name a folder such as runs/tiny/distill"
        ) from error
    return translate_stored(section)


def config_section(run: SavedRun, section: str, kind: type[ConfigT]) -> ConfigT:
    """One section of `read_distill_config`, with defaults where it is silent."""
    try:
        return kind.model_validate(read_distill_config(run).get(section, {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = ".".join(map(str, ("distill", section, *first["loc"])))
        raise Refused(
            f"{run.folder / 'config.yaml'}: {option}: {first['msg']} - start the run's command again, it writes it"
        ) from error


def plot(
    maps: Mapping[str, Float[Tensor, "4 n_blocks parts"]],
    assessor: Assessor,
    history: Mapping[int, Mapping[str, float]],
    out: Path,
) -> None:
    """A row of heat maps for each network, blocks downwards and time to the right; below, lambda over the training."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    blocks, extent = assessor.blocks, (0, assessor.steps, len(assessor.blocks) - 0.5, -0.5)
    figure = pyplot.figure(figsize=(15, 2.6 * len(maps) + 3), layout="constrained")
    grid = figure.add_gridspec(len(maps) + 1, len(PANELS))
    lambdas = torch.cat([rows[-1].flatten() for rows in maps.values()])
    lambda_limits = (float(lambdas[lambdas.isfinite()].min()), float(lambdas[lambdas.isfinite()].max()))
    for line, (name, rows) in enumerate(maps.items()):
        for column, (title, colours, limits) in enumerate(PANELS):
            axis = figure.add_subplot(grid[line, column])
            low, high = limits or lambda_limits
            image = axis.imshow(rows[column].numpy(), aspect="auto", cmap=colours, vmin=low, vmax=high, extent=extent)
            axis.set_title(f"{name}: {title}", fontsize=9)
            axis.set_yticks(range(len(blocks)), blocks, fontsize=7)
            axis.tick_params(axis="x", labelsize=7)
            axis.set_xlabel("teacher's step k", fontsize=7)
            figure.colorbar(image, ax=axis)
    axis = figure.add_subplot(grid[len(maps), :])
    for block in blocks:
        axis.plot(list(history), [line.get(block, torch.nan) for line in history.values()], label=block)
    axis.set_title("lambda of each block's loss over the training", fontsize=9)
    axis.set_xlabel("samples", fontsize=8)
    axis.legend(fontsize=7, ncols=3)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    """`sollune david show RUN [--out FILE.png]`."""
    parser = Parser(prog="sollune david", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="show")
    command = commands.add_parser("show", help="plot David's assessment of a run's student", allow_abbrev=False)
    command.add_argument(
        "run", type=path_argument, metavar="RUN", help="folder of a distillation, such as runs/tiny/distill"
    )
    command.add_argument(
        "--checkpoint", type=int, help="in samples seen (default: the one it ended with, else its newest)"
    )
    command.add_argument("--states", type=int, default=600, help="states of held-out prompts (default: 600)")
    command.add_argument("--out", type=path_argument, help="picture (default: RUN/david/seen.png)")
    options = parser.parse_args(argv)
    if options.states < 1:
        raise Refused(f"--states {options.states}: should be 1 or more")
    run = open_run(options.run, options.checkpoint)
    refuse_few_steps(run, "David")
    print(show(run, options.out or run.folder / "david" / "seen.png", options.states))
    return 0
