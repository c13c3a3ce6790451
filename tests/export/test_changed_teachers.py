"""Exports of a student whose teacher was mixed, had a LoRA, another autoencoder and clip skip carry all of it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages.export import main
from stages.export.diffusers import export_diffusers
from stages.nets.components import load_components
from stages.nets.run_folder import WEIGHTS_FILE, Origin
from stages.teacher_files.ldm_names import ldm_names, to_ldm
from stages.teacher_files.source import LoraFile, MixedModel, TeacherSource
from tests import lora_files as made
from tests.export.conftest import distilled
from tests.fine_tunes import fine_tune

SCALE, WEIGHT = 0.5, 0.75


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A licensed teacher, a LoRA, and another autoencoder under its own licence."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(made.TEACHER, folder / "drawings")
    (folder / "drawings/README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (folder / "drawings/LICENSE.txt").write_text("Do as you like.\n")
    made.write(made.kohya(made.random_pairs("to_q", "fc1")), folder / "style.safetensors")
    fine_tune(folder / "anime", 1)
    shutil.copytree(made.TEACHER / "vae", folder / "other-vae")
    (folder / "other-vae/README.md").write_text("---\nlicense: agpl-3.0\n---\n")
    (folder / "other-vae/LICENSE").write_text("Another licence.\n")
    file = folder / "other-vae/diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * value for name, value in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with a checkpoint, as distil leaves it, and its export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        source = TeacherSource(
            location=str(sources / "drawings"),
            vae=str(sources / "other-vae"),
            mix=(MixedModel(model=str(sources / "anime"), weight=WEIGHT),),
            loras=(LoraFile(file=str(sources / "style.safetensors"), scale=SCALE),),
            clip_skip=1,
        )
        parts = load_components(source, torch.device("cpu"), torch.float32)
        folder = tmp_path_factory.mktemp("run")
        assert parts.files is not None
        Origin(source.location, dict(parts.files.digests), "hold", "abc").with_source(source).save(folder)
        checkpoint = folder / "checkpoints/000000064"
        checkpoint.mkdir(parents=True)
        weights = {
            f"unet.{name}": value.contiguous() for name, value in distilled(parts.folder).unet.state_dict().items()
        }
        save_file(weights, checkpoint / WEIGHTS_FILE)
        assert main([str(folder), "--dtype", "float32"]) == 0
        yield folder


def facts_of(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / "export/diffusers/sollune.json").read_text())
    return facts


def test_the_export_is_verified_again_and_goes_to_the_originals_format_too(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--verify"]) == 0
    assert main([str(run), "--to", "pt", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "drawings-flow.pt").is_file()


def test_it_carries_the_other_autoencoder_and_the_merged_text_encoder(run: Path, sources: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(run / "export/diffusers")
    expected = load_file(sources / "other-vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in pipeline.vae.state_dict().items())
    stock = StableDiffusionPipeline.from_pretrained(sources / "drawings")
    fine = load_file(sources / "anime/text_encoder/model.safetensors")
    own = stock.text_encoder.state_dict()
    tuned = {name: fine.get(name, fine.get(f"text_model.{name}")) for name in own}
    stock.text_encoder.load_state_dict({name: own[name] + WEIGHT * (tuned[name] - own[name]) for name in own})
    stock.load_lora_weights(sources, weight_name="style.safetensors")
    stock.fuse_lora(components=["unet", "text_encoder"], lora_scale=SCALE)
    stock.unload_lora_weights()
    merged = stock.text_encoder.state_dict()
    assert pipeline.text_encoder.config.num_hidden_layers == 2
    for name, value in pipeline.text_encoder.state_dict().items():
        assert float((value - merged[name]).abs().max()) <= 1e-5
    with safe_open(run / "export/drawings-flow.safetensors", "pt") as single:
        prefix = "cond_stage_model.transformer.text_model."
        for name, value in merged.items():
            assert float((single.get_tensor(prefix + name) - value).abs().max()) <= 1e-5


def test_it_states_what_the_teacher_was_made_of_and_no_place_of_this_machine(run: Path, sources: Path) -> None:
    facts = facts_of(run)
    assert facts["teacher"] == "drawings"
    assert facts["clip_skip"] == 1
    (lora,) = facts["loras"]
    assert (lora["name"], lora["scale"], len(lora["sha256"])) == ("style.safetensors", SCALE, 64)
    (mixed,) = facts["mix"]
    assert (mixed["name"], mixed["weight"], sorted(mixed["sha256"])) == ("anime", WEIGHT, ["text_encoder", "unet"])
    with safe_open(run / "export/drawings-flow.safetensors", "pt") as single:
        metadata = single.metadata()
    assert all(json.loads(metadata[f"sollune.{key}"]) == facts[key] for key in ("mix", "loras", "vae"))
    assert facts["vae"]["name"] == "other-vae"
    assert facts["teacher_sha256"] == Origin.open(run).teacher_sha256
    for file in (run / "export").rglob("*"):
        if file.is_file():
            assert str(sources).encode() not in file.read_bytes(), file


def test_the_card_states_the_teachers_licence_and_that_the_others_have_their_own(run: Path) -> None:
    card = (run / "export/diffusers/README.md").read_text()
    assert "license: mit" in card
    assert (
        "They also hold the fine-tune `anime` and the LoRA `style.safetensors` and the autoencoder of `other-vae`"
        in card
    )
    assert "- loras.1.scale: `0.5`" in card
    licences = [file.name for file in (run / "export/diffusers").glob("LICENSE*")]
    assert licences == ["LICENSE.txt"]


def test_a_single_files_export_has_no_licence_of_the_folder_that_lent_its_configs(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    files = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    held = {
        f"{part}.{name}": value
        for part, stem in files.items()
        for name, value in load_file(made.TEACHER / part / f"{stem}.safetensors").items()
    }
    names = ldm_names(held, 1, 4)
    save_file(
        {names[key]: to_ldm(key, value).contiguous() for key, value in held.items()}, tmp_path / "anime.safetensors"
    )
    source = TeacherSource(location=str(tmp_path / "anime.safetensors"), config=str(sources / "drawings"))
    parts = load_components(source, torch.device("cpu"), torch.float32)
    facts = {**parts.name_facts, **parts.change_facts, "tail": "hold", "samples": 64}
    folder = export_diffusers(distilled(parts.folder), parts.folder, tmp_path / "out", facts)
    card = (folder / "README.md").read_text()
    assert "of `anime`, whose folder states none" in card
    assert "license:" not in card
    assert not list(folder.glob("LICENSE*"))
    assert str(tmp_path) not in card
