"""The command `sollune evaluate`: fidelity, paired-noise and velocity errors of a student against its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from configs.load import config_from_arguments, name_first_argument
from configs.values import PictureSize
from shards.reader import Reader
from stages.evaluate.distances.coco import evaluate_coco
from stages.evaluate.distances.columns import Measures, open_measures
from stages.evaluate.distances.folders import PictureFolder, open_picture_folders
from stages.evaluate.distances.of_run import (
    Subjects,
    folder_fidelity,
    measure_distances,
    measure_straightness,
    read_folders,
    refuse_foreign_prompts,
)
from stages.evaluate.exported import verified_export
from stages.evaluate.lora import LoraInputs, measure_lora, open_measured_loras
from stages.evaluate.lora_report import lora_json, print_lora_report, report_paths
from stages.evaluate.metrics import Fidelity, Scorer, compute_fidelity
from stages.evaluate.paired import PairedError, make_reference
from stages.evaluate.recorded_prompts import distinct_texts, recorded_prompts
from stages.evaluate.report import (
    STUDENT,
    STUDENT_AS_NOISE_MODEL,
    TEACHER,
    Evaluation,
    SizeErrors,
    check_gates,
    print_report,
    to_json,
)
from stages.evaluate.settings import Config
from stages.evaluate.stored import (
    STORE_FOLDER,
    SampleStore,
    StoredInputs,
    folder_identity,
    stored_pictures,
    student_identity,
    teacher_identity,
)
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import SavedRun, cache_folder, load_run_teacher, load_student, open_run
from stages.nets.student import Student
from stages.nets.student_shape import prune_unet, refuse_pruned
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed
from stages.sampling.few_steps import few_steps_of_run, refuse_few_steps
from stages.sampling.fields import TwoBranchField, student_field, teacher_field
from stages.sampling.grids import fixed_noises, make_sheet, save_sheet
from stages.sampling.single_file import load_pipeline, use_ddim_scheduler
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.system.disk import refuse_unwritable
from stages.system.terminal import console
from stages.train.validation import read_first_states, velocity_errors

GRID_ROWS = 6
FEW_STEPS_NOTE = """\
{run}: paired errors are measured at its {steps} steps alone; velocity errors are left out, because its velocity is that
of whole windows, not of the teacher's branches"""


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
    store: SampleStore
    measures: Measures
    folders: Sequence[PictureFolder]
    """Pictures of other models."""

    @cached_property
    def field(self) -> TwoBranchField:
        """The student as it is sampled."""
        field = student_field(self.student, None, *(few_steps_of_run(self.run) or ()))
        return replace(field, identity=student_identity(self.run))

    @property
    def main_size(self) -> PictureSize:
        """The size of the controls and the gates: the model's own, or the first where that is not measured."""
        native = self.teacher.components.native_size
        return native if native in self.sizes else self.sizes[0]

    def subjects(self, config: Config, size: PictureSize) -> Subjects:
        """What the paired errors at one size are measured of: a longer list of texts begins with the same noises."""
        paired, parts, teacher = config.paired, self.teacher.components, self.teacher
        texts = self.texts[: paired.prompts]
        cond = teacher.encode_texts(texts)
        noise, other = (
            fixed_noises(one, len(texts), parts.latent_shape(size)).to(cond.device)
            for one in (config.seed, derived_seed("other noise", config.seed))
        )
        return Subjects(
            teacher,
            replace(teacher_field(teacher), identity=teacher_identity(self.run.origin)),
            self.field,
            StoredInputs(cond, teacher.uncond, noise, texts, self.store),
            other,
            paired.sampler.scaled_to(size, parts.native_size),
            paired.steps,
            paired.reference_steps,
        )


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
    setup.store.remove_abandoned()
    velocity = None
    if setup.held_out_reader is not None:
        states = read_first_states(setup.held_out_reader, config.velocity_states)
        velocity = velocity_errors(setup.student, states, setup.teacher.uncond)
    paired = {size: measure_paired(setup, config, size) for size in setup.sizes}
    main, names = setup.subjects(config, setup.main_size), (TEACHER, STUDENT)
    of_folders = read_folders(setup.folders, setup.measures, setup.main_size)
    distances = None
    if setup.folders or setup.measures.features or setup.measures.clip:
        # The scorer's table is of fidelity's pictures, and of those of folders.
        distances = measure_distances(main, replace(setup.measures, scorer=None), of_folders, names)
    straightness = measure_straightness(main, names)
    velocity_by_size = velocity.velocity_by_size if velocity else {}
    several = len({*paired, *velocity_by_size}) > 1
    return Evaluation(
        run=str(config.run),
        samples=setup.run.samples,
        tail=setup.run.origin.tail,
        settings=config.model_dump(mode="json", exclude={"gates", "run", "lora", "lora_prompts", "coco"}),
        # It comes last: it writes its pictures to a file, and nothing may be refused after that.
        fidelity=measure_fidelity(setup, config.scorer, config) | folder_fidelity(of_folders) if config.scorer else {},
        paired=paired[setup.main_size],
        velocity=velocity,
        size=str(setup.main_size),
        by_size={
            str(size): SizeErrors(paired.get(size, {}).get(STUDENT, ()), velocity_by_size.get(size))
            for size in dict.fromkeys((*paired, *velocity_by_size))
        }
        if several
        else {},
        straightness=straightness,
        distances=distances,
    )


