"""What is measured of a finished run: velocities at fixed held-out states, and pictures from fixed noises.

All runs of a study share the teacher's pictures, which are sampled once and kept.
"""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from configs.values import PictureSize
from shards.reader import Reader
from stages.ablation.jobs import HASH_CHARACTERS, MEASURED_FILE, DistillJob, Job, hash_of
from stages.ablation.metrics import JOURNAL_KEYS, bin_metric, picture_metric
from stages.ablation.table import Row
from stages.evaluate.metrics import Fidelity, compute_fidelity
from stages.evaluate.paired import PairedError, PairedInputs, TeacherReference, teacher_reference
from stages.evaluate.recorded_prompts import distinct_texts
from stages.evaluate.report import STUDENT, TEACHER, Evaluation, to_json
from stages.nets.run_folder import Origin, SavedRun, load_run_teacher, load_student, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.fields import TwoBranchField, student_field, teacher_field
from stages.sampling.grids import make_sheet, save_sheet
from stages.sampling.sampler import Sampler
from stages.system.atomic import atomic_path, atomic_write
from stages.system.device import device_of
from stages.system.disk import file_sha256
from stages.system.sharing import made_by_one
from stages.train.journal import read_events
from stages.train.validation import VelocityErrors, read_first_states, velocity_errors

DECODED_TOGETHER, SHOWN = 64, 6
PICTURES_FILE = "pictures.png"


@dataclass(frozen=True)
class Measured:
    """The figures of one run at its end."""

    settings: str
    weights: str
    samples: int
    figures: Mapping[str, float]
    prompts: str = ""
    """the hash of the list of prompts of its pictures; empty in files of before"""

    @classmethod
    def read(cls, job: Job) -> "Measured | None":
        """What was measured of a job with its present settings and prompts; None where nothing was."""
        try:
            content = json.loads((job.home / MEASURED_FILE).read_text(encoding="utf-8"))
            measured = cls(**content)
        except (OSError, ValueError, TypeError):
            return None
        same_prompts = measured.prompts in ("", job.prompts) or not job.prompts
        return measured if same_prompts and measured.settings == job.settings_hash() else None


def read_rows(job: Job) -> list[Row] | None:
    """The rows of a finished job: its figures, and its learning curves from the journal; None while unfinished."""
    measured = Measured.read(job)
    if measured is None:
        return None
    place = (job.study, job.regime, job.arm, job.seed)
    hashes = (measured.settings, measured.weights)
    rows = [Row(*place, measured.samples, name, value, *hashes) for name, value in measured.figures.items()]
    for line in read_events(job.run_folder, "validation", measured.samples) if job.trains else []:
        for name, key in JOURNAL_KEYS.items():
            if isinstance(line.get(key), float):
                rows.append(Row(*place, line["samples"], name, line[key], *hashes))
    return rows


def measure(job: DistillJob, origin: Origin) -> Measured:
    """Measure a job's model, and store the figures; a student's also as its run's evaluation.json.

    `origin` is that of a student of the cache.
    """
    parts = load_run_teacher(origin, device_of(job.evaluate.device), torch.float32)
    teacher = Teacher(parts, origin.tail)
    saved = open_run(job.run_folder) if job.trains else None
    student = load_student(saved, parts) if saved is not None else None
    if job.model == "teacher_as_student":
        student = Student.from_teacher(parts.unet).eval()
    velocity = None
    if student is not None and job.evaluate.velocity_states:
        reader = Reader(job.home / "cache", "validation", job.evaluate.seed, unstated_size=parts.native_size)
        states = read_first_states(reader, job.evaluate.velocity_states)
        velocity = velocity_errors(student, states, teacher.uncond)
    field = student_field(student) if student is not None else None
    pictures = [measure_pictures(job, teacher, field, guidance) for guidance in job.guidance]
    save_sheet(
        make_sheet(pictures[0].texts, ["teacher", job.arm], pictures[0].first),
        job.home / PICTURES_FILE,
        {"steps": max(job.evaluate.paired.steps), "guidance": job.guidance[0], "run": job.label},
    )
    weights = hash_of(dict(origin.teacher_sha256))
    if saved is not None:
        weights = file_sha256(saved.weights)[:HASH_CHARACTERS]
        save_evaluation(job, saved, parts.native_size, pictures[0], velocity)
    figures = {**_velocity_figures(velocity), **_picture_figures(job, pictures)}
    measured = Measured(job.settings_hash(), weights, saved.samples if saved is not None else 0, figures, job.prompts)
    atomic_write(job.home / MEASURED_FILE, json.dumps(vars(measured), indent=1) + "\n")
    return measured


@dataclass(frozen=True)
class PictureErrors:
    """Errors and fidelity of pictures under one guidance scale."""

    errors: Sequence[PairedError]
    fidelity: Mapping[int, Fidelity]
    """number of steps -> of the model's pictures; empty without a scorer"""
    teacher_fidelity: Fidelity | None
    """of the teacher's reference"""
    texts: Sequence[str]
    """of the first pictures"""
    first: tuple[Tensor, Tensor]
    """the teacher's reference, and the model's pictures in the most steps"""


