import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from stages.evaluate.measure import evaluate, main
from stages.evaluate.recorded_prompts import distinct_texts
from stages.evaluate.report import Gates, check_gates
from stages.evaluate.settings import Config
from stages.prompts import FileSource, split_of
from stages.system.refusal import Refused

SHAPES = [
    f"a {colour} {shape}" for colour in ("red", "blue", "green", "pink") for shape in ("star", "ring", "moon", "heart")
]
SENTENCES = [f"{sentence} at the {place}" for sentence in SHAPES for place in ("left", "right", "top")]


def bright(texts: Sequence[str], pictures: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """A scorer that needs no model."""
    return {"bright": (pictures.mean(dim=(1, 2, 3)) > 0.5).float()}


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(SENTENCES))
    return FileSource(path=path)


def config_file(source: FileSource, folder: Path, gates: Mapping[str, object]) -> Path:
    path = folder / "evaluate.yaml"
    small = {
        "prompts": {"source": "file", "path": str(source.path)},
        "fidelity": {"prompts": 3, "control_prompts": 2, "steps": 2},
        "paired": {"prompts": 2, "steps": [1, 2], "reference_steps": 4},
        "velocity_states": 5,
        "gates": gates,
    }
    path.write_text(yaml.safe_dump({"evaluate": small}))
    return path


def small(run: Path, source: FileSource) -> Config:
    return Config.model_validate(
        {
            "run": run,
            "prompts": source,
            "scorer": bright,
            "fidelity": {"prompts": 3, "control_prompts": 2, "steps": 2},
            "paired": {"prompts": 2, "steps": (1, 2), "reference_steps": 4},
            "velocity_states": 5,
        }
    )


def test_prompts_are_validation_sentences_each_once_and_a_longer_list_begins_with_the_shorter(
    source: FileSource,
) -> None:
    held_out = {text for text in SENTENCES if split_of(text) == "validation"}
    few, all_of_them = distinct_texts(source, 0, 2), distinct_texts(source, 0, len(held_out))
    assert set(all_of_them) == held_out
    assert all_of_them[:2] == few


def test_evaluation_measures_student_and_controls(run_folder: Path, source: FileSource) -> None:
    result = evaluate(small(run_folder, source))
    assert list(result.fidelity) == ["teacher", "student", "student as a noise model"]
    assert [shares.pictures for shares in result.fidelity.values()] == [3, 3, 2]
    assert list(result.paired) == ["student", "undistilled graft", "undistilled copy", "wrong prompts"]
    assert [error.steps for error in result.paired["student"]] == [1, 2]
    assert result.velocity is not None
    assert result.velocity.states == 5
    assert (run_folder / "evaluation.png").is_file()
    assert result.samples == 64


def test_gates_pass_the_student_and_fail_what_does_not_reach_them(run_folder: Path, source: FileSource) -> None:
    result = evaluate(small(run_folder, source).model_copy(update={"scorer": None}))
    assert result.velocity is not None
    error = result.velocity.velocity.overall
    assert all(v.passed for v in check_gates(result, Gates(velocity_error=error)))
    assert [v.passed for v in check_gates(result, Gates(velocity_error=error / 2))] == [False]
    assert check_gates(result, Gates()) == []


def test_a_control_must_fail_the_gate_of_the_student(run_folder: Path, source: FileSource) -> None:
    result = evaluate(small(run_folder, source).model_copy(update={"scorer": None}))
    verdicts = {v.name: v.passed for v in check_gates(result, Gates(score={2: 1e9}))}
    assert verdicts.pop("paired score at 2")
    assert verdicts
    assert not any(verdicts.values())


def test_command_prints_a_table_writes_json_and_reports_a_missed_gate(
    run_folder: Path, source: FileSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run_folder), "--config"]
    assert main([*words, str(config_file(source, tmp_path, {"velocity_error": 1e9}))]) == 0
    assert "PASS" in capsys.readouterr().out
    assert main([*words, str(config_file(source, tmp_path, {"velocity_error": 0.0}))]) == 1
    assert "FAIL" in capsys.readouterr().out
    result = json.loads((run_folder / "evaluation.json").read_text())
    assert [gate["passed"] for gate in result["gates"]] == [False]
    assert result["paired"]["student"][0]["steps"] == 1


def test_an_export_of_other_weights_is_refused(run_folder: Path, source: FileSource, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "distill"
    shutil.copytree(run_folder.parent, tmp_path / "runs")
    checkpoint = run / "checkpoints" / "000000064"
    weights = checkpoint / "ema.safetensors"
    tensors = load_file(weights)
    tensors["unet.conv_in.bias"] += 1
    save_file(tensors, weights)
    with pytest.raises(Refused, match="sollune export"):
        evaluate(small(run, source))


def test_a_teacher_that_changed_since_is_refused(
    run_folder: Path, teacher_folder: Path, source: FileSource, tmp_path: Path
) -> None:
    shutil.copytree(run_folder.parent, tmp_path / "runs")
    shutil.copytree(teacher_folder, tmp_path / "moved")
    origin = tmp_path / "runs" / "distill" / "origin.json"
    origin.write_text(origin.read_text().replace(str(teacher_folder), str(tmp_path / "moved")))
    evaluate_only_velocity = small(origin.parent, source).model_copy(update={"scorer": None})
    scheduler = tmp_path / "moved" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    with pytest.raises(Refused, match="scheduler changed"):
        evaluate(evaluate_only_velocity)
