"""The models that `benchmarks.few_steps` compares, and what they sample: latents, the judge's answers and features.

What was sampled is stored under a digest of all that decides it, so that a measurement goes on where it was left.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.evaluate.paired import PairedInputs
from stages.evaluate.recorded_prompts import recorded_prompts
from stages.nets.run_folder import (
    COMPLETE_MARK,
    FAST_FOLDER,
    SavedRun,
    is_run,
    load_run_teacher,
    load_student,
    open_run,
)
from stages.nets.teacher import Teacher
from stages.prompts import PromptSource, derived_seed, split_of
from stages.sampling.fields import TwoBranchField, student_field, teacher_field
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler
from stages.system.atomic import atomic_path
from stages.system.disk import file_sha256
from stages.system.refusal import Refused
from stages.tiny.score import load_classifier
from stages.tiny.world import ATTRIBUTES, PIXELS, parse_attributes, world_grammar

CPU = torch.device("cpu")
BATCH = 50
MAX_PROMPTS_READ = 1000
"""For each sentence that is wanted, most prompts of a source that are looked through for distinct ones."""


@dataclass(frozen=True)
class Model:
    """A field, what decides its answers, and the network behind it."""

    field: TwoBranchField
    identity: Mapping[str, Any]
    unet: torch.nn.Module


@dataclass(frozen=True)
class Run:
    """One seed: the distilled student, and the students of few steps by their number of windows, falling."""

    folder: Path
    distilled: Model
    fast: Mapping[int, Model]
    saved: Mapping[int, SavedRun]
    """Of the students of few steps."""


@dataclass(frozen=True)
class Subjects:
    """The teacher of all runs, the runs, and where their sentences come from."""

    teacher: Teacher
    as_model: Model
    runs: Sequence[Run]
    source: PromptSource


@dataclass(frozen=True)
class Inputs(PairedInputs):
    """A fixed list of sentences and noises, and what decides it."""

    texts: Sequence[str]
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Pictures:
    """What a model sampled: latents, and of their pictures the judge's answers and the features below them."""

    latents: Float[Tensor, "b c h w"]
    answers: Int[Tensor, "b 5"]
    features: Float[Tensor, "b 128"]


def open_subjects(folders: Sequence[Path]) -> Subjects:
    """Open run folders such as runs/tiny; raises `Refused` for runs that cannot be compared.

    An unfinished student of few steps is named and left out.
    """
    if repeated := [folder for i, folder in enumerate(folders) if folder.resolve() in _resolved(folders[:i])]:
        raise Refused(f"{repeated[0]}: stands there more than once - name each run once, one for each seed")
    bases = [_finished(folder / "distill") for folder in folders]
    first, source = bases[0], recorded_prompts(bases[0])
    for base in bases[1:]:
        if (base.origin.teacher_sha256, base.origin.tail) != (first.origin.teacher_sha256, first.origin.tail):
            raise Refused(f"{base.folder}: has another teacher than {first.folder} - compare runs of one teacher")
        if recorded_prompts(base) != source:
            raise Refused(f"{base.folder}: has other prompts than {first.folder} - compare runs of one source")
    fasts = [_fast_runs(folder) for folder in folders]
    parts = load_run_teacher(first.origin, CPU, torch.float32)
    if (parts.native_size.width, parts.native_size.height) != (PIXELS, PIXELS):
        raise Refused(f"{first.folder}: pictures of {parts.native_size} - the judge knows the embedded world alone")
    teacher = Teacher(parts, first.origin.tail)

    def open_model(saved: SavedRun) -> Model:
        student, origin = load_student(saved, parts), saved.origin
        identity = {"weights": file_sha256(saved.weights), "target": origin.target, "windows": origin.windows}
        field = student_field(student, windows=origin.windows, guidance_range=origin.guidance_range)
        return Model(field, identity, student.unet)

    runs = [
        Run(folder, open_model(base), {n: open_model(one) for n, one in fast.items()}, fast)
        for folder, base, fast in zip(folders, bases, fasts, strict=True)
    ]
    identity = {"teacher": first.origin.teacher_sha256, "tail": first.origin.tail}
    return Subjects(teacher, Model(teacher_field(teacher), identity, parts.unet), runs, source)


def _resolved(folders: Sequence[Path]) -> set[Path]:
    return {folder.resolve() for folder in folders}


def _finished(folder: Path) -> SavedRun:
    saved = open_run(folder)
    if not (folder / COMPLETE_MARK).is_file():
        raise Refused(f"{folder}: is not finished ({COMPLETE_MARK} is missing) - let its command end first")
    return saved


