"""Prompts -> records: states of the teacher's own guided sampling, and of renoised pictures, with its predictions."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, JsonValue, field_validator, model_validator
from torch import Tensor

from configs.values import PictureSize, Strict
from shards.manifest import MANIFEST_FILE, Manifest, Recipe, differences
from shards.record import LANDINGS_SCHEMA, SCHEMA, Record
from stages.cache.landings import stack_landings
from stages.cache.sizes import RenderSizes, SizeShare, refuse_repeated_sizes
from stages.cache.teacher_states import ConditionedTeacher, PromptRandomness, stack_states
from stages.flow.bridge import TailPolicy
from stages.flow.timesteps import TimestepDensity
from stages.nets.features import HOOK_POINT, feature_widths
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, derived_seed
from stages.system.refusal import Refused
from stages.system.storage.locations import show_locations
from stages.teacher_files.open import open_teacher_files
from stages.teacher_files.recorded import absolute_place, identity_as_recorded
from stages.teacher_files.source import TeacherSource

VERSIONS = ("torch", "diffusers", "transformers", "webdataset")


class StatesConfig(Strict):
    """Which states of a picture are kept (mathematics.md section 2)."""

    steps: int = Field(25, ge=2, description="steps of the teacher's guided sampling, a number of calls")
    guidance_min: float = Field(3.0, ge=0, description="lowest guidance scale w, drawn uniformly per prompt")
    guidance_max: float = Field(8.0, ge=0, description="highest guidance scale w")
    trajectory_states: int = Field(4, ge=1, description="states kept of each sampling, stratified over its times")
    renoised_states: int = Field(2, ge=0, description="states made by adding fresh noise to the finished picture")
    density: TimestepDensity = Field(TimestepDensity(), description="times of the renoised states")
    windows: Literal[0, 1, 2, 4, 8] | None = Field(
        None,
        description="windows of few-step sampling at whose ends the trajectory is stored too (its landings), for as "
        "many steps and coarser ones; 0 stores none; none: those that the cache has already, and 4 for a new one of "
        "cache-teacher",
    )

    @property
    def states_per_prompt(self) -> int:
        """States kept of each prompt."""
        return self.trajectory_states + self.renoised_states

    @field_validator("windows", mode="before")
    @classmethod
    def _refuse_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which equals 0 or 1
            raise ValueError("should be 0, 1, 2, 4 or 8")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> "StatesConfig":
        if self.guidance_max < self.guidance_min:
            raise ValueError(f"guidance_max {self.guidance_max} is below guidance_min {self.guidance_min}")
        if self.trajectory_states > self.steps:
            raise ValueError(f"trajectory_states {self.trajectory_states} is more than steps {self.steps}")
        return self


WINDOWS = 4
"""Those of a new cache of `cache-teacher`, from which students of few steps may be made."""


def refuse_windows(states: StatesConfig) -> None:
    """Raise `ValueError` where landings are to be stored of pictures that may come from elsewhere than the teacher."""
    if states.windows:
        raise ValueError(
            f"render.states.windows = {states.windows}, but records of classes hold no landings: a photograph lies on "
            "no trajectory of the teacher - leave it 0; those of RUN/cache serve few steps"
        )


class RenderConfig(Strict):
    """How prompts become records."""

    tail: TailPolicy = Field("hold", description="velocity beyond the teacher's last step: hold or faithful")
    states: StatesConfig = Field(StatesConfig(), description="which states of a picture are kept")
    records_per_shard: int = Field(250, ge=1, description="prompts in one shard: the unit of work and of resuming")
    batch_size: int = Field(
        50,
        ge=1,
        description="prompts of the teacher's own size in one batch of it, of other sizes as many as have no more "
        "pixels, at least one; part of the recipe",
    )
    sizes: tuple[SizeShare, ...] = Field(
        (),
        description="picture sizes and their shares of the prompts, '[{size: 512x768, share: .3}, ...]'; a prompt's "
        "size follows from its seed; none: the teacher's own square alone",
    )

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, sizes: tuple[SizeShare, ...]) -> tuple[SizeShare, ...]:
        return tuple(refuse_repeated_sizes(sizes))

    def with_windows(self, existing: Recipe | None) -> "RenderConfig":
        """The same with a number of windows: that of the cache that is there, if nobody chose one."""
        if self.states.windows is not None:
            return self
        windows = windows_in(existing) if existing else WINDOWS
        return self.model_copy(update={"states": self.states.model_copy(update={"windows": windows})})

    def identity(self, sizes: RenderSizes) -> dict[str, JsonValue]:
        """These settings as a recipe holds them.

        Without sizes where there is none but the teacher's own, and without windows where there are none, so that the
        recipes of earlier versions are the same.
        """
        without: dict[str, Any] = {"sizes": True} if self.states.windows else {"sizes": True, "states": {"windows"}}
        settings = self.model_dump(mode="json", exclude=without)
        return {**settings, "sizes": sizes.identity()} if sizes.sizes else settings


def recipe_in(cache: Path) -> Recipe | None:
    """The recipe of the records that lie in a cache folder already."""
    return Manifest.open(cache).recipe if (cache / MANIFEST_FILE).exists() else None


def sizes_in(recipe: Recipe) -> tuple[SizeShare, ...]:
    """The sizes of the records of a recipe with their shares; none where all are of the teacher's own size."""
    render: Any = recipe.identity.get("render")
    listed = render.get("sizes", ()) if isinstance(render, dict) else ()
    return tuple(SizeShare.model_validate(one) for one in listed)


