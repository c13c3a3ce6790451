import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages.export import main, tensorfile
from stages.export.diffusers import export_diffusers
from stages.export.existing import remove_stale_files
from stages.export.ldm import export_ldm
from stages.export.verify_export import ExportOptions
from stages.nets.run_folder import Origin
from stages.nets.student import Student, Target
from stages.system.refusal import Refused
from stages.teacher_files.folder import component_digests
from stages.teacher_files.ldm_names import ldm_names, to_ldm

EMBEDDED = Path("stages/tiny/model")
PARTS = ("unet", "vae", "text_encoder")
PORTS = {
    "CheckpointLoaderSimple": ([], ["MODEL", "CLIP", "VAE"]),
    "ModelSamplingSD3": (["MODEL"], ["MODEL"]),
    "CLIPTextEncode": (["CLIP"], ["CONDITIONING"]),
    "EmptyLatentImage": ([], ["LATENT"]),
    "KSampler": (["MODEL", "CONDITIONING", "CONDITIONING", "LATENT"], ["LATENT"]),
    "VAEDecode": (["LATENT", "VAE"], ["IMAGE"]),
    "SaveImage": (["IMAGE"], []),
}


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        metadata: dict[str, str] = opened.metadata()
    return metadata


def sample(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    for part in PARTS:
        # Tensors mapped from two files are aligned differently, and the products of matrices then round differently.
        for parameter in getattr(pipeline, part).parameters():
            parameter.data = parameter.data.clone()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return pipeline("a red star", num_inference_steps=3, guidance_scale=3.0, latents=noise, output_type="latent").images


def test_stock_diffusers_reads_the_file_bit_equal_and_samples_the_same_latents(
    student: Student, tmp_path: Path
) -> None:
    folder = export_diffusers(student, EMBEDDED, tmp_path, {"teacher": "model"}, ExportOptions(dtype="float32"))
    single = StableDiffusionPipeline.from_single_file(export_ldm(folder), config=str(folder), local_files_only=True)
    whole = StableDiffusionPipeline.from_pretrained(folder)
    for part in PARTS:
        loaded, expected = (getattr(pipeline, part).state_dict() for pipeline in (single, whole))
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert torch.equal(single.unet.conv_in.weight, student.unet.conv_in.weight)
    assert torch.equal(sample(single), sample(whole))


def test_the_file_holds_the_folders_tensors_in_the_folders_type(whole: Path, single: Path) -> None:
    folder, written = whole / "diffusers", load_file(single)
    expected = {
        f"{part}.{name}": value
        for part in PARTS
        for file in (folder / part).glob("*.safetensors")
        for name, value in load_file(file).items()
    }
    names = ldm_names(expected, layers=1, vae_levels=4)
    assert written.keys() == set(names.values())
    assert {value.dtype for value in written.values()} == {torch.float16}
    assert all(torch.equal(written[names[key]], to_ldm(key, value)) for key, value in expected.items())


def test_the_network_alone_is_a_file_for_unet_loader_and_the_whole_one_may_stay_beside_it(
    folder: Path, single: Path
) -> None:
    beside = Path(shutil.copy(single, folder.parent))
    file = export_ldm(folder, "mine", unet_only=True)
    assert remove_stale_files(folder.parent) == []
    assert beside.is_file()
    assert file.name == "mine-unet-flow.safetensors"
    written, metadata = load_file(file), header(file)
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = ldm_names((f"unet.{name}" for name in unet), layers=1, vae_levels=4)
    assert written.keys() == set(names.values())
    assert all(name.startswith("model.diffusion_model.") for name in written)
    assert metadata["modelspec.title"] == "mine UNet flow (sollune)"
    assert "behind UNETLoader" in metadata["modelspec.usage_hint"]
    nodes = json.loads((file.parent / "workflow-comfyui.json").read_text())["nodes"]
    loaders = {node["type"]: node["widgets_values"] for node in nodes if "Loader" in node["type"]}
    assert loaders == {
        "UNETLoader": [file.name, "default"],
        "CheckpointLoaderSimple": ["sd-embedded.safetensors"],
    }
    sampling, unet_loader = (next(n for n in nodes if n["type"] == t) for t in ("ModelSamplingSD3", "UNETLoader"))
    assert unet_loader["outputs"][0]["links"] == [sampling["inputs"][0]["link"]]


def test_the_metadata_state_how_to_sample_the_file(single: Path) -> None:
    metadata = header(file := single)
    assert file.name == "sd-embedded-flow.safetensors"
    assert metadata["format"] == "pt"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert metadata["modelspec.title"] == "sd-embedded flow (sollune)"
    assert metadata["modelspec.resolution"] == "64x64"
    assert metadata["modelspec.prediction_type"] == "sd3"
    assert "ModelSamplingSD3 with shift 2.5" in metadata["modelspec.usage_hint"]
    own = {key.removeprefix("sollune."): value for key, value in metadata.items() if key.startswith("sollune.")}
    assert json.loads(own.pop("teacher_sha256")).keys() == {*PARTS, "tokenizer", "scheduler"}
    assert len(own.pop("student_sha256")) == 64
    assert own == {
        "prediction": "velocity",
        "path": "linear",
        "time_scale": "1000",
        "shift": "2.5",
        "tail_policy": "hold",
        "recipe_sha256": "ab" * 32,
        "samples_seen": "64",
    }
    assert not any("v_pred" in key for key in (*metadata, *load_file(file)))


def test_the_stated_hash_is_that_of_the_bytes_behind_the_header(single: Path) -> None:
    file = single
    content = file.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert len(tensors) == sum(value.nbytes for value in load_file(file).values())
    assert header(file)["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"


def test_two_writes_give_the_same_bytes(folder: Path, single: Path) -> None:
    again = export_ldm(folder)
    for name in (single.name, "workflow-comfyui.json"):
        assert (again.parent / name).read_bytes() == (single.parent / name).read_bytes()


def test_the_workflow_is_a_sound_graph_that_samples_by_the_straight_path(single: Path) -> None:
    file = single
    graph = json.loads((file.parent / "workflow-comfyui.json").read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert (graph["version"], graph["last_node_id"], graph["last_link_id"]) == (0.4, len(nodes), len(graph["links"]))
    for node in nodes.values():
        inputs, outputs = PORTS[node["type"]]
        assert [one["type"] for one in node["inputs"]] == inputs
        assert [one["type"] for one in node["outputs"]] == outputs
    for number, source, out_slot, target, in_slot, kind in graph["links"]:
        output, taken = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert output["type"] == taken["type"] == kind
        assert number in output["links"]
        assert number == taken["link"]
    by_type = {node["type"]: node for node in nodes.values()}
    assert by_type["CheckpointLoaderSimple"]["widgets_values"] == [file.name]
    assert by_type["ModelSamplingSD3"]["widgets_values"] == [2.5]
    assert by_type["EmptyLatentImage"]["widgets_values"] == [64, 64, 1]
    assert by_type["KSampler"]["widgets_values"][4:] == ["euler", "simple", 1.0]
    models = {link[1] for link in graph["links"] if link[3] == by_type["KSampler"]["id"] and link[5] == "MODEL"}
    assert models == {by_type["ModelSamplingSD3"]["id"]}


def test_an_export_of_v_prediction_is_refused_by_name(folder: Path) -> None:
    facts = folder / "sollune.json"
    facts.write_text(facts.read_text().replace('"velocity"', '"v_prediction"'))
    with pytest.raises(Refused, match="predicts v_prediction"):
        export_ldm(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_is_no_export_is_refused(teacher_folder: Path) -> None:
    with pytest.raises(Refused, match="no export of ours"):
        export_ldm(teacher_folder)


@pytest.mark.parametrize("value", [torch.full((4,), torch.inf, dtype=torch.float16), torch.zeros(4)])
def test_a_tensor_without_a_number_or_of_another_type_is_refused_by_name(folder: Path, value: torch.Tensor) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "conv_out.bias": value}, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"unet\.conv_out\.bias"):
        export_ldm(folder)


def test_a_file_that_does_not_come_back_never_replaces_a_good_one(
    folder: Path, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder.parent / single.name
    file.write_bytes(good := single.read_bytes())
    write = tensorfile.write

    def flip_a_bit(path: Path, *content: dict[str, torch.Tensor]) -> None:
        write(path, *content)
        with open(path, "r+b") as opened:
            opened.seek(-3, 2)
            byte = opened.read(1)[0]
            opened.seek(-3, 2)
            opened.write(bytes([byte ^ 1]))

    monkeypatch.setattr(tensorfile, "write", flip_a_bit)
    with pytest.raises(Refused, match="did not come back as written"):
        export_ldm(folder)
    assert file.read_bytes() == good
    assert sorted(path.name for path in file.parent.iterdir()) == ["diffusers", file.name]


def save_run(run: Path, teacher_folder: Path, student: Student, target: Target) -> Path:
    (run / "checkpoints" / "64").mkdir(parents=True)
    save_file(student.unet.state_dict(), run / "checkpoints" / "64" / "ema.safetensors")
    Origin(str(teacher_folder), component_digests(teacher_folder), "hold", "0" * 64, target).save(run)
    return run


@pytest.mark.parametrize(
    ("target", "words", "single"), [("velocity", ("--single-file", "true"), True), ("vp_v", (), False)]
)
def test_the_command_writes_the_file_where_the_student_predicts_velocity(
    target: Target, words: tuple[str, ...], single: bool, student: Student, teacher_folder: Path, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "distill", teacher_folder, student, target)
    assert main([str(run), *words]) == 0
    file = run / "export" / f"{teacher_folder.name}-flow.safetensors"
    assert file.is_file() == (run / "export" / "workflow-comfyui.json").is_file() == single
    assert (run / "export" / "diffusers").is_dir()


def test_the_command_refuses_a_file_of_v_prediction_before_it_writes_anything(
    student: Student, teacher_folder: Path, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "distill", teacher_folder, student, "vp_v")
    with pytest.raises(Refused, match="--single-file false"):
        main([str(run), "--single-file", "true"])
    assert not (run / "export").exists()
