"""The export of a student of few steps: stock diffusers samples what we sample, from the folder and from each file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open

from stages import __main__ as cli
from stages.flow.windows import window_ends
from stages.nets.scheduler import window_scheduler
from stages.sampling.grids import fixed_noises
from stages.sampling.models import load_model
from stages.sampling.sampler import Sampler
from tests.few_steps import RANGE, make_fast_run

TEXTS = ["a large yellow moon on a black background", "a small red star at the left"]
NOISE = fixed_noises(0, 2, (4, 8, 8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 windows with its export in fp32, folded for two scales."""
    folder = tmp_path_factory.mktemp("fast") / "4"
    make_fast_run(folder, windows=4)
    assert cli.main(["export", str(folder), "--dtype", "float32", "--fold", "5", "7.5"]) == 0
    return folder


def ours(location: Path, guidance: float, config_from: Path | None = None) -> torch.Tensor:
    model = load_model(str(location), "cpu", config_from=config_from and str(config_from))
    sampler = Sampler(guidance=guidance)
    return sampler.sample(model.field, model.encode(TEXTS), model.encode([""]), NOISE)


def stock(pipeline: StableDiffusionPipeline, steps: int, guidance: float, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, **options}
    return pipeline(TEXTS, latents=NOISE, output_type="latent", **arguments).images


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def single(run: Path, scale: str) -> Path:
    return run / "export" / f"model-4step-w{scale}-flow.safetensors"


def folded_pipeline(file: Path, configs: Path) -> StableDiffusionPipeline:
    options = {"config": str(configs), "local_files_only": True}
    unet = UNet2DConditionModel.from_single_file(file, subfolder="unet", time_cond_proj_dim=None, **options)
    return StableDiffusionPipeline.from_single_file(file, unet=unet, **options)


@pytest.mark.parametrize("windows", [1, 2, 4, 8])
def test_stock_steps_along_the_ends_of_the_windows(windows: int) -> None:
    scheduler = window_scheduler()
    scheduler.set_timesteps(windows)
    assert torch.allclose(scheduler.sigmas.double(), window_ends(windows), atol=1e-7)
    assert scheduler.timesteps.tolist() == [999 * (windows - i) // windows for i in range(windows)]


@pytest.mark.parametrize("guidance", [3.0, 5.0, 6.7])
def test_stock_samples_the_folder_as_we_sample_the_run(run: Path, guidance: float) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(run / "export" / "diffusers")
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    latents = stock(pipeline, 4, guidance)
    assert relative(ours(run, guidance), latents) < 1e-5
    assert relative(ours(run / "export", guidance), latents) < 1e-5
    assert relative(ours(run, guidance + 1), latents) > 1e-3


def test_a_negative_prompt_does_nothing_in_stock(run: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(run / "export" / "diffusers")
    plain, negative = (stock(pipeline, 4, 5.0, negative_prompt=words) for words in (None, ["a circle"] * 2))
    assert torch.equal(plain, negative)


@pytest.mark.parametrize("scale", ["5", "7.5"])
def test_a_folded_file_is_the_run_at_its_scale(run: Path, scale: str) -> None:
    file, configs = single(run, scale), run / "export" / "diffusers"
    latents = stock(folded_pipeline(file, configs), 4, 1.0)
    expected = ours(run, float(scale))
    assert relative(latents, expected) < 1e-4
    assert relative(ours(file, float(scale)), expected) < 1e-4
    assert relative(ours(file, float(scale), Path("stages/tiny/model")), expected) < 1e-4
    assert relative(latents, ours(run, 12.5 - float(scale))) > 1e-3


def test_a_folded_file_opened_with_the_guidance_input_fails_loudly(run: Path) -> None:
    options = {"config": str(run / "export" / "diffusers"), "local_files_only": True}
    with pytest.raises((ValueError, NotImplementedError, RuntimeError, OSError)):
        stock(StableDiffusionPipeline.from_single_file(single(run, "5"), **options), 4, 1.0)


def test_metadata_name_the_steps_and_the_scale(run: Path) -> None:
    with safe_open(single(run, "7.5"), "pt") as opened:
        metadata, names = opened.metadata(), set(opened.keys())
    assert (metadata["sollune.windows"], metadata["sollune.guidance"]) == ("4", "7.5")
    assert json.loads(metadata["sollune.guidance_range"]) == list(RANGE)
    assert "cfg 1" in metadata["modelspec.usage_hint"]
    assert not [name for name in names if "cond_proj" in name]
    facts = json.loads((run / "export" / "diffusers" / "sollune.json").read_text())
    assert (facts["windows"], facts["guidance_range"]) == (4, list(RANGE))


def test_the_workflow_steps_along_the_windows(run: Path) -> None:
    graph = json.loads((run / "export" / "workflow-comfyui.json").read_text())
    nodes = {node["type"]: node for node in graph["nodes"]}
    assert nodes["CheckpointLoaderSimple"]["widgets_values"] == [single(run, "5").name]
    assert nodes["SamplerCustom"]["widgets_values"] == [True, 0, "fixed", 1.0]
    assert "KSampler" not in nodes
    sigmas = [float(word) for word in nodes["ManualSigmas"]["widgets_values"][0].split(",")]
    assert torch.allclose(torch.tensor(sigmas).double(), window_ends(4), atol=1e-7)
    by_number = {node["id"]: node for node in graph["nodes"]}
    for _, source, slot, target, place, kind in graph["links"]:
        assert by_number[source]["outputs"][slot]["type"] == kind
        assert by_number[target]["inputs"][place]["type"] == kind
    inputs = {one["name"] for one in nodes["SamplerCustom"]["inputs"]}
    assert inputs == {"model", "positive", "negative", "latent_image", "sampler", "sigmas"}


@pytest.mark.parametrize("options", [["--dtype", "both"], ["--unet-only"], ["--single-file", "false"]])
def test_every_kind_of_export_verifies(run: Path, tmp_path: Path, options: list[str]) -> None:
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out"), *options]) == 0
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out"), "--verify"]) == 0
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    unet = "-unet" if "--unet-only" in options else ""
    assert names == (set() if "--single-file" in options else {f"model-4step-w5{unet}-flow.safetensors"})


def test_an_export_verifies_each_of_its_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{single(run, scale)}: verified" in shown for scale in ("5", "7.5"))
