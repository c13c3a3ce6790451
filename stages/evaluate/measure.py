"""How near a student is to its teacher: `sollune evaluate RUN --config FILE`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ImportString
from torch import Tensor

from configs.atomic import atomic_write
from configs.disk import refuse_unwritable
from configs.load import asked_for
from configs.refusal import Refused
from configs.strict import Strict
from configs.terminal import console
from shards.reader import Reader
from stages.cluster import device_of
from stages.evaluate.fields import student_field, teacher_field
from stages.evaluate.grid import fixed_noises, save_sheet, sheet
from stages.evaluate.metrics import Fidelity, Scorer, fidelity
from stages.evaluate.paired import PairedError, Task, make_reference, paired_error
from stages.evaluate.report import AS_NOISE, STUDENT, TEACHER, Evaluation, Gates, as_json, show, verdicts
from stages.evaluate.sample import Sampler
from stages.evaluate.stock import open_stock, paint, use_ddim
from stages.nets.files import read_json
from stages.nets.graft import graft_time_embedding
from stages.nets.saved import SavedRun, cache_of, load_student, load_teacher_parts, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import PromptSource, derived_seed, prompts
from stages.train.velocity import VelocityErrors, held_out, velocity_errors

GRID_ROWS = 6


class FidelityConfig(Strict):
    """Do pictures show what their prompts say? Both models through stock diffusers."""

    prompts: int = Field(500, ge=1, description="validation prompts")
    control_prompts: int = Field(100, ge=1, description="of these, prompts for the student sampled as a noise model")
    steps: int = Field(25, ge=1, description="steps: DDIM for the teacher, the exported scheduler for the student")
    guidance: float = Field(5.0, ge=0, description="guidance scale w")


class PairedConfig(Strict):
    """The same noise must give the same picture: fields compared by our own solver."""

    prompts: int = Field(
        256, ge=2, description="validation prompts, the first ones; few pictures carry most of the error"
    )
    steps: tuple[int, ...] = Field((4, 8, 25), min_length=1, description="numbers of steps that are compared")
    reference_steps: int = Field(50, ge=1, description="steps of the teacher's reference")
    sampler: Sampler = Field(Sampler(guidance=3.0), description="solver, guidance and shift; its steps are not used")
    controls: bool = Field(
        True, description="measure the undistilled graft, the undistilled copy and wrong prompts too"
    )


class Config(Strict):
    """Measure a run against its teacher: `sollune evaluate RUN --config FILE`."""

    run: Path = Field(description="run folder, such as runs/tiny/distill")
    prompts: PromptSource = Field(description="where the sentences come from; only its validation share is used")
    seed: int = Field(1, description="seed of prompts and noises")
    scorer: ImportString[Any] | None = Field(
        None, description="function (texts, pictures) -> attribute -> shown or not; none leaves fidelity out"
    )
    fidelity: FidelityConfig = FidelityConfig()
    paired: PairedConfig = PairedConfig()
    velocity_states: int = Field(600, ge=0, description="most held-out states whose velocity is checked; 0 for none")
    gates: Gates = Gates()
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")


@dataclass(frozen=True)
class Bench:
    """What every measurement needs: the run, both models, and fixed lists of prompts and noises."""

    run: SavedRun
    teacher: Teacher
    student: Student
    texts: Sequence[str]
    noise: Tensor
    held_out: Reader | None
    """The cache's validation split, where states of it are measured."""

    @property
    def device(self) -> torch.device:
        """Where both models live."""
        return self.noise.device


def evaluate(config: Config) -> Evaluation:
    """Every measurement of one run."""
    bench = set_up(config)
    if config.scorer:
        exported(bench)
    # The pictures come last, for they are shown in a file, and nothing may be refused after that.
    paired, velocity = measure_paired(bench, config), measure_velocity(bench, config)
    return Evaluation(
        run=str(config.run),
        samples=bench.run.samples,
        tail=bench.run.origin.tail,
        settings=config.model_dump(mode="json", exclude={"gates", "run"}),
        fidelity=measure_fidelity(bench, config.scorer, config) if config.scorer else {},
        paired=paired,
        velocity=velocity,
    )


def set_up(config: Config) -> Bench:
    """Open the run and fix the lists; raises `Refused` for what cannot be measured, the export among it."""
    saved = open_run(config.run)
    parts = load_teacher_parts(saved.origin, device_of(config.device), torch.float32)
    texts = distinct(config.prompts, config.seed, max(config.fidelity.prompts, config.paired.prompts))
    noise = fixed_noises(config.seed, len(texts), parts.latent_shape).to(parts.unet.device)
    reader = Reader(cache_of(saved.folder), "validation", config.seed) if config.velocity_states else None
    return Bench(saved, Teacher(parts, saved.origin.tail), load_student(saved, parts), texts, noise, reader)


