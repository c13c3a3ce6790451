"""The command `sollune sample`: sentences and seeds -> one PNG that can be made again from what it holds."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field as Knob

from configs.load import load, name_first_argument, parse_common_options, resolved_yaml
from configs.values import Location, Strict
from stages.prompts import FileSource, omission_lines, truncation_lines
from stages.sampling.grids import fixed_noise, make_sheet, save_sheet
from stages.sampling.models import LoadedModel, load_model
from stages.sampling.sampler import MAX_SAMPLER_STEPS, OdeSolver, Sampler, sample_latents
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Refused, first_invalid_character, format_value, invalid_character_reason

USAGE = 'usage: sollune sample RUN|FOLDER|FILE "a sentence" ... [options], or --help'
LATENT_PIXELS_PER_BATCH = 4 * 64 * 64
"""Places of all latents that are computed together: four of SD1.5's, which fit beside the model on a small card."""
UNSUPPORTED_REASONS = {
    "heun": "a teacher answers at its own steps only",
    "unipc": "a teacher answers at its own steps only",
    "ddim": "a model that answers with velocity has no discrete steps",
}


class Config(Strict):
    """Make a sheet of pictures: `sollune sample RUN|FOLDER|FILE "a sentence" ...`."""

    run: Location = Knob(
        description="run folder, exported folder or -flow.safetensors file, or diffusers folder or hub id of a teacher"
    )
    texts: tuple[str, ...] = Knob((), description="sentences, a row each; they may stand right behind the run instead")
    prompts: Path | None = Knob(None, description="text file with more sentences, one a line")
    negative: str = Knob("", description="sentence to keep away from")
    seeds: tuple[int, ...] = Knob(
        (0, 1, 2, 3), min_length=1, description="a column each; a seed is the same noise for every sentence and model"
    )
    solver: Literal["euler", "heun", "unipc", "ddim"] = Knob(
        "euler",
        description="euler; heun, of order 2 with two calls a step (students); unipc, as stock diffusers samples an "
        "export (students); ddim, as stock diffusers samples teachers and students of v-prediction (these)",
    )
    steps: int = Knob(25, ge=1, le=MAX_SAMPLER_STEPS, description="steps from noise to data")
    guidance: float = Knob(5.0, ge=0, description="guidance scale w; 1 is the conditional branch alone")
    shift: float | None = Knob(
        None, gt=0, description="shift S of the time grid, above 1 leans to noise; none takes the model's own"
    )
    checkpoint: int | None = Knob(
        None,
        ge=0,
        description="checkpoint of the run, in samples seen; none: the one it ended with, else its newest",
    )
    config_from: Location | None = Knob(
        None,
        description="diffusers folder or hub id with the configs and tokenizer of a single file; "
        "none takes diffusers/ beside it",
    )
    out: Path = Knob(Path("sample.png"), description="PNG file to write; its metadata hold these settings")
    device: str = Knob("auto", description="torch device; auto takes a GPU where there is one")


