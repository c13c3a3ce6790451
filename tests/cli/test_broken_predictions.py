"""Teachers whose files state another prediction than their network's, and doctor's refusals, by the real command."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from stages import __main__ as cli
from tests.cli.conftest import TEACHER
from tests.cli.test_broken_teachers import Break, caching, content, cut, removed, setting, without
from tests.v_teachers import label

LABEL = "scheduler/scheduler_config.json"
V = setting(LABEL, prediction_type="v_prediction")
V_ZERO = setting(LABEL, prediction_type="v_prediction", rescale_betas_zero_snr=True)
IMPOSSIBLE = setting(LABEL, rescale_betas_zero_snr=True)
SETTLED = "--teacher.prediction epsilon --teacher.zero-terminal-snr false"
STATED: dict[str, tuple[Break, list[str], list[str]]] = {
    "labelled v": (V, [], ["prediction_type v_prediction", "answers as epsilon", "deviate", SETTLED]),
    "labelled v without signal": (V_ZERO, [], ["prediction_type v_prediction", "answers as epsilon", SETTLED]),
    "labelled epsilon without signal": (IMPOSSIBLE, [], ["rescale_betas_zero_snr", "v_prediction"]),
    "labelled sample": (setting(LABEL, prediction_type="sample"), [], ["prediction_type", "sample"]),
    "epsilon without signal by choice": (
        removed(), ["--teacher.prediction", "epsilon", "--teacher.zero-terminal-snr", "true"],
        ["rescale_betas_zero_snr", "epsilon"],
    ),
    "an unknown choice": (removed(), ["--teacher.prediction", "flow"], ["teacher.prediction", "flow", "v_prediction"]),
    "no truth": (removed(), ["--teacher.zero-terminal-snr", "maybe"], ["teacher.zero_terminal_snr", "maybe", "true"]),
}  # fmt: skip
Refusal = Callable[..., str]


@pytest.mark.parametrize("command", ["cache-teacher", "doctor"])
@pytest.mark.parametrize("name", STATED)
def test_a_prediction_that_cannot_be_is_refused_with_the_way_out(
    command: str, name: str, refused: Refusal, teacher: Path, tmp_path: Path
) -> None:
    broken, options, named = STATED[name]
    broken(teacher)
    words = caching(tmp_path / "run", teacher) if command == "cache-teacher" else ["doctor", str(teacher), *QUICK]
    refused([*words, *options], *named)


def test_a_v_teacher_is_refused_as_epsilon_before_an_import_too(
    refused: Refusal, teachers_by_prediction: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(teachers_by_prediction["v"], tmp_path / "v")
    label(folder, "epsilon")
    named = ["prediction_type epsilon", "answers as v_prediction", "--teacher.prediction v_prediction"]
    refused(caching(tmp_path / "run", folder), *named)


QUICK = ["--sampler.steps", "2"]
DOCTOR: dict[str, tuple[list[str], list[str]]] = {
    "no teacher": ([], ["which teacher", "sollune doctor TEACHER"]),
    "nothing there": (["no/such/teacher"], ["no/such/teacher", "neither"]),
    "an unknown option": ([str(TEACHER), "--teacher.vea", "x"], ["--teacher.vea", "--teacher.vae"]),
    "a size that it has not": (
        [str(TEACHER), *QUICK, "--render.sizes", "[{size: 64x67, share: 1}]"], ["render.sizes", "64x67", "64x64"],
    ),
    "no size": (
        [str(TEACHER), "--render.sizes", "[{size: large, share: 1}]"], ["render.sizes", "large", "WIDTHxHEIGHT"],
    ),
    "a picture of another kind": ([str(TEACHER), "--out", "page.jpg"], ["--out page.jpg", ".png"]),
    "no device": ([str(TEACHER), "--device", "cuda:77"], ["cuda:77"]),
    "an empty sentence": ([str(TEACHER), "--sentence", " "], ["doctor.sentence"]),
    "no step": ([str(TEACHER), "--sampler.steps", "0"], ["doctor.sampler.steps"]),
    "an unknown autoencoder": ([str(TEACHER), "--teacher.vae", "no/such"], ["no/such"]),
    "a file of another section": ([str(TEACHER), "--config", "configs/classes/tiny.yaml"], ["classes"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCTOR)
def test_doctor_refuses_what_it_cannot_look_at(name: str, refused: Refusal) -> None:
    words, named = DOCTOR[name]
    refused(["doctor", *words], *named)


CONV_IN = "conv_in.weight"
BROKEN: dict[str, tuple[list[Break], list[list[str]]]] = {
    "a missing tensor": ([without("unet", CONV_IN)], [["unet", "1 tensor missing", CONV_IN]]),
    "a UNet and an autoencoder": ([without("unet", CONV_IN), cut("vae")], [["unet", CONV_IN], ["vae"]]),
    "a schedule and a tokenizer": (
        [setting(LABEL, beta_schedule="sine"), removed("tokenizer/tokenizer.json", "tokenizer/vocab.json")],
        [["beta_schedule", "sine"], ["tokenizer"]],
    ),
    "no JSON": ([content(LABEL, "{")], [["scheduler_config.json"]]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_doctor_lists_everything_that_is_broken(
    name: str, teacher: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    breaks, expected = BROKEN[name]
    for broken in breaks:
        broken(teacher)
    assert cli.main(["doctor", str(teacher), *QUICK]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == len(expected), printed.err
    for named in expected:
        assert any(all(word in line for word in named) for line in lines), printed.err
    assert "Traceback" not in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_an_override_of_a_wrong_label_is_taken_to_the_cache(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    V_ZERO(teacher)
    words = [*caching(tmp_path / "run", teacher), *SETTLED.split()]
    assert cli.main(words) == 0, capsys.readouterr().err
    manifest = json.loads((tmp_path / "run/cache/manifest.json").read_text())
    assert manifest["recipe"]["information"]["teacher_source"]["prediction"] == "epsilon"
    assert cli.main(["shards", "verify", str(tmp_path / "run/cache"), "--deep"]) == 0