def _fast_runs(folder: Path) -> dict[int, SavedRun]:
    """The finished students of few steps of a run by their number of windows, falling."""
    places = [place for place in (folder / FAST_FOLDER).glob("*") if place.name.isdecimal() and is_run(place)]
    found: dict[int, SavedRun] = {}
    for place in sorted(places, key=lambda one: -int(one.name)):
        if not (place / COMPLETE_MARK).is_file():
            print(f"{place}: is not finished, left out", flush=True)
            continue
        saved = open_run(place)
        if saved.origin.windows != int(place.name):
            raise Refused(f"{place}: its student has {saved.origin.windows} windows - rename it to their number")
        found[int(place.name)] = saved
    return found


def distinct_sentences(source: PromptSource, seed: int, count: int) -> list[str]:
    """`count` validation sentences, no two the same; raises `Refused` where the source has fewer."""
    distinct: dict[str, None] = {}
    for prompt in islice(source.iter_prompts(seed), MAX_PROMPTS_READ * count):
        if split_of(prompt.text) == "validation":
            distinct[prompt.text] = None
        if len(distinct) == count:
            break
    if len(distinct) < count:
        raise Refused(f"--prompts: {count}: the source has {len(distinct)} distinct sentences - ask for no more")
    return list(distinct)


def open_ended(texts: Sequence[str], count: int) -> list[str]:
    """The sentences that leave most attributes unsaid, those of the same number in their order."""
    unsaid = {text: len(ATTRIBUTES) - len(parse_attributes(text)) for text in texts}
    return [text for text in sorted(texts, key=lambda text: -unsaid[text]) if unsaid[text]][:count]


def make_inputs(teacher: Teacher, texts: Sequence[str], seed: int, noise: str, noises: int = 1) -> Inputs:
    """Each sentence with as many noises of its own, row after row; `noise` names one of several lists."""
    repeated = [text for text in texts for _ in range(noises)]
    cond = torch.cat([teacher.encode_texts(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])
    shape = teacher.components.latent_shape()
    identity = {
        "texts": hashlib.sha256("\n".join(repeated).encode()).hexdigest(),
        "noise": [noise, seed],
    }
    fixed = fixed_noises(derived_seed("few steps", noise, seed), len(repeated), shape)
    return Inputs(cond.repeat_interleave(noises, 0), teacher.uncond, fixed, repeated, identity)


@torch.inference_mode()
def judge(pictures: Float[Tensor, "b 3 h w"]) -> tuple[Int[Tensor, "b 5"], Float[Tensor, "b 128"]]:
    """The judge's answer to each attribute and the features from which it answers, of pictures in [0, 1]."""
    net = load_classifier()
    features: Tensor = net.trunk(pictures.float() * 2 - 1)
    logits = net.head(features).split(net.counts, dim=1)
    return torch.stack([one.argmax(1) for one in logits], dim=1), features


def all_right(texts: Sequence[str], answers: Int[Tensor, "b 5"]) -> Bool[Tensor, " b"]:
    """Whether each picture shows every attribute that its sentence names."""
    words = [world_grammar().words_of(name) for name in ATTRIBUTES]
    rows = [
        all(words[i][answer] == named.get(name, words[i][answer]) for i, (name, answer) in enumerate(zipped))
        for named, row in zip(map(parse_attributes, texts), answers.tolist(), strict=True)
        for zipped in [list(zip(ATTRIBUTES, row, strict=True))]
    ]
    return torch.tensor(rows)


@dataclass(frozen=True)
class Measurement:
    """Samples models, and stores what they sampled in a folder."""

    teacher: Teacher
    folder: Path

    def pictures(self, model: Model, inputs: Inputs, sampler: Sampler) -> Pictures:
        """What a model samples from these inputs, sampled now or before."""
        settings = sampler.model_dump(mode="json", exclude={"batch_size"})
        key = {"model": model.identity, "inputs": inputs.identity, "sampler": settings}
        text = json.dumps(key, sort_keys=True)
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.safetensors"
        if not file.exists():
            sampler = sampler.model_copy(update={"batch_size": BATCH})
            latents = inputs.sample(model.field, sampler)
            judged = [judge(self.teacher.decode_latents(some)) for some in latents.split(BATCH)]
            answers, features = (torch.cat(parts) for parts in zip(*judged, strict=True))
            with atomic_path(file) as temporary:
                save_file({"latents": latents, "answers": answers, "features": features}, temporary, {"key": text})
        return Pictures(**load_file(file))


@contextmanager
def counted_rows(unet: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """How many rows went through the network so far: one row is one call for one picture."""
    rows = 0

    def count(_module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal rows
        rows += len(arguments[0] if arguments else keywords["sample"])

    hook = unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield lambda: rows
    finally:
        hook.remove()
