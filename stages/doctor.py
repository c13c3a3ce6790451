"""The command `sollune doctor TEACHER`: opens a teacher as stage one would, and prints a page on all of it."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from configs.load import config_from_arguments, name_first_argument
from configs.values import NonEmpty, PictureSize, Strict
from stages.cache.plan import blank_record, record_bytes
from stages.cache.sizes import RenderSizes, normalized_shares
from stages.cache.targets import RenderConfig
from stages.nets.components import Components, load_components, open_teacher, read_schedule
from stages.nets.loading import load_component, load_tokenizer
from stages.nets.measured_teacher import used_prediction
from stages.nets.prediction import measure_prediction
from stages.nets.teacher import Teacher
from stages.nets.tokens import PROBE_SENTENCE
from stages.prompts import truncation_lines
from stages.sampling.grids import fixed_noise, make_sheet, save_sheet
from stages.sampling.sampler import Sampler, sample_teacher
from stages.system.device import device_of
from stages.system.disk import free_bytes, refuse_unwritable
from stages.system.ending import LIBRARIES, installed_version
from stages.system.memory import GIB, available_bytes
from stages.system.refusal import Refused
from stages.teacher_files.architecture import check_component_match, check_sd1_architecture
from stages.teacher_files.folder import component_files
from stages.teacher_files.open import TeacherFolder
from stages.teacher_files.source import TeacherSource
from stages.teacher_files.variants import WEIGHT_FILES
from stages.train.setup import BYTES_OF_GRADIENT_AND_AVERAGE, BYTES_OF_MOMENTS, BYTES_OF_WEIGHTS

USAGE = "usage: sollune doctor TEACHER [--teacher.* ...] [--render.sizes ...] [--out PAGE.png], or --help"
PROMPTS = 1000
"""For which the cost of a cache is given."""
MAX_FILES, MAX_NOTES = 10, 6
"""Lines on files and notes, so that the page stays one."""
MAX_ROUND_TRIP_ERROR = 1.0
"""Of latents decoded and encoded again, relative: an autoencoder that returns nothing of them has 1."""
Result = TypeVar("Result")


class Config(Strict):
    """State of a teacher, before anything is made with it, what it is and whether all will work.

    Exit code 2 where something would fail later.
    """

    teacher: TeacherSource = Field(description="the model, as cache-teacher takes it")
    render: RenderConfig = Field(RenderConfig(), description="the cache whose cost is given")
    sentence: NonEmpty = Field("a red flower", description="what the pictures show")
    sampler: Sampler = Field(Sampler(steps=10), description="how the pictures are made")
    out: Path | None = Field(None, description="PNG file for a picture at each size; none: they are made, and dropped")
    run: Path = Field(Path("runs"), description="where the cache would lie: its disk is looked at")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")


@dataclass
class Page:
    """What is printed, and what would fail later."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, title: str, *texts: str) -> None:
        """A line for each text, the first with a title."""
        self.lines += [f"{title if i == 0 else '':<13}{text}" for i, text in enumerate(texts)]

    def attempt(self, act: Callable[[], Result]) -> Result | None:
        """The result of an act; None where it is refused, which is a problem."""
        try:
            return act()
        except Refused as refusal:
            self.problems += [line for line in str(refusal).splitlines() if line not in self.problems]
            return None


def main(argv: Sequence[str]) -> int:
    """`sollune doctor TEACHER ...`."""
    argv = name_first_argument(argv, "teacher", f"doctor: which teacher? - {USAGE}")
    config = config_from_arguments(Config, "doctor", argv)
    if config is not None:
        run(config)
    return 0


def run(config: Config) -> None:
    """Print the page; raises `Refused` with a line for each problem, after the page."""
    if config.out is not None:
        _refuse_out(config.out)
    device = device_of(config.device)
    files = open_teacher(config.teacher)
    page = Page()
    describe_files(page, files)
    parts = page.attempt(lambda: load_components(files, device, torch.float32))
    if parts is None:
        find_more_problems(page, files.folder)
    else:
        describe_parts(page, parts)
        parts = describe_prediction(page, files, parts)
        sizes = page.attempt(lambda: RenderSizes.checked(config.render.sizes, parts.latents))
        teacher = Teacher(parts, config.render.tail)
        seconds = make_pictures(page, config, teacher, sizes.listed if sizes else (parts.native_size,))
        if sizes:
            describe_cache(page, config, teacher, sizes, seconds)
        describe_training(page, parts, device)
    describe_machine(page, device)
    count = len(page.problems)
    problems = f"{count} problem{'s' * (count > 1)}, on standard error"
    page.add("result", problems if count else "nothing stands against it")
    print("\n".join(page.lines), flush=True)
    if page.problems:
        raise Refused("\n".join(page.problems))


