"""Prompts -> records: states of the teacher's own guided sampling, and of renoised pictures, with its predictions."""

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field, JsonValue, field_validator, model_validator
from torch import Tensor

from configs.values import PictureSize, Strict
from shards.manifest import MANIFEST_FILE, Manifest, Recipe
from shards.record import BlockFeatures, Record, States
from stages.cache.sizes import RenderSizes, SizeShare, refuse_repeated_sizes
from stages.flow.bridge import TailPolicy
from stages.flow.path import interpolate, per_sample
from stages.flow.solver import apply_guidance
from stages.flow.timesteps import TimestepDensity
from stages.nets.features import HOOK_POINT, feature_widths
from stages.nets.student import Prediction
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, derived_seed
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

    @property
    def states_per_prompt(self) -> int:
        """States kept of each prompt."""
        return self.trajectory_states + self.renoised_states

    @model_validator(mode="after")
    def _ordered(self) -> "StatesConfig":
        if self.guidance_max < self.guidance_min:
            raise ValueError(f"guidance_max {self.guidance_max} is below guidance_min {self.guidance_min}")
        if self.trajectory_states > self.steps:
            raise ValueError(f"trajectory_states {self.trajectory_states} is more than steps {self.steps}")
        return self


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

    def identity(self, sizes: RenderSizes) -> dict[str, JsonValue]:
        """These settings as a recipe holds them; without sizes where there is none but the teacher's own."""
        settings = self.model_dump(mode="json", exclude={"sizes"})
        return {**settings, "sizes": sizes.identity()} if sizes.sizes else settings


def recipe_in(cache: Path) -> Recipe | None:
    """The recipe of the records that lie in a cache folder already."""
    return Manifest.open(cache).recipe if (cache / MANIFEST_FILE).exists() else None


def sizes_in(recipe: Recipe) -> tuple[SizeShare, ...]:
    """The sizes of the records of a recipe with their shares; none where all are of the teacher's own size."""
    render: Any = recipe.identity.get("render")
    listed = render.get("sizes", ()) if isinstance(render, dict) else ()
    return tuple(SizeShare.model_validate(one) for one in listed)


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
            "teacher_location": parts.location,
            "teacher_path": absolute_place(parts.location),
            "teacher_source": files.source.absolute().model_dump(mode="json"),
            "teacher_files": [{"path": str(file.path), "sha256": file.sha256} for file in files.sources],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        },
    )


@dataclass(frozen=True)
class PromptRandomness:
    """Every random choice of one prompt, sampled on the CPU from its own seed: no batch or device changes it."""

    guidance_scale: float
    times: Float[Tensor, " n"]
    noise: Float[Tensor, "c h w"]
    kept_steps: Int[Tensor, " m"]
    renoised_times: Float[Tensor, " r"]
    renoised_noise: Float[Tensor, "r c h w"]


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

    records = []
    for row, (key, prompt, choice) in enumerate(zip(keys, prompts, chosen, strict=True)):
        kept = [trajectory[i] for i in choice.kept_steps.tolist()]
        states, features = stack_states(kept, renoised, row)
        head = (key, prompt.text, prompt.class_name, prompt.seed, choice.guidance_scale)
        records.append(Record(*head, batch.cond[row].cpu(), x0[row].cpu(), states, features, size))
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


@dataclass(frozen=True)
class TeacherState:
    """One state of each of b prompts, and the teacher's prediction there."""

    k: Int[Tensor, " b"]
    s: Float[Tensor, " b"]
    x_s: Float[Tensor, "b c h w"]
    prediction: Prediction


class ConditionedTeacher:
    """The teacher under the conditioning of one batch of prompts."""

    def __init__(self, teacher: Teacher, prompts: Sequence[Prompt]) -> None:
        self.teacher = teacher
        self.cond = teacher.encode_texts([prompt.text for prompt in prompts]).half()
        self.uncond = teacher.uncond.half()

    def evaluate(self, x: Float[Tensor, "b c h w"], s: Float[Tensor, " b"]) -> TeacherState:
        """The prediction at the teacher's nearest time; x is rounded to its stored precision **before** that."""
        k, known = self.teacher.bridge.nearest_state(s)
        s_stored, x_stored = known.float(), x.half().float()
        return TeacherState(k, s_stored, x_stored, self.teacher.predict(x_stored, s_stored, k, self.cond, self.uncond))

    def sample_guided(
        self, noise: Float[Tensor, "b c h w"], times: Float[Tensor, "n b"], scale: Float[Tensor, " b"]
    ) -> tuple[list[TeacherState], Float[Tensor, "b c h w"]]:
        """The teacher's own guided sampling: every state on the way, and x0.

        Euler's method on the bridged velocity, between the teacher's own states, is DDIM.
        """
        x, trajectory = noise, []
        grid = torch.cat([times, torch.zeros_like(times[:1])])
        for s, s_next in pairwise(grid):
            state = self.evaluate(x, s)
            v = apply_guidance(state.prediction.v_cond, state.prediction.v_uncond, scale)
            x = state.x_s + per_sample(s_next - state.s, v) * v
            trajectory.append(state)
        return trajectory, x

    def renoise(self, x0: Float[Tensor, "b c h w"], chosen: Sequence[PromptRandomness]) -> list[TeacherState]:
        """The finished pictures under each of their fresh noises, at the teacher's nearest times."""
        times = torch.stack([choice.renoised_times for choice in chosen], dim=1).to(x0.device)
        noises = torch.stack([choice.renoised_noise for choice in chosen], dim=1).to(x0.device)
        states = []
        for s, eps in zip(times, noises, strict=True):
            _, known = self.teacher.bridge.nearest_state(s)
            states.append(self.evaluate(interpolate(x0, eps, known), known))
        return states


def stack_states(
    trajectory: Sequence[TeacherState], renoised: Sequence[TeacherState], row: int
) -> tuple[States, BlockFeatures]:
    """One prompt's states as they are stored: fp16, on the CPU."""
    states = [*trajectory, *renoised]

    def stack(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value[row] for value in values]).cpu()

    stacked = States(
        k=stack(state.k for state in states),
        s=stack(state.s for state in states),
        x_s=stack(state.x_s for state in states).half(),
        v_cond=stack(state.prediction.v_cond for state in states).half(),
        v_uncond=stack(state.prediction.v_uncond for state in states).half(),
        trajectory=torch.arange(len(states)) < len(trajectory),
    )
    blocks = states[0].prediction.features
    return stacked, BlockFeatures({b: stack(state.prediction.features[b] for state in states).half() for b in blocks})
