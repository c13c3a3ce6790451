"""The command `sollune evaluate`: fidelity, paired-noise and velocity errors of a student against its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from pydantic import Field, ImportString
from torch import Tensor

from configs.load import config_from_arguments, name_first_argument
from configs.values import PictureSize, Strict
from shards.reader import Reader
from stages.evaluate.exported import verified_export
from stages.evaluate.lora import LoraInputs, measure_lora, open_measured_loras
from stages.evaluate.lora_file import ScaledLora
from stages.evaluate.lora_report import lora_json, print_lora_report, report_paths
from stages.evaluate.metrics import Fidelity, Scorer, compute_fidelity
from stages.evaluate.paired import PairedError, paired_error, teacher_reference
from stages.evaluate.recorded_prompts import recorded_prompts
from stages.evaluate.report import (
    STUDENT,
    STUDENT_AS_NOISE_MODEL,
    TEACHER,
    Evaluation,
    Gates,
    SizeErrors,
    check_gates,
    print_report,
    to_json,
)
from stages.evaluate.settings import FidelityConfig, PairedConfig
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import SavedRun, cache_folder, load_run_teacher, load_student, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import PromptSource, prompts
from stages.sampling.few_steps import few_steps_of_run, refuse_few_steps
from stages.sampling.fields import TwoBranchField, student_field
from stages.sampling.grids import fixed_noises, make_sheet, save_sheet
from stages.sampling.single_file import generate_pictures, load_pipeline, use_ddim_scheduler
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.system.disk import refuse_unwritable
from stages.system.terminal import console
from stages.train.validation import read_first_states, velocity_errors

GRID_ROWS = 6
FEW_STEPS_NOTE = """\
{run}: paired errors are measured at its {steps} steps alone; velocity errors are left out, because its velocity is that
of whole windows, not of the teacher's branches"""


class Config(Strict):
    """Measure a run against its teacher: `sollune evaluate RUN --config FILE`."""

    run: Path = Field(description="run folder, such as runs/tiny/distill")
    prompts: PromptSource | None = Field(
        None,
        description="where the sentences come from, of which the validation share is used; none takes the source of "
        "the run's cache",
    )
    seed: int = Field(1, description="seed of prompts and noises")
    scorer: ImportString[Any] | None = Field(
        None, description="function (texts, pictures) -> attribute -> shown or not; none leaves fidelity out"
    )
    fidelity: FidelityConfig = FidelityConfig()
    paired: PairedConfig = PairedConfig()
    lora: tuple[ScaledLora, ...] = Field(
        (),
        description="LoRA files made for the teacher, each FILE or FILE:SCALE: they alone are then measured, on the "
        "student against the teacher, and stored in RUN/loras",
    )
    lora_prompts: int = Field(
        64, ge=8, description="validation prompts for each LoRA; the first quarter finds the scale that suits it best"
    )
    velocity_states: int = Field(600, ge=0, description="most held-out states whose velocity is checked; 0 for none")
    gates: Gates = Gates()
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")


@dataclass(frozen=True)
class EvaluationSetup:
    """Inputs of every measurement: the run, both models, and fixed lists of prompts and noises."""

    sizes: Sequence[PictureSize]
    """Of the pictures whose paired errors are measured."""

    run: SavedRun
    teacher: Teacher
    student: Student
    texts: Sequence[str]
    noise: Tensor
    """Of fidelity's pictures, which are of the model's own size."""
    held_out_reader: Reader | None
    """The cache's validation split, where states of it are measured."""

    @property
    def field(self) -> TwoBranchField:
        """The student as it is sampled."""
        return student_field(self.student, None, *(few_steps_of_run(self.run) or ()))

    @property
    def main_size(self) -> PictureSize:
        """The size of the controls and the gates: the model's own, or the first where that is not measured."""
        native = self.teacher.components.native_size
        return native if native in self.sizes else self.sizes[0]


