"""The command `sollune sample`, on everything that it opens."""

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stages.export.diffusers import export_diffusers
from stages.export.ldm import export_ldm
from stages.export.verify_export import ExportOptions
from stages.nets.run_folder import Origin
from stages.nets.student import Student, make_vp_bridge
from stages.nets.teacher import Teacher
from stages.sampling.grids import fixed_noise, read_settings, to_pil_image
from stages.sampling.models import load_model
from stages.sampling.sample_command import main
from stages.sampling.sampler import Sampler, sample_student
from stages.sampling.solvers import supported_solvers
from stages.system.refusal import Refused

FEW = ["--steps", "2", "--seeds", "1"]


@pytest.fixture(scope="module")
def single(run_folder: Path) -> Path:
    return export_ldm(run_folder / "export" / "diffusers")


@pytest.fixture
def lone(single: Path, tmp_path: Path) -> Path:
    """The file without the folder beside it."""
    return Path(shutil.copy(single, tmp_path / single.name))


@pytest.fixture
def nameless(single: Path, tmp_path: Path) -> Path:
    """The same tensors as another program saves them."""
    save_file(load_file(single), tmp_path / "merged.safetensors", {"format": "pt"})
    return tmp_path / "merged.safetensors"


def pixels(where: Path, *words: str) -> npt.NDArray[np.int64]:
    """The sheet that the command writes."""
    out = where.parent / "sheet.png" if where.is_file() else where / "sheet.png"
    main([str(where), "a red star", *FEW, *words, "--out", str(out)])
    with Image.open(out) as image:
        return np.asarray(image, dtype=np.int64)