def windows_in(recipe: Recipe) -> int:
    """The windows at whose ends the records of a recipe have landings; 0 where they have none."""
    render: Any = recipe.identity.get("render")
    states: Any = render.get("states") if isinstance(render, dict) else None
    windows = states.get("windows", 0) if isinstance(states, dict) else 0
    return windows if type(windows) is int else 0


def refuse_other_windows(cache: Path, existing: Recipe, recipe: Recipe) -> None:
    """Raise `Refused` where a cache differs from `recipe` in the number of windows alone."""
    if [change.split()[0] for change in differences(existing, recipe)] == ["render.states.windows"]:
        then, now = windows_in(existing), windows_in(recipe)
        raise Refused(
            f"{cache}: render.states.windows is {now}, its records were made with {then} - go on with it by "
            f"--render.states.windows {then} (make: in ARGS), or choose another run folder (RUN=)"
        )


def training_shares(manifest: Manifest) -> tuple[SizeShare, ...]:
    """The sizes of `sizes_in` that pictures of the training split have: a small share may have drawn none."""
    present = manifest.sizes_of("train")
    return tuple(one for one in sizes_in(manifest.recipe) if one.size in present)


def recipe_of(
    teacher: Teacher,
    config: RenderConfig,
    source: Mapping[str, JsonValue],
    device: torch.device | None = None,
    existing: Recipe | None = None,
) -> Recipe:
    """All that the records depend on, and information beside it; `device` computes if not the teacher's own device.

    `existing` is the recipe of the cache to continue, which may hold older digests of the same teacher's files.
    """
    parts = teacher.components
    files = parts.files or open_teacher_files(TeacherSource(location=parts.location))
    device = device or parts.unet.device  # its name is recorded because another processor rounds otherwise
    return Recipe(
        schema_version=LANDINGS_SCHEMA if config.states.windows else SCHEMA,
        identity={
            "teacher": dict(identity_as_recorded(existing.identity.get("teacher") if existing else None, files)),
            "prompts": dict(source),
            "render": config.identity(RenderSizes.checked(config.sizes, parts.latents)),
            "dtype": teacher.precision,
            "hook_point": HOOK_POINT,
            "blocks": dict(feature_widths(parts.unet)),
            "latent_shape": list(parts.latent_shape()),
        },
        information={
            "teacher_location": show_locations(parts.location),
            "teacher_path": absolute_place(parts.location),
            "teacher_source": show_locations(files.source.absolute().model_dump(mode="json")),
            "teacher_files": [
                {"path": show_locations(str(file.path)), "sha256": file.sha256} for file in files.sources
            ],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        },
    )


