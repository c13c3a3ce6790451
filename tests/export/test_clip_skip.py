"""Exports of a teacher whose text encoder ends early: right in a stock pipeline as it is, whole in the single file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.export import export_all
from stages.export.existing import verify_export
from stages.export.verify_export import SKIPPED_LAYERS_FILE, ExportOptions
from stages.sampling.single_file import load_single_file, read_single_file
from stages.system.refusal import Refused
from tests.export.conftest import FACTS, distilled

TOLERANCE = 1e-5
LAYERS = 3


def cut(teacher: Path, skip: int, target: Path) -> Path:
    """A copy of a teacher without the last layers of its text encoder, which lie beside it."""
    shutil.copytree(teacher, target)
    weights, config = target / "text_encoder/model.safetensors", target / "text_encoder/config.json"
    settings, tensors = json.loads(config.read_text()), load_file(weights)
    settings["num_hidden_layers"] = LAYERS - skip
    config.write_text(json.dumps(settings))
    skipped = {
        name: value
        for name, value in tensors.items()
        if any(f"encoder.layers.{k}." in name for k in range(LAYERS - skip, LAYERS))
    }
    save_file({name: tensors[name] for name in tensors.keys() - skipped.keys()}, weights, {"format": "pt"})
    save_file(skipped, target / SKIPPED_LAYERS_FILE, {"format": "pt"})
    return target


@pytest.fixture(scope="module", params=[1, 2])
def skip(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def skipping(skip: int, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(teacher_folder, skip, tmp_path_factory.mktemp("cut") / "teacher")


@pytest.fixture(scope="module")
def out(skipping: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export")
    export_all(distilled(skipping), skipping, out, FACTS, ExportOptions(dtype="float32"))
    return out


def single_file(out: Path) -> Path:
    return out / "sd-embedded-flow.safetensors"


def sampled(pipeline: StableDiffusionPipeline, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    drawn: Tensor = pipeline(
        "a red star", 64, 64, 3, guidance_scale=4.0, latents=noise, output_type="latent", **options
    ).images
    return drawn


def encoded(pipeline: StableDiffusionPipeline, text: str, skip: int) -> Tensor:
    """A text as the stock pipeline reads it with clip_skip, which it applies to no negative prompt."""
    # Its clip_skip looks for an attribute that transformers 5.6 took away; as a submodule it would hold itself.
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    cond: Tensor = pipeline.encode_prompt(text, torch.device("cpu"), 1, False, clip_skip=skip)[0]
    return cond


def test_the_folder_needs_no_clip_skip_and_the_single_file_is_whole(out: Path, skip: int, teacher_folder: Path) -> None:
    folder = StableDiffusionPipeline.from_pretrained(out / "diffusers")
    whole = StableDiffusionPipeline.from_single_file(
        single_file(out), config=str(teacher_folder), local_files_only=True, scheduler=folder.scheduler
    )
    assert whole.text_encoder.config.num_hidden_layers == LAYERS
    expected = sampled(whole, clip_skip=skip, negative_prompt_embeds=encoded(whole, "", skip))
    assert float((sampled(folder) - expected).abs().max()) <= TOLERANCE
    assert float((sampled(whole) - expected).abs().max()) > 100 * TOLERANCE
    by_config = StableDiffusionPipeline.from_single_file(
        single_file(out), config=str(out / "diffusers"), local_files_only=True
    )
    assert float((sampled(by_config) - expected).abs().max()) <= TOLERANCE


def test_our_own_sampler_reads_the_single_file_so_whatever_folder_lends_the_configs(
    out: Path, skip: int, teacher_folder: Path, skipping: Path, tmp_path: Path
) -> None:
    expected = sampled(StableDiffusionPipeline.from_pretrained(out / "diffusers"))
    export_all(distilled(skipping), skipping, tmp_path, FACTS, ExportOptions(dtype="float32", unet_only=True))
    for file in (single_file(out), tmp_path / "sd-embedded-unet-flow.safetensors"):
        for configs in (teacher_folder, out / "diffusers"):
            pipeline = load_single_file(read_single_file(file), configs, torch.device("cpu"))
            pipeline.scheduler = StableDiffusionPipeline.from_pretrained(out / "diffusers").scheduler
            assert float((sampled(pipeline) - expected).abs().max()) <= TOLERANCE


def test_the_single_file_has_the_tensors_of_a_normal_one(out: Path, whole: Path, single: Path) -> None:
    with safe_open(single_file(out), "pt") as ours, safe_open(single, "pt") as normal:
        assert set(ours.keys()) == set(normal.keys())


def test_every_place_states_the_clip_skip(out: Path, skip: int) -> None:
    facts = json.loads((out / "diffusers/sollune.json").read_text())
    assert facts["clip_skip"] == skip
    with safe_open(single_file(out), "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.encoder_layer"] == str(skip + 1)
    assert metadata["sollune.clip_skip"] == str(skip)
    assert f"CLIPSetLastLayer with {-(skip + 1)}" in metadata["modelspec.usage_hint"]
    card = (out / "diffusers/README.md").read_text()
    assert "pass no `clip_skip`" in card
    assert f"set clip skip to {skip + 1}" in card
    assert f"`CLIPSetLastLayer` with {-(skip + 1)}" in card


def test_the_workflow_ends_the_text_encoder_early_for_both_texts(out: Path, skip: int) -> None:
    graph = json.loads((out / "workflow-comfyui.json").read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    (stop,) = [node for node in nodes.values() if node["type"] == "CLIPSetLastLayer"]
    assert stop["widgets_values"] == [-(skip + 1)]
    links = {link[0]: link for link in graph["links"]}
    assert links[stop["inputs"][0]["link"]][1] == 1
    texts = [node for node in nodes.values() if node["type"] == "CLIPTextEncode"]
    assert [links[node["inputs"][0]["link"]][1] for node in texts] == [stop["id"]] * 2
    assert sorted(nodes) == list(range(1, len(nodes) + 1))


@pytest.mark.parametrize("dtype", ["float16", "both"])
def test_other_types_are_verified_likewise(skipping: Path, tmp_path: Path, dtype: str) -> None:
    student = distilled(skipping)
    export_all(student, skipping, tmp_path, FACTS, ExportOptions(dtype=dtype))
    assert verify_export(tmp_path, student, skipping) == (tmp_path / "diffusers", single_file(tmp_path))
    assert {value.dtype for value in load_file(single_file(tmp_path)).values()} == {torch.float16}


def test_the_network_alone_ends_the_base_checkpoints_text_encoder_early(skipping: Path, tmp_path: Path) -> None:
    export_all(distilled(skipping), skipping, tmp_path, FACTS, ExportOptions(unet_only=True))
    graph = json.loads((tmp_path / "workflow-comfyui.json").read_text())
    types = [node["type"] for node in graph["nodes"]]
    assert types[8:] == ["UNETLoader", "CLIPSetLastLayer"]
    texts = [node["id"] for node in graph["nodes"] if node["type"] == "CLIPTextEncode"]
    assert [link[1] for link in graph["links"] if link[3] in texts] == [10, 10]


def test_layers_that_are_lost_or_changed_are_noticed(skipping: Path, out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    file = copy / "diffusers" / SKIPPED_LAYERS_FILE
    tensors = load_file(file)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})
    with pytest.raises(Refused, match=rf"skipped_layers.safetensors: {name} did not come back"):
        verify_export(copy, distilled(skipping), skipping)
    file.unlink()
    with pytest.raises(Refused, match=r"skipped_layers.safetensors: \d+ tensors are missing"):
        verify_export(copy, distilled(skipping), skipping)


def test_an_export_without_clip_skip_says_nothing_of_it(whole: Path, single: Path) -> None:
    assert "clip_skip" not in json.loads((whole / "diffusers/sollune.json").read_text())
    assert not (whole / "diffusers" / SKIPPED_LAYERS_FILE).exists()
    assert "CLIPSetLastLayer" not in (whole / "workflow-comfyui.json").read_text()
    assert "clip skip" not in (whole / "diffusers/README.md").read_text().lower()
    with safe_open(single, "pt") as opened:
        assert "modelspec.encoder_layer" not in opened.metadata()