def evaluate(config: Config) -> Evaluation:
    """Every measurement of one run; paired and velocity errors also by size where there are several."""
    if (windows := open_run(config.run).origin.windows) is not None:
        print(FEW_STEPS_NOTE.format(run=config.run, steps=windows))
        paired_settings = config.paired.model_copy(update={"steps": (windows,)})
        config = config.model_copy(update={"velocity_states": 0, "paired": paired_settings})
    setup = prepare_evaluation(config)
    config.paired.sampler.model_copy(update={"steps": config.paired.steps[0]}).steps_for(setup.field)
    if config.scorer:
        setup.field.check_guidance(config.fidelity.guidance, "fidelity.guidance")
        verified_export(setup.run, setup.student)
    # Fidelity comes last: it writes its pictures to a file, and nothing may be refused after that.
    paired = {size: measure_paired(setup, config, size) for size in setup.sizes}
    velocity = None
    if setup.held_out_reader is not None:
        states = read_first_states(setup.held_out_reader, config.velocity_states)
        velocity = velocity_errors(setup.student, states, setup.teacher.uncond)
    velocity_by_size = velocity.velocity_by_size if velocity else {}
    several = len({*paired, *velocity_by_size}) > 1
    return Evaluation(
        run=str(config.run),
        samples=setup.run.samples,
        tail=setup.run.origin.tail,
        settings=config.model_dump(mode="json", exclude={"gates", "run", "lora", "lora_prompts"}),
        fidelity=measure_fidelity(setup, config.scorer, config) if config.scorer else {},
        paired=paired[setup.main_size],
        velocity=velocity,
        size=str(setup.main_size),
        by_size={
            str(size): SizeErrors(paired.get(size, {}).get(STUDENT, ()), velocity_by_size.get(size))
            for size in dict.fromkeys((*paired, *velocity_by_size))
        }
        if several
        else {},
    )


def prepare_evaluation(config: Config) -> EvaluationSetup:
    """Open the run and fix the lists; raises `Refused` for a run that cannot be measured."""
    saved = open_run(config.run)
    parts = load_run_teacher(saved.origin, device_of(config.device), torch.float32)
    texts = distinct_texts(
        config.prompts or recorded_prompts(saved), config.seed, max(config.fidelity.prompts, config.paired.prompts)
    )
    noise = fixed_noises(config.seed, config.fidelity.prompts, parts.latent_shape()).to(parts.unet.device)
    sizes = [parts.check_size(size, "paired.sizes") for size in config.paired.sizes]
    sizes = sizes or list(saved.origin.learnt_sizes(parts.native_size))
    reader = None
    if config.velocity_states:
        cache = cache_folder(saved.folder)
        reader = Reader(cache, "validation", config.seed, unstated_size=parts.native_size)
    teacher, student = Teacher(parts, saved.origin.tail), load_student(saved, parts)
    return EvaluationSetup(sizes, saved, teacher, student, texts, noise, reader)


def distinct_texts(source: PromptSource, seed: int, count: int) -> list[str]:
    """Validation sentences, each once as far as the source has them; a longer list begins with the shorter one."""
    distinct = list(dict.fromkeys(prompt.text for prompt in prompts(source, seed, "validation", 4 * count)))
    return [distinct[i % len(distinct)] for i in range(count)]


def measure_fidelity(setup: EvaluationSetup, scorer: Scorer, config: Config) -> Mapping[str, Fidelity]:
    """Teacher by DDIM, student by its exported folder, and the student sampled as the noise model that it is not."""
    settings = config.fidelity

    def generate(pipeline: StableDiffusionPipeline, count: int, steps: int = settings.steps) -> Tensor:
        texts, noise = setup.texts[:count], setup.noise[:count]
        return generate_pictures(pipeline, texts, noise, steps, settings.guidance)

    folder, device = setup.teacher.components.present_folder(), setup.noise.device
    teacher, student = load_pipeline(folder, device), load_pipeline(verified_export(setup.run, setup.student), device)
    use_ddim_scheduler(teacher, folder)
    student_steps = setup.run.origin.windows or settings.steps
    pictures = {
        TEACHER: generate(teacher, settings.prompts),
        STUDENT: generate(student, settings.prompts, student_steps),
    }
    use_ddim_scheduler(student, folder)
    pictures[STUDENT_AS_NOISE_MODEL] = generate(student, min(settings.control_prompts, settings.prompts))
    rows = min(GRID_ROWS, len(pictures[STUDENT_AS_NOISE_MODEL]))
    image = make_sheet(setup.texts[:rows], list(pictures), [column[:rows] for column in pictures.values()])
    save_sheet(image, setup.run.folder / "evaluation.png", {"seed": config.seed, **settings.model_dump()})
    return {name: compute_fidelity(scorer, setup.texts[: len(shown)], shown) for name, shown in pictures.items()}


