"""The command `sollune sample`: sentences and seeds -> one PNG whose metadata hold the settings that made it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from configs.load import load, parse_common_options, resolved_yaml
from configs.values import Location, Size, Strict
from stages.prompts import FileSource, omission_lines, truncation_lines
from stages.sampling.fields import DEFAULT_GUIDANCE
from stages.sampling.grids import fixed_noise, make_sheet, save_sheet
from stages.sampling.models import LoadedModel, load_model
from stages.sampling.sampler import DEFAULT_STEPS, MAX_SAMPLER_STEPS, check_shift, check_steps, sample_latents
from stages.sampling.solvers import SOLVERS, SolverName, describe_solvers, supported_solvers
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Refused, first_invalid_character, format_value, invalid_character_reason
from stages.system.storage.attached import attach_all

USAGE = 'usage: sollune sample RUN|FOLDER|FILE "a sentence" ... [options], or --help'
LATENT_PIXELS_PER_BATCH = 4 * 64 * 64
"""Pixels of all latents that are computed together: four of SD1.5's, which fit beside the model on a small card."""


class Config(Strict):
    """Make a sheet of pictures: `sollune sample RUN|FOLDER|FILE "a sentence" ...`."""

    run: Location = Field(
        description="run folder, exported folder or -flow.safetensors file, or diffusers folder or hub id of a teacher"
    )
    texts: tuple[str, ...] = Field((), description="sentences, a row each; they may stand right behind the run instead")
    prompts: Path | None = Field(None, description="text file with more sentences, one a line")
    negative: str = Field("", description="sentence to keep away from")
    seeds: tuple[int, ...] = Field(
        (0, 1, 2, 3), min_length=1, description="a column each; a seed is the same noise for every sentence and model"
    )
    solver: SolverName = Field("euler", description=describe_solvers(SOLVERS))
    steps: int | None = Field(
        None,
        ge=1,
        le=MAX_SAMPLER_STEPS,
        description=f"steps from noise to data; none: {DEFAULT_STEPS}, or those that a student of few was trained for",
    )
    guidance: float | None = Field(
        None,
        ge=0,
        description=f"guidance scale w; 1 is the conditional branch alone; none: {DEFAULT_GUIDANCE:g}, or the nearest "
        "that a student of few steps learnt",
    )
    shift: float | None = Field(
        None, gt=0, description="shift S of the time grid, above 1 leans to noise; none takes the model's own"
    )
    size: Size | None = Field(
        None, description="size of the pictures, such as 512x768 (width x height); none: the model's own"
    )
    checkpoint: int | None = Field(
        None, ge=0, description="checkpoint of the run, in samples; none: the one it ended with, else its newest"
    )
    config_from: Location | None = Field(
        None,
        description="diffusers folder or hub id with configs and tokenizer of a file; none: diffusers/ beside it",
    )
    out: Path = Field(Path("sample.png"), description="PNG file to write; its metadata hold these settings")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")


def main(argv: Sequence[str]) -> int:
    """`sollune sample RUN|FOLDER|FILE "a sentence" ... [options]`."""
    if not argv:
        raise Refused(f"sample: which model? - {USAGE}")
    plain = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    common = parse_common_options([*(["--run", argv[0]] if plain else []), *argv[plain:]])
    config = load(Config, "sample", common.files, common.options)
    if not common.print_config:
        attach_all(config.model_dump())
    # Sentences are no words of an option: one may begin with a bracket, which an option would read as a list.
    config = config.model_copy(update={"texts": (*argv[1:plain], *config.texts)})
    _refuse_unusable(config.texts)
    print(resolved_yaml(config, "sample") if common.print_config else f"{run(config)}\n", end="")
    return 0