def _refuse_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise Refused(f"--out {out}: pictures are written as PNG - give it a name that ends in .png")
    refuse_unwritable(out)


def describe_files(page: Page, files: TeacherFolder) -> None:
    """Where it lies, what was taken of it, and the files that its weights come from."""
    source = files.source
    page.add("teacher", files.location + (f", composed in {files.folder}" if files.is_composed else ""))
    loras = [f"{lora.file} times {lora.scale:g}" for lora in source.loras]
    mix = [f"{one.model} times {one.weight:g}" for one in source.mix]
    page.add(
        "options",
        f"mix {', '.join(mix) or 'none'}; autoencoder {source.vae or 'its own'}; LoRAs {', '.join(loras) or 'none'}; "
        f"clip skip {source.clip_skip}; averaged weights {'taken' if source.averaged else 'not taken'}",
    )
    if files.notes:
        page.add("notes", *files.notes[:MAX_NOTES])
    listed = page.attempt(lambda: files.sources) or ()
    more = [f"and {len(listed) - MAX_FILES} more"] if len(listed) > MAX_FILES else []
    page.add(
        "files",
        *(
            f"{one.role:13} {one.path.stat().st_size:>14,} B  {one.sha256[:12]}  {one.path}"
            for one in listed[:MAX_FILES]
        ),
        *more,
    )


def find_more_problems(page: Page, folder: Path) -> None:
    """Try each part of a folder that cannot be loaded as a whole, so that all that is broken is listed at once."""
    page.attempt(lambda: check_sd1_architecture(folder))
    page.attempt(lambda: read_schedule(folder))
    page.attempt(lambda: check_component_match(folder))
    page.attempt(lambda: load_tokenizer(folder))
    for part in WEIGHT_FILES:
        page.attempt(partial(load_component, folder, part, torch.float32))


def describe_parts(page: Page, parts: Components) -> None:
    """Parameters and stored types of each part, all of them finite, and the tokenizer's round trip."""
    texts = []
    for name in WEIGHT_FILES:
        count = sum(value.numel() for value in getattr(parts, name).parameters())
        texts.append(f"{name:13} {count:>14,} parameters, stored as {stored_types(parts.folder, name)}, all finite")
    page.add("parts", *texts)
    ids = parts.tokenizer(PROBE_SENTENCE, add_special_tokens=False).input_ids
    back = parts.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    page.add(
        "tokenizer",
        f"{len(parts.tokenizer):,} tokens, {parts.tokenizer.model_max_length} a sentence; "
        f"{PROBE_SENTENCE!r} is {len(ids)} tokens and comes back as {str(back).strip()!r}",
    )


def stored_types(folder: Path, part: str) -> str:
    """The types of a part's tensors in its files."""
    types: set[str] = set()
    for file in (file for file in component_files(folder, part) if file.suffix == ".safetensors"):
        with safe_open(file, "pt") as tensors:
            types |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    return " and ".join(sorted(types)) or "a pickle"


def describe_prediction(page: Page, files: TeacherFolder, parts: Components) -> Components:
    """What its files state, what was measured and what is used; the parts with the schedule that is used."""
    measured = measure_prediction(parts)
    stated = ", ".join(f"{key} {value}" for key, value in files.stated.items()) or "nothing"
    page.add("prediction", f"its files state {stated}", f"measured: {measured.verdict}", *measured.table())
    used = page.attempt(lambda: used_prediction(files.source, files.stated, measured, parts.schedule))
    if used:
        page.add("", *used.lines)
        changed = page.attempt(lambda: used.applied_to(parts))
        parts = changed or parts
    schedule, alpha_bar = parts.schedule, parts.schedule.alpha_bar
    last = Teacher(parts, "hold").bridge.s_last
    page.add(
        "schedule",
        f"{schedule.steps} steps, {schedule.prediction_type}; signal share {float(alpha_bar[0]):.5f} to "
        f"{float(alpha_bar[-1]):.5f}{' (zero terminal SNR)' if schedule.has_zero_terminal_snr else ''}; "
        f"last time s = {last:.5f}, {'no tail' if last == 1 else 'the tail policy beyond'}",
    )
    return parts