def measure_paired(setup: EvaluationSetup, config: Config, size: PictureSize) -> Mapping[str, Sequence[PairedError]]:
    """Paired-noise errors of the student at one size; at the main size also of controls, which must be larger."""
    paired = config.paired
    reference = teacher_reference(
        setup.teacher,
        setup.texts[: paired.prompts],
        config.seed,
        paired.sampler,
        size,
        paired.steps,
        paired.reference_steps,
    )
    cond = reference.inputs.cond
    measured = {STUDENT: (setup.field, cond)}
    if paired.controls and size == setup.main_size:
        copy, graft = (Student.from_teacher(setup.teacher.components.unet).eval() for _ in range(2))
        graft_time_embedding(graft.unet, setup.teacher.bridge)
        measured["undistilled graft"] = (student_field(graft), cond)
        measured["undistilled copy"] = (student_field(copy), cond)
        measured["wrong prompts"] = (setup.field, cond.roll(1, 0))
    return {
        name: [paired_error(field, reference, n, prompts_cond) for n in paired.steps]
        for name, (field, prompts_cond) in measured.items()
    }


def evaluate_loras(config: Config) -> None:
    """Measure the LoRAs of `config.lora`, print a report of each, and store them in the run's folder.

    Raises `Refused` before anything is written.
    """
    saved = open_run(config.run)
    refuse_few_steps(saved, "the measurement of LoRAs")
    reports = report_paths(saved.folder, config.lora)
    parts = load_run_teacher(saved.origin, device_of(config.device), torch.float32)
    loras = open_measured_loras(config.lora, parts)
    student, paired = load_student(saved, parts), config.paired
    export = verified_export(saved, student)
    size = paired.sizes[0] if paired.sizes else saved.origin.main_size(parts.native_size)
    inputs = LoraInputs(
        Teacher(parts, saved.origin.tail),
        student,
        distinct_texts(config.prompts or recorded_prompts(saved), config.seed, config.lora_prompts),
        config.seed,
        parts.check_size(size, "paired.sizes"),
        paired.sampler.model_copy(update={"steps": max(paired.steps)}).scaled_to(size, parts.native_size),
        paired.reference_steps,
        export,
    )
    measured = [measure_lora(lora, inputs) for lora in loras]
    for report, measurement in zip(reports, measured, strict=True):
        print_lora_report(measurement, saved.samples, console())
        atomic_write(report, lora_json(measurement, saved.samples))
        print(f"{report}: written")


def main(argv: Sequence[str]) -> int:
    """`sollune evaluate RUN --config FILE [options]`; 1 when a gate is missed."""
    usage = "usage: sollune evaluate RUN --config configs/tiny.yaml [options]"
    argv = name_first_argument(argv, "run", f"evaluate: which run? - {usage}")
    config = config_from_arguments(Config, "evaluate", argv)
    if config is None:
        return 0
    report = config.run / "evaluation.json"
    device_of(config.device)  # refused before the run is read, which takes longer
    if config.lora:
        evaluate_loras(config)
        return 0
    refuse_unwritable(report)
    evaluation = evaluate(config)
    results = check_gates(evaluation, config.gates)
    print_report(evaluation, results, console())
    atomic_write(report, to_json(evaluation, results))
    return 0 if all(result.passed for result in results) else 1
