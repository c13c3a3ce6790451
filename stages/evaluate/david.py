"""`sollune david show RUN`: a picture of what David sees in a run's student, at its start and now."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from configs.atomic import atomic_path
from configs.disk import refuse_unwritable
from configs.parser import Parser
from configs.refusal import Refused, in_one_line
from configs.strict import Strict
from configs.values import place
from configs.yaml_text import read_yaml
from shards.reader import Reader
from stages.david.assessment import Assessor
from stages.evaluate.sight import Sight, features_of, see
from stages.nets.graft import graft_time_embedding
from stages.nets.saved import SavedRun, cache_of, load_student, load_teacher_parts, open_run
from stages.nets.student import Student, vp_of
from stages.nets.teacher import Teacher
from stages.train.david import DavidConfig, assessor_of, voice_of
from stages.train.journal import steps_told
from stages.train.velocity import held_out

C = TypeVar("C", bound=Strict)

CPU = torch.device("cpu")
PANELS = (
    ("timestep_error", "timestep error", "magma", (0.0, 1.0)),
    ("pattern_error", "pattern error", "magma", (0.0, 1.0)),
    ("coherence", "coherence", "magma_r", (0.0, 1.0)),
    ("lambdas", "lambda", "viridis", None),
)


def show(run: SavedRun, out: Path, states: int) -> Path:
    """Draw teacher, student at start and student now, on states of prompts that no training saw."""
    told = said_by(run)
    config, journal = settings_of(run, told, "david", DavidConfig), told_lambdas(run.folder)
    refuse_unwritable(out)
    parts = load_teacher_parts(run.origin, CPU, torch.float32)
    teacher = Teacher(parts, run.origin.tail)
    assessor = assessor_of(config, cache_of(run.folder), run.folder, CPU, parts.schedule.steps)
    voice = voice_of(assessor, config.fusion, CPU)

    held = list(held_out(Reader(cache_of(run.folder), "validation"), states))
    k = torch.cat([batch.k for batch in held])
    target = {b: torch.cat([batch.features[b].float() for batch in held]) for b in assessor.blocks}

    start = Student.from_teacher(parts.unet, vp_of(run.origin.target, parts.schedule, run.origin.tail)).eval()
    if told.get("graft", True):
        graft_time_embedding(start.unet, teacher.bridge)
    rows = {"teacher": see(assessor, voice, target, target, k)}
    for name, student in (("at start", start), (f"after {run.samples}", load_student(run, parts))):
        rows[name] = see(assessor, voice, features_of(student, iter(held), teacher.uncond), target, k)
    draw(rows, assessor, journal, out)
    return out


def told_lambdas(folder: Path) -> dict[int, dict[str, float]]:
    """Samples seen -> what David's word made of each block's weight, as the journal tells it."""
    return {line["samples"]: line["lambdas"] for line in steps_told(folder) if isinstance(line.get("lambdas"), dict)}


def said_by(run: SavedRun) -> dict[str, Any]:
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


def settings_of(run: SavedRun, told: dict[str, Any], section: str, kind: type[C]) -> C:
    """One section of the configuration that a run left, its defaults where it is silent."""
    try:
        return kind.model_validate(told.get(section, {}))
    except ValidationError as error:
        slip = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("distill", section, *slip["loc"])))
        raise Refused(
            f"{run.folder / 'config.yaml'}: {where}: {slip['msg']} - start the run's command again, it writes it"
        ) from error


def draw(rows: dict[str, Sight], assessor: Assessor, told: dict[int, dict[str, float]], out: Path) -> None:
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
        axis.plot(list(told), [lambdas.get(block, torch.nan) for lambdas in told.values()], label=block)
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
    words.add_argument("run", type=place, metavar="RUN", help="folder of a distillation, such as runs/tiny/distill")
    words.add_argument(
        "--checkpoint", type=int, help="in samples seen (default: the one it ended with, else its newest)"
    )
    words.add_argument("--states", type=int, default=600, help="states of held-out prompts (default: 600)")
    words.add_argument("--out", type=place, help="picture (default: RUN/david/seen.png)")
    asked = parser.parse_args(argv)
    if asked.states < 1:
        raise Refused(f"--states {asked.states}: should be 1 or more")
    run = open_run(asked.run, asked.checkpoint)
    print(show(run, asked.out or run.folder / "david" / "seen.png", asked.states))
    return 0
