"""Prompts -> records: the teacher paints each picture by its own guided sampling; what it said on the way is kept."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, JsonValue, model_validator
from torch import Tensor

from configs.values import Strict
from shards.manifest import MANIFEST_FILE, Manifest, Recipe
from shards.record import BlockFeatures, Record, States
from stages.flow.bridge import TailPolicy
from stages.flow.path import interpolate, per_sample
from stages.flow.solver import apply_guidance
from stages.flow.timesteps import TimestepDensity
from stages.nets.features import HOOK_POINT, feature_widths
from stages.nets.files import absolute_folder, digests_as_recorded
from stages.nets.teacher import Prediction, Teacher
from stages.prompts import Prompt, derived_seed


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
    batch_size: int = Field(50, ge=1, description="prompts that the teacher is asked at once; part of the recipe")


VERSIONS = ("torch", "diffusers", "transformers", "webdataset")


def recipe_in(cache: Path) -> Recipe | None:
    """The recipe of the records that lie in a cache folder already."""
    return Manifest.open(cache).recipe if (cache / MANIFEST_FILE).exists() else None


def recipe_of(
    teacher: Teacher,
    config: RenderConfig,
    source: Mapping[str, JsonValue],
    device: torch.device | None = None,
    existing: Recipe | None = None,
) -> Recipe:
    """What the records depend on, and what is merely good to know; `device` computes if it is not the teacher's own.

    `before` is the recipe of the cache that is gone on with, which may call the same teacher's files by older digests.
    """
    parts, (channels, height, width) = teacher.components, teacher.components.latent_shape
    return Recipe(
        identity={
            "teacher": dict(digests_as_recorded(existing.identity.get("teacher") if existing else None, parts.folder)),
            "prompts": dict(source),
            "render": config.model_dump(mode="json"),
            "dtype": teacher.precision,
            "hook_point": HOOK_POINT,
            "blocks": dict(feature_widths(parts.unet)),
            "latent_shape": [channels, height, width],
        },
        information={
            "teacher_location": parts.location,
            "teacher_path": absolute_folder(parts.location),
            "device": device_name(device or parts.unet.device),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        },
    )


def device_name(device: torch.device) -> str:
    """The kind of processor that computes, because another one rounds otherwise."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True)
class PromptRandomness:
    """Every random choice of one prompt, drawn on the CPU from its own seed, so that no batch or device changes it."""

    guidance_scale: float
    times: Float[Tensor, " n"]
    noise: Float[Tensor, "c h w"]
    kept_steps: Int[Tensor, " m"]
    renoised_times: Float[Tensor, " r"]
    renoised_noise: Float[Tensor, "r c h w"]


def draw_randomness(prompt: Prompt, config: StatesConfig, latent_shape: tuple[int, int, int]) -> PromptRandomness:
    """The choices for one prompt: s = 1 first, then an even grid whose phase is random, so that all times are met."""
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


@dataclass(frozen=True)
class TeacherState:
    """One state of each of b prompts, and what the teacher answered there."""

    k: Int[Tensor, " b"]
    s: Float[Tensor, " b"]
    x_t: Float[Tensor, "b c h w"]
    prediction: Prediction


class ConditionedTeacher:
    """The teacher, asked about one batch of prompts."""

    def __init__(self, teacher: Teacher, cond: Float[Tensor, "b l d"], uncond: Float[Tensor, "1 l d"]) -> None:
        self.teacher, self.cond, self.uncond = teacher, cond, uncond

    def evaluate(self, x: Float[Tensor, "b c h w"], s: Float[Tensor, " b"]) -> TeacherState:
        """The answer at a state whose time the teacher knows; x is rounded to what is stored **before** it is asked."""
        k, known = self.teacher.bridge.nearest_state(s)
        s_stored, x_stored = known.float(), x.half().float()
        return TeacherState(k, s_stored, x_stored, self.teacher.predict(x_stored, s_stored, k, self.cond, self.uncond))

    def sample_guided(
        self, noise: Float[Tensor, "b c h w"], times: Float[Tensor, "n b"], scale: Float[Tensor, " b"]
    ) -> tuple[list[TeacherState], Float[Tensor, "b c h w"]]:
        """The teacher's own guided sampling: every state on its way, and the picture.

        Euler's method on the bridged velocity, between the teacher's own states, is DDIM.
        """
        x, seen = noise, []
        grid = torch.cat([times, torch.zeros_like(times[:1])])
        for s, s_next in pairwise(grid):
            state = self.evaluate(x, s)
            v = apply_guidance(state.prediction.v_cond, state.prediction.v_uncond, scale)
            x = state.x_t + per_sample(s_next - state.s, v) * v
            seen.append(state)
        return seen, x