def draw_randomness(prompt: Prompt, config: StatesConfig, latent_shape: tuple[int, int, int]) -> PromptRandomness:
    """The choices for one prompt; times are s = 1, then an even grid of random phase, so that all times occur."""
    generator = torch.Generator().manual_seed(derived_seed("states", prompt.seed))
    scale, phase = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    inner = (torch.arange(config.steps - 2, -1, -1, dtype=torch.float64) + phase) / (config.steps - 1)
    strata = torch.linspace(0, config.steps, config.trajectory_states + 1)
    within = torch.rand(config.trajectory_states, generator=generator)
    kept = (strata[:-1] + within * strata.diff()).floor().long().clamp_max(config.steps - 1)
    return PromptRandomness(
        guidance_scale=config.guidance_min + scale * (config.guidance_max - config.guidance_min),
        times=torch.cat([torch.ones(1, dtype=torch.float64), inner]),
        noise=torch.randn(latent_shape, generator=generator),
        kept_steps=kept,
        renoised_times=config.density.sample(config.renoised_states, generator, stratified=True),
        renoised_noise=torch.randn(config.renoised_states, *latent_shape, generator=generator),
    )


@torch.inference_mode()
def make_records(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    keys: Sequence[str],
    config: StatesConfig,
    size: PictureSize | None = None,
) -> list[Record]:
    """One record for each prompt, all made in one batch at one size, by default the teacher's own."""
    size = size or teacher.components.native_size
    batch = ConditionedTeacher(teacher, prompts)
    device = batch.cond.device
    chosen = [draw_randomness(prompt, config, teacher.components.latent_shape(size)) for prompt in prompts]
    times = torch.stack([choice.times for choice in chosen], dim=1).to(device)
    _, known_times = teacher.bridge.nearest_state(times.flatten())
    scale = torch.tensor([choice.guidance_scale for choice in chosen], device=device)
    noise = torch.stack([choice.noise for choice in chosen]).to(device)
    trajectory, x0 = batch.sample_guided(noise, known_times.view_as(times), scale)
    x0 = x0.half()
    renoised = batch.renoise(x0.float(), chosen)
    landings = stack_landings(trajectory, scale, config.windows)

    records = []
    for row, (key, prompt, choice) in enumerate(zip(keys, prompts, chosen, strict=True)):
        kept = [trajectory[i] for i in choice.kept_steps.tolist()]
        states, features = stack_states(kept, renoised, row)
        head = (key, prompt.text, prompt.class_name, prompt.seed, choice.guidance_scale)
        own = landings[row] if landings else None
        records.append(Record(*head, batch.cond[row].cpu(), x0[row].cpu(), states, features, size, own))
    return records


@torch.inference_mode()
def records_from_pictures(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    keys: Sequence[str],
    x0: Float[Tensor, "b c h w"],
    config: StatesConfig,
) -> list[Record]:
    """One record for each picture that the teacher did not generate: all of its states are renoised.

    Their guidance scale is 1, because they were sampled without guidance.
    """
    all_renoised = config.model_copy(update={"renoised_states": config.states_per_prompt})
    _, channels, height, width = x0.shape
    size = teacher.components.latents.size_of_latents(height, width)
    chosen = [draw_randomness(prompt, all_renoised, (channels, height, width)) for prompt in prompts]
    batch, x0 = ConditionedTeacher(teacher, prompts), x0.half()
    renoised = batch.renoise(x0.float(), chosen)

    records = []
    for row, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        head = (key, prompt.text, prompt.class_name, prompt.seed, 1.0)
        records.append(Record(*head, batch.cond[row].cpu(), x0[row].cpu(), *stack_states([], renoised, row), size))
    return records