def prepare_evaluation(config: Config) -> EvaluationSetup:
    """Open the run and fix the lists; raises `Refused` for a run that cannot be measured."""
    saved = open_run(config.run)
    folders = open_picture_folders(config.pictures, [TEACHER, STUDENT, STUDENT_AS_NOISE_MODEL])
    device = device_of(config.device)
    parts = load_run_teacher(saved.origin, device, torch.float32)
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
    store = SampleStore(saved.folder / STORE_FOLDER)
    setup = EvaluationSetup(sizes, saved, teacher, student, texts, noise, reader, store, Measures(), folders)
    measures = open_measures(config.features, config.clip, config.scorer, setup.main_size, device)
    refuse_foreign_prompts(folders, texts[: config.paired.prompts], measures)
    return replace(setup, measures=measures)


def measure_fidelity(setup: EvaluationSetup, scorer: Scorer, config: Config) -> dict[str, Fidelity]:
    """Teacher by DDIM, student by its exported folder, and the student sampled as the noise model that it is not."""
    settings = config.fidelity

    folder, device = setup.teacher.components.present_folder(), setup.noise.device
    export = verified_export(setup.run, setup.student)
    teacher, student = load_pipeline(folder, device), load_pipeline(export, device)
    identities = {id(teacher): teacher_identity(setup.run.origin), id(student): folder_identity(export)}

    def generate(pipeline: StableDiffusionPipeline, count: int, steps: int = settings.steps) -> Tensor:
        texts, noise = setup.texts[:count], setup.noise[:count]
        return stored_pictures(setup.store, identities[id(pipeline)], pipeline, texts, noise, steps, settings.guidance)

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
    subjects, controls = setup.subjects(config, size), config.paired.controls
    inputs = subjects.inputs
    reference = make_reference(
        subjects.teacher_field,
        inputs,
        subjects.other_noise,
        subjects.sampler,
        subjects.steps,
        subjects.reference_steps,
    )
    measured = {STUDENT: (subjects.student_field, inputs)}
    if controls and size == setup.main_size:
        unet = prune_unet(setup.teacher.components.unet, setup.run.origin.prune)
        copy, graft = (Student.from_teacher(unet).eval() for _ in range(2))
        graft_time_embedding(graft.unet, setup.teacher.bridge)
        for start, student in (("undistilled graft", graft), ("undistilled copy", copy)):
            identity = {**teacher_identity(setup.run.origin), "start": start}
            measured[start] = (replace(student_field(student), identity=identity), inputs)
        measured["wrong prompts"] = (subjects.student_field, inputs.with_neighbours_prompts())
    return {
        name: [reference.compare(of_field.sample(field, subjects.sampler_of(n)), n) for n in subjects.steps]
        for name, (field, of_field) in measured.items()
    }


def evaluate_loras(config: Config) -> None:
    """Measure the LoRAs of `config.lora`, print a report of each, and store them in the run's folder.

    Raises `Refused` before anything is written.
    """
    saved = open_run(config.run)
    refuse_few_steps(saved, "the measurement of LoRAs")
    refuse_pruned(saved.folder, saved.origin.prune, "the measurement of LoRAs made for the teacher")
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
    if config.coco:
        evaluate_coco(config, config.coco)
        return 0
    if config.lora:
        evaluate_loras(config)
        return 0
    refuse_unwritable(report)
    evaluation = evaluate(config)
    results = check_gates(evaluation, config.gates)
    print_report(evaluation, results, console())
    atomic_write(report, to_json(evaluation, results))
    return 0 if all(result.passed for result in results) else 1