@torch.inference_mode()
def make_records(
    teacher: Teacher, prompts: Sequence[Prompt], keys: Sequence[str], config: StatesConfig
) -> list[Record]:
    """One record for each prompt, all made in one batch."""
    device, shape = teacher.components.unet.device, teacher.components.latent_shape
    chosen = [draw_randomness(prompt, config, shape) for prompt in prompts]
    cond = teacher.encode_texts([prompt.text for prompt in prompts]).half()
    asked = ConditionedTeacher(teacher, cond, teacher.uncond.half())

    times = torch.stack([choice.times for choice in chosen], dim=1).to(device)
    _, known_times = teacher.bridge.nearest_state(times.flatten())
    scale = torch.tensor([choice.guidance_scale for choice in chosen], device=device)
    noise = torch.stack([choice.noise for choice in chosen]).to(device)
    walked, x0 = asked.sample_guided(noise, known_times.view_as(times), scale)
    x0 = x0.half()
    renoised = [asked.evaluate(*renoise(teacher, x0.float(), chosen, i)) for i in range(config.renoised_states)]

    records = []
    for row, (key, prompt, choice) in enumerate(zip(keys, prompts, chosen, strict=True)):
        seen = [walked[i] for i in choice.kept_steps.tolist()] + renoised
        trajectory = torch.arange(len(seen)) < len(choice.kept_steps)
        draws, features = stack_states(seen, trajectory, row)
        head = (key, prompt.text, prompt.class_name, prompt.seed, choice.guidance_scale)
        records.append(Record(*head, cond[row].cpu(), x0[row].cpu(), draws, features))
    return records


@torch.inference_mode()
def records_from_pictures(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    keys: Sequence[str],
    x0: Float[Tensor, "b c h w"],
    config: StatesConfig,
) -> list[Record]:
    """One record for each picture that the teacher did not paint: all of its states are the picture under fresh noise.

    Their guidance scale is 1, because nothing guided them.
    """
    all_renoised = config.model_copy(update={"renoised_states": config.states_per_prompt})
    chosen = [draw_randomness(prompt, all_renoised, teacher.components.latent_shape) for prompt in prompts]
    cond = teacher.encode_texts([prompt.text for prompt in prompts]).half()
    asked, x0 = ConditionedTeacher(teacher, cond, teacher.uncond.half()), x0.half()
    seen = [asked.evaluate(*renoise(teacher, x0.float(), chosen, i)) for i in range(config.states_per_prompt)]

    records = []
    for row, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        draws, features = stack_states(seen, torch.zeros(len(seen), dtype=torch.bool), row)
        head = (key, prompt.text, prompt.class_name, prompt.seed, 1.0)
        records.append(Record(*head, cond[row].cpu(), x0[row].cpu(), draws, features))
    return records


def renoise(
    teacher: Teacher, x0: Float[Tensor, "b c h w"], chosen: Sequence[PromptRandomness], i: int
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
    """The finished pictures under their i-th fresh noise, at the nearest times that the teacher knows."""
    times = torch.stack([choice.renoised_times[i] for choice in chosen]).to(x0.device)
    eps = torch.stack([choice.renoised_noise[i] for choice in chosen]).to(x0.device)
    _, s = teacher.bridge.nearest_state(times)
    return interpolate(x0, eps, s), s


def stack_states(
    states: Sequence[TeacherState], trajectory: Bool[Tensor, " K"], row: int
) -> tuple[States, BlockFeatures]:
    """One prompt's states as they are stored: fp16, on the CPU."""

    def stack(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value[row] for value in values]).cpu()

    draws = States(
        k=stack([state.k for state in states]),
        s=stack([state.s for state in states]),
        x_t=stack([state.x_t for state in states]).half(),
        v_cond=stack([state.prediction.v_cond for state in states]).half(),
        v_uncond=stack([state.prediction.v_uncond for state in states]).half(),
        trajectory=trajectory,
    )
    blocks = states[0].prediction.features
    return draws, BlockFeatures({b: stack([state.prediction.features[b] for state in states]).half() for b in blocks})
