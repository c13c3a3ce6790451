"""LoRAs made for the teacher, measured on the student: student + LoRA against teacher + LoRA from the same noise.

The difference that a LoRA makes to the teacher's weights is added to the student's, layer by layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from configs.values import PictureSize
from stages.evaluate.lora_effect import LoraStates, VelocityEffect, compare_effects, velocities
from stages.evaluate.lora_file import ScaledLora
from stages.evaluate.lora_weights import StockComparison, applied, compare_with_stock, open_for
from stages.evaluate.paired import (
    PairedComparison,
    PairedError,
    PairedInputs,
    TeacherReference,
    make_reference,
    relative_errors,
)
from stages.nets.components import Components
from stages.nets.student import TIME_SCALE, Student
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed
from stages.sampling.fields import student_field, teacher_field
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler
from stages.system.disk import file_sha256
from stages.system.refusal import Refused
from stages.teacher_files.lora import LoraMerge

STRENGTHS = (0.5, 1.0)
"""Shares of the given scale at which a LoRA is measured."""
FACTORS = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
"""Times the scale: where the search for the best one begins; it goes on half a step beside the best of them."""
SEARCH_SHARE = 4
"""One prompt in so many serves the search; the others confirm what it finds."""
STOCK_STATES = 8


@dataclass(frozen=True)
class MeasuredLora:
    """A file that fits the teacher."""

    source: ScaledLora
    merge: LoraMerge
    """At its scale."""


@dataclass(frozen=True)
class LoraInputs:
    """What every LoRA is measured with."""

    teacher: Teacher
    student: Student
    texts: Sequence[str]
    seed: int
    size: PictureSize
    sampler: Sampler
    reference_steps: int
    export: Path
    """The exported folder of this student."""

    @property
    def teacher_modules(self) -> Mapping[str, nn.Module]:
        """The parts of the teacher that a LoRA changes."""
        return {"unet": self.teacher.components.unet, "text_encoder": self.teacher.components.text_encoder}

    @property
    def student_modules(self) -> Mapping[str, nn.Module]:
        """Those of the student: its text encoder is the teacher's."""
        return {"unet": self.student.unet}


@dataclass(frozen=True)
class LoraStrength:
    """A LoRA at one scale: paired errors against teacher + LoRA, and what the student shows of its effect."""

    strength: float
    scale: float
    student: PairedError
    without: PairedError
    """The control: the student without the LoRA."""
    teacher_without: PairedError
    """How much the LoRA changes: the teacher without it."""
    conditional: VelocityEffect
    unconditional: VelocityEffect


@dataclass(frozen=True)
class ScaleCorrection:
    """The factor on the scale of the UNet's part that brings the student nearest to teacher + LoRA."""

    factor: float
    searched: Mapping[float, float]
    """Factor -> paired error, on the prompts of the search."""
    own: PairedError
    """At factor 1, on the other prompts."""
    corrected: PairedError
    """At the best factor, on these."""
    gain: PairedComparison
    """The corrected one against the own."""

    @property
    def helps(self) -> bool:
        """Whether the other prompts confirm it."""
        return self.factor != 1 and self.gain.ratio_interval[1] < 1


@dataclass(frozen=True)
class LoraMeasurement:
    """What was measured of one LoRA."""

    name: str
    sha256: str
    scale: float
    components: tuple[str, ...]
    """The parts of the model that it changes."""
    prompts: int
    size: str
    guidance: float
    strengths: Sequence[LoraStrength]
    correction: ScaleCorrection | None
    """None for a LoRA of the text encoder alone, which is the teacher's own in the student."""
    stock: StockComparison


def open_measured_loras(loras: Sequence[ScaledLora], teacher: Components) -> list[MeasuredLora]:
    """Open every file; raises `Refused` for what is no LoRA of this teacher's kind."""
    return [MeasuredLora(lora, open_for(teacher, lora)) for lora in loras]


@torch.inference_mode()
def measure_lora(lora: MeasuredLora, inputs: LoraInputs) -> LoraMeasurement:
    """Measure one LoRA at each of `STRENGTHS`, and at the last of them the best scale.

    Raises `Refused` where a model with the LoRA gives no finite pictures.
    """
    measured, correction = list[LoraStrength](), None
    for strength in STRENGTHS:
        comparison = _Comparison.at(lora, strength, inputs)
        measured.append(comparison.strength_report())
        if strength == STRENGTHS[-1] and "unet" in lora.merge.components:
            correction = comparison.best_correction()
    return LoraMeasurement(
        Path(lora.source.file).name,
        file_sha256(Path(lora.source.file)),
        lora.source.scale,
        tuple(sorted(lora.merge.components, reverse=True)),
        len(inputs.texts),
        str(inputs.size),
        inputs.sampler.guidance,
        measured,
        correction,
        _stock_comparison(lora, inputs),
    )