def distinct(source: PromptSource, seed: int, count: int) -> list[str]:
    """Validation sentences, each once as far as the source has them; a longer list begins with the shorter one."""
    found = [prompt.text for prompt in prompts(source, seed, "validation", 4 * count)]
    once = list(dict.fromkeys(found))
    return [once[i % len(once)] for i in range(count)]


def measure_fidelity(bench: Bench, scorer: Scorer, config: Config) -> Mapping[str, Fidelity]:
    """Teacher by DDIM, student by its exported folder, and the student sampled as the noise model that it is not."""
    asked = config.fidelity
    texts, noise = bench.texts[: asked.prompts], bench.noise[: asked.prompts]
    teacher = open_stock(bench.teacher.parts.folder, bench.device)
    use_ddim(teacher, bench.teacher.parts.folder)
    student = open_stock(exported(bench), bench.device)
    pictures = {
        TEACHER: paint(teacher, texts, noise, asked.steps, asked.guidance),
        STUDENT: paint(student, texts, noise, asked.steps, asked.guidance),
    }
    use_ddim(student, bench.teacher.parts.folder)
    few = slice(asked.control_prompts)
    pictures[AS_NOISE] = paint(student, texts[few], noise[few], asked.steps, asked.guidance)
    rows = min(GRID_ROWS, len(pictures[AS_NOISE]))
    columns = [painted[:rows] for painted in pictures.values()]
    image = sheet(texts[:rows], list(pictures), columns)
    save_sheet(image, bench.run.folder / "evaluation.png", {"seed": config.seed, **asked.model_dump()})
    return {who: fidelity(scorer, texts[: len(painted)], painted) for who, painted in pictures.items()}


def exported(bench: Bench) -> Path:
    """The run's exported folder; raises `Refused` unless it holds the very weights that are measured."""
    folder = bench.run.folder / "export" / "diffusers"
    again = f"run sollune export {bench.run.folder}"
    if not folder.is_dir():
        raise Refused(f"{folder}: not there - {again}")
    dtype = getattr(torch, str(read_json(folder / "sollune.json").get("dtype")), torch.float32)
    found, expected = open_stock(folder, bench.device).unet.state_dict(), bench.student.unet.state_dict()
    if any(not torch.equal(value.to(dtype), found[name].to(dtype)) for name, value in expected.items()):
        raise Refused(f"{folder}: is not the export of {bench.run.weights} - {again}")
    return folder


def measure_paired(bench: Bench, config: Config) -> Mapping[str, Sequence[PairedError]]:
    """Paired-noise errors of the student, and of controls that a good measure must tell from it."""
    asked, count = config.paired, config.paired.prompts
    cond, uncond = bench.teacher.encode(bench.texts[:count]), bench.teacher.uncond
    other = fixed_noises(derived_seed("other noise", config.seed), count, bench.noise.shape[1:])
    task = Task(cond, uncond, bench.noise[:count])
    reference = make_reference(
        teacher_field(bench.teacher), task, other.to(bench.device), asked.sampler, asked.steps, asked.reference_steps
    )
    copy = Student.from_teacher(bench.teacher.parts.unet).eval()
    graft = Student.from_teacher(bench.teacher.parts.unet).eval()
    graft_time_embedding(graft.unet, bench.teacher.bridge)
    measured = {
        STUDENT: (bench.student, cond),
        "undistilled graft": (graft, cond),
        "undistilled copy": (copy, cond),
        "wrong prompts": (bench.student, cond.roll(1, 0)),
    }
    names = list(measured) if asked.controls else [STUDENT]
    return {
        name: [paired_error(student_field(measured[name][0]), reference, n, measured[name][1]) for n in asked.steps]
        for name in names
    }


def measure_velocity(bench: Bench, config: Config) -> VelocityErrors | None:
    """The student's velocities at held-out states of the cache."""
    if bench.held_out is None:
        return None
    states = held_out(bench.held_out, config.velocity_states)
    return velocity_errors(bench.student, states, bench.teacher.uncond)


def main(argv: Sequence[str]) -> int:
    """`sollune evaluate RUN --config FILE [options]`; 1 when a gate is missed."""
    words = ["--run", *argv] if argv and not argv[0].startswith("-") else list(argv)
    if not words:
        raise Refused("evaluate: which run? - usage: sollune evaluate RUN --config configs/tiny.yaml [options]")
    config = asked_for(Config, "evaluate", words)
    if config is None:
        return 0
    written = config.run / "evaluation.json"
    device_of(config.device)  # refused before the run is read, which takes longer
    refuse_unwritable(written)
    found = evaluate(config)
    judged = verdicts(found, config.gates)
    show(found, judged, console())
    atomic_write(written, as_json(found, judged))
    return 0 if all(verdict.passed for verdict in judged) else 1