def measure_pictures(job: DistillJob, teacher: Teacher, field: TwoBranchField | None, guidance: float) -> PictureErrors:
    """The pictures of a student's field, or of the teacher itself where that is None, at each number of steps."""
    paired, scorer = job.evaluate.paired, job.evaluate.scorer
    texts, reference = shared_reference(job, teacher, guidance)
    sampler = reference.sampler if field is not None else reference.sampler.for_teacher
    errors, fidelity, first = list[PairedError](), dict[int, Fidelity](), torch.empty(0)
    for steps in sorted(paired.steps):
        own = sampler.model_copy(update={"steps": steps})
        x0 = reference.inputs.sample(field or teacher_field(teacher), own)
        errors.append(reference.compare(x0, steps))
        if scorer is not None:
            fidelity[steps] = compute_fidelity(scorer, texts, decode(teacher, x0))
        first = decode(teacher, x0[:SHOWN])
    own_fidelity = compute_fidelity(scorer, texts, decode(teacher, reference.x0)) if scorer is not None else None
    shown = decode(teacher, reference.x0[:SHOWN]), first
    return PictureErrors(errors, fidelity, own_fidelity, texts[:SHOWN], shown)


def shared_reference(job: DistillJob, teacher: Teacher, guidance: float) -> tuple[list[str], TeacherReference]:
    """The sentences, and the teacher's pictures of them, which the first run samples for all.

    A lock lets the others wait for it; a file that is broken is made again.
    """
    paired, components = job.evaluate.paired, teacher.components
    sampler = paired.sampler.model_copy(update={"guidance": guidance})
    assert job.evaluate.prompts is not None
    texts = distinct_texts(job.evaluate.prompts, job.evaluate.seed, paired.prompts)
    digests = dict(components.files.digests) if components.files is not None else {}
    settings = {
        **job.evaluation_settings(),
        "prompts": texts,
        "guidance": guidance,
        "teacher": digests,
        "tail": teacher.bridge.tail,
    }
    file = job.references / f"{hash_of({**settings, 'scorer': None, 'velocity_states': 0})}.pt"
    with made_by_one(file):
        reference = _load_reference(file, sampler, components.unet.device)
        if reference is None:
            size = components.native_size
            reference = teacher_reference(
                teacher, texts, job.evaluate.seed, sampler, size, paired.steps, paired.reference_steps
            )
            _save_reference(file, reference)
    return texts, reference


def _save_reference(file: Path, reference: TeacherReference) -> None:
    tensors = {
        **vars(reference.inputs),
        "x0": reference.x0,
        "ceiling": reference.ceiling,
        **{f"floor {steps}": errors for steps, errors in reference.floors.items()},
    }
    with atomic_path(file) as temporary:
        torch.save({name: value.cpu() for name, value in tensors.items()}, temporary)


def _load_reference(file: Path, sampler: Sampler, device: torch.device) -> TeacherReference | None:
    try:
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        inputs = PairedInputs(*(tensors.pop(name).to(device) for name in ("cond", "uncond", "noise")))
        x0, ceiling = tensors.pop("x0").to(device), tensors.pop("ceiling")
        floors = {int(name.removeprefix("floor ")): errors for name, errors in tensors.items()}
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, pickle.UnpicklingError):
        return None
    return TeacherReference(inputs, sampler, x0, ceiling, floors)


def decode(teacher: Teacher, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
    """Pictures of latents, in batches, on the CPU."""
    return torch.cat([teacher.decode_latents(rows).cpu() for rows in latents.split(DECODED_TOGETHER)])


def save_evaluation(
    job: DistillJob, saved: SavedRun, size: PictureSize, pictures: PictureErrors, velocity: VelocityErrors | None
) -> None:
    """Write the run's evaluation.json, as `sollune evaluate` does, with what was measured here."""
    fidelity: dict[str, Fidelity] = {}
    if pictures.teacher_fidelity is not None:
        fidelity = {TEACHER: pictures.teacher_fidelity, STUDENT: pictures.fidelity[max(pictures.fidelity)]}
    evaluation = Evaluation(
        run=str(saved.folder),
        samples=saved.samples,
        tail=saved.origin.tail,
        settings=job.evaluation_settings(),
        fidelity=fidelity,
        paired={STUDENT: pictures.errors},
        velocity=velocity,
        size=str(size),
    )
    atomic_write(saved.folder / "evaluation.json", to_json(evaluation, []))


def _velocity_figures(velocity: VelocityErrors | None) -> dict[str, float]:
    if velocity is None:
        return {}
    bins = velocity.velocity.by_bin
    by_bin = {bin_metric(i, len(bins)): value for i, value in enumerate(bins) if value is not None}
    return {"velocity error": velocity.velocity.overall, "guidance error": velocity.guidance.overall, **by_bin}


def _picture_figures(job: DistillJob, pictures: Sequence[PictureErrors]) -> dict[str, float]:
    """By name; the guidance scale stands in it where there are several."""
    figures = dict[str, float]()
    for guidance, one in zip(job.guidance, pictures, strict=True):
        scale = guidance if len(job.guidance) > 1 else None
        figures |= {picture_metric("paired error", error.steps, scale): error.student for error in one.errors}
        shares = {steps: fidelity.all_at_once for steps, fidelity in one.fidelity.items()}
        figures |= {picture_metric("pictures right", steps, scale): share for steps, share in shares.items()}
    return figures