def run(config: Config) -> str:
    """Write the sheet, a row for each sentence and a column for each seed; returns a line that describes it."""
    texts = _read_sentences(config)
    if config.out.suffix.lower() != ".png":
        raise Refused(f"--out {config.out}: pictures are written as PNG - give it a name that ends in .png")
    if config.out.is_dir():
        raise Refused(f"--out {config.out}: is a folder - give the picture a name of its own")
    refuse_unwritable(config.out)
    model = load_model(config.run, config.device, config.checkpoint, config.config_from)
    resolved = _resolve_config(config, texts, model)
    steps, guidance = resolved.steps, resolved.guidance
    assert steps is not None
    assert guidance is not None
    for line in truncation_lines(model.tokenizer, [(format_value(text), text) for text in (*texts, config.negative)]):
        print(line)
    shape = model.latents.latent_shape(resolved.size)
    count, batch_size = len(config.seeds), max(1, LATENT_PIXELS_PER_BATCH // (shape[1] * shape[2]))
    noise = torch.stack([fixed_noise(0, seed, shape) for seed in config.seeds])
    cond, uncond = model.encode(texts), model.encode([config.negative])
    latents = sample_latents(
        model.field,
        cond.repeat_interleave(count, dim=0),
        uncond,
        noise.repeat(len(texts), 1, 1, 1).to(cond.device),
        SOLVERS[resolved.solver].make(model.field, steps, resolved.shift or 1.0),
        guidance,
        batch_size,
    )
    if not latents.isfinite().all():
        shift = "" if resolved.shift is None else f", --shift {resolved.shift:g}"
        raise Refused(f"--guidance {guidance:g}{shift}: the pictures are not finite - take smaller numbers")
    pictures = torch.cat([model.decode(rows).cpu() for rows in latents.split(batch_size)])
    columns = [pictures[i::count] for i in range(count)]
    metadata = {"sample": resolved.model_dump(mode="json", exclude={"out", "device"}), "model": dict(model.metadata)}
    save_sheet(make_sheet(texts, [f"seed {seed}" for seed in config.seeds], columns), config.out, metadata)
    return f"{config.out}: {len(texts)} x {count} pictures of {_describe(resolved)}"


def _refuse_unusable(texts: Sequence[str]) -> None:
    """Raise `Refused` for a sentence that is empty or no plain text."""
    for text in texts:
        if not text.strip():
            raise Refused(f"sample: {text!r}: an empty sentence - write what to show")
        if fault := invalid_character_reason(text):
            raise Refused(f"sample: {format_value(text)}: text {fault} ({first_invalid_character(text)}) - remove them")


def _read_sentences(config: Config) -> list[str]:
    """The sentences of the command line and of the file, whose unusable lines are counted in print."""
    source = None if config.prompts is None else FileSource(path=config.prompts)
    file = [] if source is None else [row.text.strip() for row in source.usable_rows()]
    if not (config.texts or file):
        raise Refused('sample: no sentence - write one behind the model, as in sollune sample RUN "a sentence"')
    for line in omission_lines(source.unusable_rows(len(file))) if source else ():
        print(line)
    return [*config.texts, *file]


def _resolve_config(config: Config, texts: Sequence[str], model: LoadedModel) -> Config:
    """The settings with nothing left to the model or to another file; raises `Refused` for what the model excludes."""
    solver = SOLVERS[config.solver]
    if obstacle := solver.obstacle(model.field):
        others = " or ".join(supported_solvers(model.field))
        raise Refused(f"--solver {config.solver}: {config.run}: {obstacle} - use {others}")
    if not solver.uses_shift and config.shift is not None:
        raise Refused(
            f"--shift {config.shift:g}: {config.solver} walks the teacher's own steps - leave it out, or use euler"
        )
    steps = check_steps(model.field, config.steps, "--steps")
    if config.shift is not None:
        check_shift(model.field, config.shift, "--shift")
    guidance = model.field.default_guidance if config.guidance is None else config.guidance
    model.field.check_guidance(guidance, "--guidance")
    if config.negative and model.field.guided is not None:
        raise Refused(
            f"--negative {format_value(config.negative)}: {config.run} has the guidance in its one branch, where "
            "negative sentences do nothing - leave it out"
        )
    size = model.latents.check_size(config.size or model.latents.native_size, "--size")
    shift = model.shift if config.shift is None and solver.uses_shift else config.shift
    resolved = {"texts": tuple(texts), "prompts": None, "shift": shift, "size": size}
    resolved |= {"steps": steps, "guidance": guidance}
    return config.model_copy(update={**resolved, "checkpoint": model.metadata.get("checkpoint")})


def _describe(config: Config) -> str:
    model = config.run if config.checkpoint is None else f"{config.run} at {config.checkpoint} samples"
    shift = "" if config.shift is None else f", shift {config.shift:g}"
    steps = "1 step" if config.steps == 1 else f"{config.steps} steps"
    return f"{model} ({config.size}, {config.solver}, {steps}, guidance {config.guidance:g}{shift})"
