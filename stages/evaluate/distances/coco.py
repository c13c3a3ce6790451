"""The COCO protocol: distances of pictures of COCO's captions to its photographs, and CLIP's score of both.

Photographs are cropped in the middle to the model's size. The published figures differ in captions, resampling, crops
and guidance: compare with the teacher that is measured beside the student, and with those only for the order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from configs.values import PictureSize
from stages.evaluate.distances.columns import Column, Measures, PictureSet, open_measures, published_column
from stages.evaluate.distances.folders import PictureFolder, load_pictures, normalise, open_picture_folders
from stages.evaluate.report import STUDENT, TEACHER, make_table, replace_non_finite
from stages.evaluate.settings import CocoConfig, Config
from stages.evaluate.stored import STORE_FOLDER, SampleStore, StoredInputs, student_identity, teacher_identity
from stages.nets.run_folder import load_run_teacher, load_student, open_run
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed
from stages.sampling.few_steps import few_steps_of_run
from stages.sampling.fields import TwoBranchField, student_field, teacher_field
from stages.sampling.grids import fixed_noise
from stages.sampling.sampler import Sampler
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Refused, format_value, in_one_line
from stages.system.terminal import console
from stages.system.text import parse_json, read_clean_text

COCO_FILE = "coco.json"
PHOTOGRAPHS, HALVES = "photographs", "one half of them against the other"
DECODED_TOGETHER = 16
REMEDY = "name a file such as captions_val2017.json, and the folder of its pictures"


@dataclass(frozen=True)
class Published:
    """A figure as its authors state it, of a model made of Stable Diffusion 1.5."""

    model: str
    steps: int
    pictures: int
    fid: float
    clip: float | None = None


PUBLISHED = (
    Published("Stable Diffusion 1.5", 25, 5000, 20.1, 0.318),
    Published("PeRFlow", 4, 5000, 22.97),
    Published("Rectified Diffusion (phased)", 4, 5000, 20.49),
    Published("Flash Diffusion", 2, 5000, 22.6),
    Published("Flash Diffusion", 4, 5000, 22.5),
    Published("SiD-LSG", 1, 30000, 8.15),
)


@dataclass(frozen=True)
class CaptionedPhotographs:
    """Photographs, each with one of its captions."""

    files: Sequence[Path]
    texts: Sequence[str]


@dataclass(frozen=True)
class SampledModel:
    """A field and how it is sampled."""

    field: TwoBranchField
    sampler: Sampler


def evaluate_coco(config: Config, coco: CocoConfig) -> None:
    """Measure a run against COCO's photographs, print the tables, and store the figures in the run's folder.

    Raises `Refused` before anything is sampled.
    """
    saved = open_run(config.run)
    report = saved.folder / COCO_FILE
    refuse_unwritable(report)
    if config.lora:
        raise Refused("coco: LoRAs are measured alone - leave coco or lora out")
    if config.features is None and config.clip is None:
        raise Refused("coco: nothing is measured without features or clip - name one of them, or both")
    photographs = read_captions(coco, config.seed)
    folders = open_picture_folders(config.pictures, [PHOTOGRAPHS, HALVES, TEACHER, STUDENT])
    device = device_of(config.device)
    parts = load_run_teacher(saved.origin, device, torch.float32)
    teacher, student = Teacher(parts, saved.origin.tail), load_student(saved, parts)
    own = student_field(student, None, *(few_steps_of_run(saved) or ()))
    models = {
        STUDENT: SampledModel(replace(own, identity=student_identity(saved)), coco.sampler),
        TEACHER: SampledModel(
            replace(teacher_field(teacher), identity=teacher_identity(saved.origin)), coco.sampler.for_teacher
        ),
    }
    for model in models.values():
        model.sampler.steps_for(model.field)
    measures = open_measures(config.features, config.clip, None, parts.native_size, device)
    store = SampleStore(saved.folder / STORE_FOLDER)
    store.remove_abandoned()
    columns = measure_coco(photographs, models, folders, measures, teacher, store, config.seed)
    facts = {
        "run": str(config.run),
        "samples": saved.samples,
        "features": config.features,
        "clip": config.clip,
        "seed": config.seed,
        "settings": coco.model_dump(mode="json"),
    }
    print_coco(columns, config.features, console())
    atomic_write(report, coco_json(columns, facts))
    print(f"{report}: written")


def read_captions(config: CocoConfig, seed: int) -> CaptionedPhotographs:
    """`count` photographs, a longer list beginning with a shorter one, each with its first caption.

    Raises `Refused` for a file that is not COCO's, for fewer photographs, and for one that is missing.
    """
    place = f"coco.captions: {config.captions}"
    text = read_clean_text(config.captions, place, REMEDY)
    try:
        content: Any = parse_json(text)
        names = {int(one["id"]): str(one["file_name"]) for one in content["images"]}
        captions: dict[int, tuple[int, str]] = {}
        for one in content["annotations"]:
            image, entry = int(one["image_id"]), (int(one["id"]), normalise(str(one["caption"])))
            captions[image] = min(captions.get(image, entry), entry)
    except (ValueError, LookupError, TypeError) as error:
        raise Refused(f"{place}: is no file of COCO's captions ({in_one_line(error)}) - {REMEDY}") from error
    usable = [image for image in names if captions.get(image, (0, ""))[1]]
    if config.count > len(usable):
        raise Refused(f"coco.count: {config.count}: {config.captions} has {len(usable)} captioned - ask for no more")
    if not config.images.is_dir():
        raise Refused(f"coco.images: {config.images}: is no folder - {REMEDY}")
    chosen = sorted(usable, key=lambda image: (derived_seed("coco", seed, image), image))[: config.count]
    for image in chosen:
        name = names[image]
        if Path(name).name != name or not (config.images / name).is_file():
            raise Refused(f"coco.images: {config.images}: has no picture {format_value(name)} - {REMEDY}")
    return CaptionedPhotographs([config.images / names[one] for one in chosen], [captions[one][1] for one in chosen])


def measure_coco(
    photographs: CaptionedPhotographs,
    models: Mapping[str, SampledModel],
    folders: Sequence[PictureFolder],
    measures: Measures,
    teacher: Teacher,
    store: SampleStore,
    seed: int,
) -> dict[str, Column]:
    """A column for the photographs, for their halves, and for each model and folder."""
    size, texts = teacher.components.native_size, photographs.texts
    # Before anything is sampled: a photograph that cannot be read ends the command.
    real = measures.read(texts, load_pictures(photographs.files, size))
    of_folders = {one.name: _matched(one, texts, real, measures, size) for one in folders}
    rows = range(real.count)
    halves = real.rows(rows[::2]), real.rows(rows[1::2])
    columns = {PHOTOGRAPHS: Column(real.count, clip=real.mean_cosine)}
    if real.features is not None:
        columns[HALVES] = replace(published_column(*halves), clip=None)
    for name, model in models.items():
        batches = sample_captions(model, texts, teacher, store, seed)
        columns[name] = published_column(measures.read(texts, batches), real, model.sampler.steps_for(model.field))
    return columns | of_folders


def sample_captions(
    model: SampledModel, texts: Sequence[str], teacher: Teacher, store: SampleStore, seed: int
) -> Iterator[Float[Tensor, "b 3 height width"]]:
    """A model's pictures of the captions, in batches that are sampled now or before."""
    shape, together = teacher.components.latent_shape(), model.sampler.batch_size
    for first in range(0, len(texts), together):
        of_batch = texts[first : first + together]
        noise = torch.stack([fixed_noise(seed, first + i, shape) for i in range(len(of_batch))])
        cond = teacher.encode_texts(of_batch)
        inputs = StoredInputs(cond, teacher.uncond, noise.to(cond.device), of_batch, store)
        for latents in inputs.sample(model.field, model.sampler).split(DECODED_TOGETHER):
            yield teacher.decode_latents(latents).cpu()


