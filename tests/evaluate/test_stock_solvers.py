"""`sollune sample` against the stock pipeline: the same noise, the same latents."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from stages.export.diffusers import export_diffusers
from stages.export.verify_export import ExportOptions
from stages.flow.solver import apply_guidance, euler
from stages.nets.student import TIME_SCALE, Student, make_vp_bridge
from stages.nets.teacher import Teacher
from stages.sampling.grids import fixed_noises
from stages.sampling.models import LoadedModel, load_model
from stages.sampling.sampler import Sampler, sample_latents
from stages.sampling.single_file import load_pipeline
from stages.sampling.solvers import SOLVERS, supported_solvers

TEXTS = ["a small red star at the left", "a large blue ring"]
NOISE = fixed_noises(0, 2, (4, 8, 8))
STEPS, GUIDANCE = 5, 3.0


@pytest.fixture(scope="module")
def folder(run_folder: Path) -> Path:
    return run_folder / "export" / "diffusers"


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(str(folder), "cpu")


@pytest.fixture(scope="module")
def opened(folder: Path) -> StableDiffusionPipeline:
    return load_pipeline(folder, torch.device("cpu"))


@pytest.fixture
def pipeline(opened: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> StableDiffusionPipeline:
    """The export in stock diffusers, with a scheduler that a test may swap."""
    monkeypatch.setattr(opened, "scheduler", type(opened.scheduler).from_config(opened.scheduler.config))
    return opened


def stock(pipeline: StableDiffusionPipeline, **options: Any) -> torch.Tensor:
    arguments = {"num_inference_steps": STEPS, **options}
    return pipeline(TEXTS, guidance_scale=GUIDANCE, latents=NOISE, output_type="latent", **arguments).images


def ours(model: LoadedModel, sampler: Sampler) -> torch.Tensor:
    return sampler.sample(model.field, model.encode(TEXTS), model.encode([""]), NOISE)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_euler_is_stock_flow_match_euler(pipeline: StableDiffusionPipeline, model: LoadedModel) -> None:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.scheduler.init_noise_sigma = 1.0
    grid = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    drawn = ours(model, Sampler(steps=STEPS, guidance=GUIDANCE))
    assert relative(drawn, stock(pipeline, sigmas=grid, num_inference_steps=None)) < 1e-5


def test_euler_is_stock_dpm_solver_of_order_one_on_its_grid(
    pipeline: StableDiffusionPipeline, model: LoadedModel
) -> None:
    """It passes whole times to the model, as UniPC does, and so does ours here."""
    pipeline.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1, steps_offset=1
    )
    latents = stock(pipeline)
    cond, uncond = model.encode(TEXTS), model.encode([""])

    def velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return apply_guidance(*model.field.branches(x, (TIME_SCALE * s).floor() / TIME_SCALE, cond, uncond), GUIDANCE)

    with torch.inference_mode():
        assert relative(euler(velocity, NOISE, pipeline.scheduler.sigmas), latents) < 1e-5


@pytest.mark.parametrize("shift", [None, 2.5])
def test_unipc_is_the_stock_pipeline_with_the_shipped_scheduler(
    pipeline: StableDiffusionPipeline, model: LoadedModel, shift: float | None
) -> None:
    if shift:
        pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=shift)
    sampler = Sampler(solver="unipc", steps=STEPS, guidance=GUIDANCE, shift=shift or 1.0)
    assert relative(ours(model, sampler), stock(pipeline)) < 1e-5


def ddim(model: LoadedModel) -> torch.Tensor:
    solve = SOLVERS["ddim"].make(model.field, STEPS, 1.0)
    return sample_latents(model.field, model.encode(TEXTS), model.encode([""]), NOISE, solve, GUIDANCE, 8)


def test_ddim_of_a_v_prediction_student_is_stock_ddim(
    student: Student, teacher: Teacher, teacher_folder: Path, tmp_path: Path
) -> None:
    speaking = Student(student.unet, make_vp_bridge("vp_v", teacher.components.schedule, "hold"))
    exported = export_diffusers(speaking, teacher_folder, tmp_path, {"tail": "hold"}, ExportOptions(dtype="float32"))
    model = load_model(str(exported), "cpu")
    pipeline = load_pipeline(exported, torch.device("cpu"))
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert supported_solvers(model.field) == ("euler", "heun", "unipc", "ddim")
    assert relative(ddim(model), stock(pipeline)) < 1e-5


def test_ddim_of_a_teacher_of_noise_prediction_is_stock_ddim(teacher_folder: Path) -> None:
    pipeline = load_pipeline(teacher_folder, torch.device("cpu"))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert relative(ddim(load_model(str(teacher_folder), "cpu")), stock(pipeline)) < 1e-5


@pytest.mark.parametrize("s", [0.37345, 0.9])
def test_comfyui_reads_the_exported_unet_as_our_solver_does(folder: Path, model: LoadedModel, s: float) -> None:
    """ComfyUI's CONST: x0 = x - sigma * out, with the time sigma * 1000 as a float."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    cond, uncond = model.encode(TEXTS), model.encode([""])
    with torch.inference_mode():
        times = torch.full((2,), s) * 1000
        theirs = NOISE - s * unet(NOISE, times, cond).sample
        landed = euler(lambda x, at: model.field.branches(x, at, cond, uncond)[0], NOISE, (s, 0.0))
        assert relative(landed, theirs) < 1e-5
        assert relative(NOISE - s * unet(NOISE, times.long() + 20, cond).sample, theirs) > 1e-4


REFUSING = ("EulerDiscrete", "EulerAncestralDiscrete", "DDIM", "HeunDiscrete", "LCM", "PNDM", "FlowMatchEulerDiscrete")


@pytest.mark.parametrize("name", REFUSING)
def test_a_swapped_scheduler_that_would_sample_noise_fails_loudly(pipeline: StableDiffusionPipeline, name: str) -> None:
    pipeline.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipeline.scheduler.config)
    with pytest.raises(
        (ValueError, RuntimeError, AttributeError), match=r"prediction_type|shape|size|init_noise_sigma"
    ):
        stock(pipeline)


def test_dpm_solver_swapped_in_by_config_samples_what_we_sample(
    pipeline: StableDiffusionPipeline, model: LoadedModel
) -> None:
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    finest = ours(model, Sampler(solver="heun", steps=12, guidance=GUIDANCE))
    near, far = (relative(stock(pipeline, num_inference_steps=steps), finest) for steps in (16, 3))
    assert near < 0.05
    assert near < far