def run(config: Config) -> str:
    """Write the sheet, a row for each sentence and a column for each seed; returns what was done in one line."""
    asked = _read_sentences(config)
    if config.out.suffix.lower() != ".png":
        raise Refused(f"--out {config.out}: pictures are written as PNG - give it a name that ends in .png")
    if config.out.is_dir():
        raise Refused(f"--out {config.out}: is a folder - give the picture a name of its own")
    refuse_unwritable(config.out)
    painter = load_model(config.run, config.device, config.checkpoint, config.config_from)
    settled = _resolve_config(config, asked, painter)
    for line in truncation_lines(painter.tokenizer, [(format_value(text), text) for text in (*asked, config.negative)]):
        print(line)
    count, size = (
        len(config.seeds),
        max(1, LATENT_PIXELS_PER_BATCH // (painter.latent_shape[1] * painter.latent_shape[2])),
    )
    noise = torch.stack([fixed_noise(0, seed, painter.latent_shape) for seed in config.seeds])
    cond, uncond = painter.encode(asked), painter.encode([config.negative])
    latents = sample_latents(
        painter.field,
        cond.repeat_interleave(count, dim=0),
        uncond,
        noise.repeat(len(asked), 1, 1, 1).to(cond.device),
        _make_solver(settled, painter),
        config.guidance,
        size,
    )
    if not latents.isfinite().all():
        shift = "" if settled.shift is None else f", --shift {settled.shift:g}"
        raise Refused(f"--guidance {config.guidance:g}{shift}: the pictures are not finite - take smaller numbers")
    pictures = torch.cat([painter.decode(rows).cpu() for rows in latents.split(size)])
    columns = [pictures[i::count] for i in range(count)]
    told = {"sample": settled.model_dump(mode="json", exclude={"out", "device"}), "model": dict(painter.metadata)}
    save_sheet(make_sheet(asked, [f"seed {seed}" for seed in config.seeds], columns), config.out, told)
    return f"{config.out}: {len(asked)} x {count} pictures of {_describe(settled)}"


def _refuse_unusable(texts: Sequence[str]) -> None:
    """Raise `Refused` for a sentence that is empty or no plain text."""
    for text in texts:
        if not text.strip():
            raise Refused(f"sample: {text!r}: an empty sentence - write what to show")
        if fault := invalid_character_reason(text):
            raise Refused(f"sample: {format_value(text)}: text {fault} ({first_invalid_character(text)}) - remove them")


def _read_sentences(config: Config) -> list[str]:
    """The sentences of the words and of the file, whose unusable lines are counted."""
    source = None if config.prompts is None else FileSource(path=config.prompts)
    file = [] if source is None else [row.text.strip() for row in source.usable_rows()]
    if not (config.texts or file):
        raise Refused('sample: no sentence - write one behind the model, as in sollune sample RUN "a sentence"')
    for line in omission_lines(source.unusable_rows(len(file))) if source else ():
        print(line)
    return [*config.texts, *file]


def _resolve_config(config: Config, texts: Sequence[str], model: LoadedModel) -> Config:
    """The settings with nothing left to the model or to another file; raises `Refused` for what it cannot follow."""
    if config.solver not in model.field.supported_solvers:
        others = " or ".join(model.field.supported_solvers)
        raise Refused(f"--solver {config.solver}: {config.run}: {UNSUPPORTED_REASONS[config.solver]} - use {others}")
    if config.solver == "ddim" and config.shift is not None:
        raise Refused(f"--shift {config.shift:g}: ddim walks the teacher's own steps - leave it out, or use euler")
    shift = model.shift if config.shift is None and config.solver != "ddim" else config.shift
    found = {"texts": tuple(texts), "prompts": None, "shift": shift}
    return config.model_copy(update={**found, "checkpoint": model.metadata.get("checkpoint")})


def _make_solver(config: Config, model: LoadedModel) -> OdeSolver:
    if config.solver == "ddim" and model.field.ddim_solver:
        return partial(model.field.ddim_solver.solve, steps=config.steps)
    said = config.model_dump(include={"solver", "steps", "shift"})
    return Sampler.model_validate(said).solver_for(model.field)


def _describe(config: Config) -> str:
    where = config.run if config.checkpoint is None else f"{config.run} at {config.checkpoint} samples"
    shift = "" if config.shift is None else f", shift {config.shift:g}"
    return f"{where} ({config.solver}, {config.steps} steps, guidance {config.guidance:g}{shift})"


def main(argv: Sequence[str]) -> int:
    """`sollune sample RUN|FOLDER|FILE "a sentence" ... [options]`."""
    plain = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    argv_with_run = name_first_argument([*argv[:1], *argv[max(1, plain) :]], "run", f"sample: which model? - {USAGE}")
    asked = parse_common_options(argv_with_run)
    config = load(Config, "sample", asked.files, asked.options)
    # Sentences are no words of an option: one may begin with a bracket, which an option would read as a list.
    config = config.model_copy(update={"texts": (*argv[1:plain], *config.texts)})
    _refuse_unusable(config.texts)
    print(resolved_yaml(config, "sample") if asked.print_config else f"{run(config)}\n", end="")
    return 0