def assert_same(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> None:
    """Up to one step of a byte: tensors mapped from two files are aligned differently, and products then round."""
    assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize("kind", ["run", "export", "file", "teacher"])
def test_sample_command_samples_every_kind_of_model(
    kind: str, run_folder: Path, teacher_folder: Path, single: Path, tmp_path: Path
) -> None:
    places = {"run": run_folder, "export": run_folder / "export", "file": single, "teacher": teacher_folder}
    (tmp_path / "more.txt").write_text("a green moon\nshape/ring\ta blue ring\n")
    out, more = tmp_path / "out.png", tmp_path / "more.txt"
    words = ["[a] red star", "--prompts", str(more), "--steps", "2", "--seeds", "0", "7", "42", "--negative", "a ring"]
    assert main([str(places[kind]), *words, "--out", str(out)]) == 0
    settings = read_settings(out)["sample"]
    assert settings["texts"] == ["[a] red star", "a green moon", "a blue ring"]
    assert (settings["run"], settings["steps"], settings["negative"], settings["seeds"]) == (
        str(places[kind]),
        2,
        "a ring",
        [0, 7, 42],
    )
    assert (settings["shift"], settings["checkpoint"]) == (1.0, 64 if kind == "run" else None)
    with Image.open(out) as image:
        assert image.size == (180 + 3 * (128 + 4), 20 + 3 * (128 + 4))


def test_sample_command_reports_which_sentences_are_cut_and_which_lines_are_left_out(
    run_folder: Path, teacher_folder: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.txt").write_bytes(b"\xef\xbb\xbfa green moon\nbad \xff\n\n" + b"star " * 90)
    words = ["a red star", "--prompts", str(tmp_path / "more.txt"), *FEW, "--out", str(tmp_path / "out.png")]
    for place in (run_folder, run_folder / "export", single, teacher_folder):
        assert main([str(place), *words]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert shown[0].startswith(f"prompts: 1 not UTF-8, left out (the first: {tmp_path / 'more.txt'}:2 (byte FF))")
        assert shown[1].startswith("prompts: 1 empty, left out")
        assert shown[2].startswith("prompts: 1 longer than 24 tokens, cut there (the first: star star")
        assert read_settings(tmp_path / "out.png")["sample"]["texts"][:2] == ["a red star", "a green moon"]


def test_a_negative_seed_is_a_seed_like_any_other(teacher_folder: Path) -> None:
    assert (pixels(teacher_folder, "--seeds", "-1") != pixels(teacher_folder, "--seeds", "1")).any()


def test_a_seed_is_the_same_noise_for_every_sentence_and_number_of_seeds(
    run_folder: Path, student: Student, teacher: Teacher, tmp_path: Path
) -> None:
    main(
        [
            str(run_folder),
            "a blue ring",
            "a red star",
            "--steps",
            "2",
            "--seeds",
            "7",
            "3",
            "--out",
            f"{tmp_path}/a.png",
        ]
    )
    noise = fixed_noise(0, 3, (4, 8, 8))[None]
    cond = teacher.encode_texts(["a red star"])
    expected = to_pil_image(
        teacher.decode_latents(sample_student(student, cond, teacher.uncond, noise, Sampler(steps=2)))[0]
    )
    with Image.open(tmp_path / "a.png") as image:
        cell = image.crop((180 + 132, 20 + 132, 180 + 132 + 128, 20 + 132 + 128))
    assert_same(np.asarray(cell, dtype=np.int64), np.asarray(expected, dtype=np.int64))


def test_run_and_its_export_sample_the_same(run_folder: Path) -> None:
    assert_same(pixels(run_folder), pixels(run_folder / "export" / "diffusers"))


def test_a_file_samples_what_its_folder_samples_and_needs_of_another_its_configs_only(
    single: Path, lone: Path, teacher_folder: Path, run_folder: Path
) -> None:
    """The teacher's folder gives sizes and words, while its scheduler for noise prediction is not used."""
    noise, sampler = fixed_noise(0, 1, (4, 8, 8))[None], Sampler(steps=2, guidance=3.0)
    drawn = []
    for where, configs in ((run_folder / "export", None), (single, None), (lone, str(teacher_folder))):
        model = load_model(str(where), "cpu", config_from=configs)
        drawn.append(sampler.sample(model.field, model.encode(["a red star"]), model.encode([""]), noise))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn[2], drawn[0], rtol=1e-5, atol=1e-5)


def test_a_file_of_the_unet_alone_takes_the_rest_from_the_folder(lone: Path, teacher_folder: Path) -> None:
    whole = pixels(lone, "--config-from", str(teacher_folder))
    settings = read_settings(lone.parent / "sheet.png")["model"]
    kept = {name: value for name, value in load_file(lone).items() if name.startswith("model.")}
    save_file(kept, lone.parent / "unet-flow.safetensors", {"sollune.prediction": "velocity", **FLOW})
    assert_same(pixels(lone.parent / "unet-flow.safetensors", "--config-from", str(teacher_folder)), whole)
    assert settings["modelspec.hash_sha256"].startswith("0x")


FLOW = {"sollune.path": "linear", "sollune.time_scale": "1000", "sollune.shift": "1"}


def test_of_a_file_without_our_metadata_the_folders_scheduler_decides(
    nameless: Path, run_folder: Path, teacher_folder: Path
) -> None:
    as_flow = load_model(str(nameless), "cpu", config_from=str(run_folder / "export"))
    as_noise = load_model(str(nameless), "cpu", config_from=str(teacher_folder))
    assert supported_solvers(as_flow.field) == ("euler", "heun", "unipc")
    assert supported_solvers(as_noise.field) == ("euler", "ddim")


def test_a_v_prediction_run_and_its_export_are_the_same_field(
    student: Student, teacher: Teacher, teacher_folder: Path, run_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "distill"
    shutil.copytree(run_folder / "checkpoints", run / "checkpoints")
    origin = Origin.open(run_folder)
    Origin(origin.teacher, origin.teacher_sha256, "faithful", origin.recipe_sha256, "vp_v").save(run)
    speaking = Student(student.unet, make_vp_bridge("vp_v", teacher.components.schedule, "faithful"))
    folder = export_diffusers(
        speaking, teacher_folder, run / "export", {"tail": "faithful"}, ExportOptions(dtype="float32")
    )
    for solver in ("heun", "ddim"):
        assert_same(pixels(run, "--solver", solver), pixels(folder, "--solver", solver))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "which model"),
        (("RUN",), "no sentence"),
        (("RUN", "a star", "--checkpoint", "65"), "there are 64"),
        (("RUN", "a star", "--solver", "ddim"), "no discrete steps - use euler or heun or unipc"),
        (("RUN", "a star", "--seeds"), "--seeds: needs a value"),
        (("RUN", "a star", "--device", "cuda:99"), "cuda:99"),
        (("RUN", "a star", "--device", "bogus"), "bogus"),
        (("RUN", "a star", "--out", "a.jpg"), r"ends in \.png"),
        (("RUN", "a star", "--config-from", "TEACHER"), "no single file"),
        (("RUN", "a star", "--prompts", "missing.txt"), "missing.txt"),
        (("RUN", "a star", "--guidance", "inf"), "guidance = inf: should be a finite number"),
        (("RUN", "a star", "--guidance", "nan"), "guidance = nan: should be"),
        (("RUN", "a star", "--shift", "inf"), "shift = inf: should be a finite number"),
        (("RUN", "a star", "--steps", "2", "--shift", "1e-320"), "not finite"),
        (("RUN", " "), "empty sentence"),
        (("RUN", "a \x07"), r"U\+0007"),
        (("RUN", "a star", "--negative", "a \x07"), r"U\+0007"),
        (("~no-such-user/run", "a star"), "no user 'no-such-user'"),
        (("ABOVE", "a star"), "name .*distill"),
        (("nowhere/to/be/found", "a star"), "neither a run"),
        (("TEACHER", "a star", "--solver", "heun"), "use euler or ddim"),
        (("TEACHER", "a star", "--solver", "unipc"), "use euler or ddim"),
        (("TEACHER", "a star", "--solver", "ddim", "--shift", "2"), "own steps"),
        (("TEACHER", "a star", "--checkpoint", "64"), "no run folder"),
        (("nowhere.safetensors", "a star"), "no such file"),
        (("LONE", "a star"), "keep the export's diffusers/ beside it"),
        (("NAMELESS", "a star"), "--config-from"),
        (("WEIGHTS", "a star", "--config-from", "TEACHER"), "no UNet in the LDM layout"),
    ],
)
def test_sample_command_refuses_in_one_line(
    words: tuple[str, ...], expected: str, run_folder: Path, teacher_folder: Path, lone: Path, nameless: Path
) -> None:
    weights = run_folder / "checkpoints" / "000000064" / "ema.safetensors"
    places = {"RUN": run_folder, "ABOVE": run_folder.parent, "TEACHER": teacher_folder, "WEIGHTS": weights}
    places |= {"LONE": lone, "NAMELESS": nameless}
    with pytest.raises(Refused, match=expected) as refusal:
        main([str(places.get(word, word)) for word in words])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("a hole", "lacks tensors"),
        ("another size", "not of the sizes"),
        ("epsilon in the metadata", "its metadata say prediction epsilon"),
        ("v_prediction in the metadata", "sollune.prediction is v_prediction"),
        ("cut", "cannot be read"),
        ("another ending", "prediction_type is .flow_prediction."),
    ],
)
def test_a_file_that_would_sample_noise_is_refused(fault: str, expected: str, lone: Path, run_folder: Path) -> None:
    tensors, settings, out = load_file(lone), {"format": "pt"}, "model.diffusion_model.out.2.weight"
    match fault:
        case "a hole":
            del tensors[out]
        case "another size":
            tensors[out] = torch.zeros(4, 8, 3, 3)
        case "epsilon in the metadata":
            settings["modelspec.prediction_type"] = "epsilon"
        case "v_prediction in the metadata":
            settings["sollune.prediction"] = "v_prediction"
    save_file(tensors, lone, settings)
    if fault == "cut":
        lone.write_bytes(lone.read_bytes()[:5000])
    where = lone.rename(lone.with_suffix(".ckpt")) if fault == "another ending" else lone
    with pytest.raises(Refused, match=expected) as refusal:
        load_model(str(where), "cpu", config_from=str(run_folder / "export"))
    assert "\n" not in str(refusal.value)