@dataclass(frozen=True)
class _Comparison:
    """Everything of one strength that the teacher with the LoRA gives, to be compared with the student."""

    lora: MeasuredLora
    merge: LoraMerge
    """At this strength."""
    strength: float
    inputs: LoraInputs
    plain: PairedInputs
    """Prompts and noises without the LoRA."""
    reference: TeacherReference
    """Teacher + LoRA, and prompts as its text encoder reads them."""
    states: LoraStates
    teacher_effect: Tensor

    @classmethod
    def at(cls, lora: MeasuredLora, strength: float, inputs: LoraInputs) -> "_Comparison":
        merge, teacher = lora.merge.scaled(strength), inputs.teacher
        noise, other, fresh = (_noises(inputs, name) for name in ("", "other noise", "noise of states"))
        field, steps = teacher_field(teacher), inputs.sampler.steps
        plain = PairedInputs(teacher.encode_texts(inputs.texts), teacher.encode_texts([""]), noise)
        with applied(merge, inputs.teacher_modules):
            with_lora = PairedInputs(teacher.encode_texts(inputs.texts), teacher.encode_texts([""]), noise)
            reference = make_reference(field, with_lora, other, inputs.sampler, [steps], inputs.reference_steps)
            _refuse_non_finite(lora, strength, "teacher", reference.x0)
            states = LoraStates.between(reference.x0, fresh, teacher.bridge, inputs.seed)
            changed = velocities(field, states, with_lora, inputs.sampler.batch_size)
        effect = changed - velocities(field, states, plain, inputs.sampler.batch_size)
        return cls(lora, merge, strength, inputs, plain, reference, states, effect)

    def strength_report(self) -> LoraStrength:
        steps, sampler = self.inputs.sampler.steps, self.inputs.sampler
        field, teacher = student_field(self.inputs.student), teacher_field(self.inputs.teacher)
        with applied(self.merge, self.inputs.student_modules):
            x0 = self._student_latents(self.reference.inputs)
            changed = velocities(field, self.states, self.reference.inputs, sampler.batch_size)
        effect = changed - velocities(field, self.states, self.plain, sampler.batch_size)
        conditional, unconditional = compare_effects(effect, self.teacher_effect, self.states.s)
        return LoraStrength(
            self.strength,
            self.strength * self.lora.source.scale,
            self.reference.compare(x0, steps),
            self.reference.compare(self._student_latents(self.plain), steps),
            self.reference.compare(self.plain.sample(teacher, sampler.for_teacher), steps),
            conditional,
            unconditional,
        )

    def best_correction(self) -> ScaleCorrection:
        """Search the factor on the first prompts, and measure it on the others."""
        count = len(self.inputs.texts)
        first = self.reference.rows(slice(0, count // SEARCH_SHARE))
        others = self.reference.rows(slice(count // SEARCH_SHARE, count))
        searched = {factor: float(self._errors(factor, first).mean()) for factor in FACTORS}
        best = _best_factor(searched)
        half = (FACTORS[1] - FACTORS[0]) / 2
        for factor in (best - half, best + half):
            if FACTORS[0] <= factor <= FACTORS[-1]:
                searched[factor] = float(self._errors(factor, first).mean())
        best, steps = _best_factor(searched), self.inputs.sampler.steps
        own, corrected = (self._errors(factor, others) for factor in (1.0, best))
        return ScaleCorrection(
            best,
            dict(sorted(searched.items())),
            others.summarise(own, steps),
            others.summarise(corrected, steps),
            others.compare_fields(corrected, own, steps),
        )

    def _errors(self, factor: float, reference: TeacherReference) -> Float[Tensor, " b"]:
        """Each picture's error of the student with the UNet's part of the LoRA times a factor."""
        with applied(self.merge.scaled(factor), self.inputs.student_modules):
            return relative_errors(self._student_latents(reference.inputs), reference.x0)

    def _student_latents(self, inputs: PairedInputs) -> Float[Tensor, "b c h w"]:
        x0 = inputs.sample(student_field(self.inputs.student), self.inputs.sampler)
        _refuse_non_finite(self.lora, self.strength, "student", x0)
        return x0


def _best_factor(errors: Mapping[float, float]) -> float:
    """The factor of the least error; of equal ones the nearest to 1."""
    return min(errors, key=lambda factor: (errors[factor], abs(factor - 1)))


def _noises(inputs: LoraInputs, purpose: str) -> Float[Tensor, "b c h w"]:
    """One noise for each prompt; those without a purpose are the evaluation's own."""
    seed = derived_seed(purpose, inputs.seed) if purpose else inputs.seed
    parts = inputs.teacher.components
    return fixed_noises(seed, len(inputs.texts), parts.latent_shape(inputs.size)).to(parts.unet.device)


def _refuse_non_finite(lora: MeasuredLora, strength: float, model: str, x0: Tensor) -> None:
    if not bool(x0.isfinite().all()):
        scale = strength * lora.source.scale
        raise Refused(
            f"lora: {lora.source.file}: at scale {scale:g} the {model}'s pictures are not finite - "
            "choose a smaller scale"
        )


def _stock_comparison(lora: MeasuredLora, inputs: LoraInputs) -> StockComparison:
    """Outputs are compared at the first prompts, on noise, at times spread over the path."""
    noise = _noises(inputs, "")[:STOCK_STATES]
    texts, device = list(inputs.texts[: len(noise)]), noise.device
    timesteps = torch.linspace(0.05, 0.95, len(noise), device=device) * TIME_SCALE

    def predict(pipeline: StableDiffusionPipeline) -> Tensor:
        cond = pipeline.encode_prompt(texts, device, 1, False)[0]
        output: Tensor = pipeline.unet(noise, timesteps, cond).sample
        return output

    return compare_with_stock(inputs.export, lora.source, lora.merge, predict, device)