def _matched(
    folder: PictureFolder, texts: Sequence[str], real: PictureSet, measures: Measures, size: PictureSize
) -> Column:
    """The column of the pictures of these captions in a folder; raises `Refused` for fewer than two."""
    rows, of_folder = folder.rows_of(texts)
    if len(rows) < 2:
        raise Refused(
            f"pictures: {folder.name}: {len(rows)} of its prompts are among the {len(texts)} captions, two are the "
            f"least - list the captions as they are (the first: {format_value(texts[0])})"
        )
    of_captions = measures.read([texts[i] for i in rows], folder.batches(of_folder, size))
    return published_column(of_captions, real.rows(rows))


def coco_json(columns: Mapping[str, Column], facts: Mapping[str, Any]) -> str:
    """The figures and the published ones for programs."""
    published = [asdict(one) for one in PUBLISHED]
    content = {**facts, "columns": {name: asdict(one) for name, one in columns.items()}, "published": published}
    return json.dumps(replace_non_finite(content), indent=1, allow_nan=False) + "\n"


def print_coco(columns: Mapping[str, Column], features: str | None, console: Console) -> None:
    """Print the figures, and below them the published ones."""
    rows = [
        (
            name,
            _number(one.steps, "d"),
            f"{one.pictures}",
            _number(one.frechet),
            _number(one.kid, ".4f"),
            _number(one.clip),
        )
        for name, one in columns.items()
    ]
    heads = ["", "steps", "pictures", "Frechet", "KID", "CLIP"]
    console.print(make_table(f"against COCO's photographs, features {features or 'none'}", heads, rows))
    stated = [(one.model, f"{one.steps}", f"{one.pictures}", f"{one.fid:g}", _number(one.clip)) for one in PUBLISHED]
    title = "as their authors state it, with Inception's features and protocols of their own"
    console.print(make_table(title, ["", "steps", "pictures", "FID", "CLIP"], stated))


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"