def make_pictures(
    page: Page, config: Config, teacher: Teacher, sizes: Sequence[PictureSize]
) -> dict[PictureSize, float]:
    """A picture at each size, and the autoencoder's round trip; returns the seconds of a step of a picture."""
    seconds, columns, texts = {}, [], []
    cond = teacher.encode_texts([config.sentence])
    for size in sizes:
        noise = fixed_noise(0, 0, teacher.components.latent_shape(size))[None].to(cond.device)
        sample_teacher(teacher, cond, teacher.uncond, noise, config.sampler.model_copy(update={"steps": 1}))  # warm up
        began = time.perf_counter()
        latents = sample_teacher(teacher, cond, teacher.uncond, noise, config.sampler)
        pictures = teacher.decode_latents(latents)
        finite = bool(pictures.isfinite().all())
        seconds[size] = (time.perf_counter() - began) / config.sampler.steps
        error = round_trip_error(teacher, latents, pictures) if finite else float("nan")
        if not (finite and error < MAX_ROUND_TRIP_ERROR):
            what = "a picture is not finite" if not finite else f"decoded latents come back {error:.0%} wrong"
            page.problems.append(
                f"teacher: {teacher.components.location}: at {size} {what} - take another autoencoder with "
                "--teacher.vae, or other weights"
            )
        texts.append(
            f"{size}: {seconds[size] * config.sampler.steps:.2f} s for {config.sampler.steps} steps, contrast "
            f"{float(pictures.std()):.2f}, latents {float(latents.std()):.2f}; re-encoded {error:.0%} off"
        )
        columns.append(pictures.cpu())
    if config.out is not None:
        sheet = make_sheet([config.sentence], [str(size) for size in sizes], columns)
        save_sheet(sheet, config.out, {"doctor": config.model_dump(mode="json", exclude={"out", "run", "device"})})
        texts.append(f"written to {config.out}")
    page.add("pictures", *truncation_lines(teacher.components.tokenizer, [("sentence", config.sentence)]), *texts)
    return seconds


def round_trip_error(teacher: Teacher, latents: Tensor, pictures: Tensor) -> float:
    """Root mean square of the change of latents that are decoded and encoded, relative to theirs."""
    again = teacher.encode_pictures(pictures)
    return float((again - latents).norm() / latents.norm())


def describe_cache(
    page: Page, config: Config, teacher: Teacher, sizes: RenderSizes, seconds: dict[PictureSize, float]
) -> None:
    """Disk and time of a cache of `PROMPTS` prompts; more than the free disk is a problem."""
    states, listed = config.render.with_windows(None).states, sizes.listed
    shares = [float(share) for share in normalized_shares(sizes.sizes)] or [1.0]
    blank = partial(blank_record, teacher, states.states_per_prompt, windows=states.windows)
    bytes_of = {size: record_bytes(blank(size)) for size in listed}
    whole = sum(PROMPTS * share * bytes_of[size] for share, size in zip(shares, listed, strict=True))
    free, calls = free_bytes(config.run), states.steps + states.renoised_states
    hours = sum(PROMPTS * share * calls * seconds[size] for share, size in zip(shares, listed, strict=True)) / 3600
    page.add(
        "cache",
        f"{whole / GIB:.2f} GiB and about {hours:.2f} hours here for {PROMPTS:,} prompts of {states.states_per_prompt} "
        f"states, one at a time; {free / GIB:.1f} GiB are free at {config.run}",
        *(f"{size}: {bytes_of[size]:,} bytes a prompt" for size in listed if len(listed) > 1),
    )
    if whole > free:
        page.problems.append(
            f"{config.run}: {free / GIB:.2f} GiB free, a cache of {PROMPTS:,} prompts takes {whole / GIB:.2f} - "
            "free some space, or name another disk with --run"
        )


def describe_training(page: Page, parts: Components, device: torch.device) -> None:
    """Memory of a training's weights and optimizer; more than there is, with the smallest of them, is a problem."""
    count = sum(value.numel() for value in parts.unet.parameters())
    fixed = 2 * BYTES_OF_WEIGHTS + BYTES_OF_GRADIENT_AND_AVERAGE
    needs = {kind: count * (fixed + moments) for kind, moments in BYTES_OF_MOMENTS.items()}
    frozen = sum(value.nbytes for part in (parts.vae, parts.text_encoder) for value in part.parameters())
    held = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else available_bytes()
    page.add(
        "training",
        f"weights and optimizer: {', '.join(f'{need / GIB:.2f} GiB ({kind})' for kind, need in needs.items())}; "
        f"text encoder and autoencoder {frozen / GIB:.2f} GiB; activations on top; {held / GIB:.1f} GiB are there",
    )
    if min(needs.values()) + frozen > held:
        page.problems.append(
            f"training: at least {(min(needs.values()) + frozen) / GIB:.1f} GiB of memory, {device} has "
            f"{held / GIB:.1f} - train on a larger machine, or lower what else runs here"
        )


def describe_machine(page: Page, device: torch.device) -> None:
    """Device and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    page.add("machine", f"{device} ({name}), {torch.get_num_threads()} CPU threads")
    versions = [f"{library} {installed_version(library)}" for library in ("sollune", *LIBRARIES)]
    page.add("versions", f"python {platform.python_version()}, {', '.join(versions)}")
