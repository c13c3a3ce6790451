"""Laws of `sollune classes show`: the plan of a class file and its cost."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from stages.classes.class_plan import training_time_text
from stages.classes.classes_command import main
from stages.system.refusal import Refused


def test_show_prints_pictures_samples_and_the_records_in_the_cache(
    distill_folder: Path, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(
        "classes:\n- {name: stars, pattern: shape/star, priority: top}\n- {name: rest, pattern: '*', priority: low}\n"
    )
    options = ["show", str(file), "--config", str(config_file), "--run", str(distill_folder.parent)]
    options += ["--train.max-samples", "96", "--train.batch-size", "10", "--prior-share", "0.3"]
    as_cached = {"steps": 3, "trajectory-states": 2, "renoised-states": 1}
    same_states = [part for name, value in as_cached.items() for part in (f"--render.states.{name}", str(value))]
    assert main([*options, *same_states]) == 0
    lines = capsys.readouterr().out.splitlines()
    stars = next(line.split() for line in lines if line.strip().startswith("stars"))
    # 10 batches of 7 rows of the classes, 4/5 of them stars; 10 of 12 pictures of 3 states each.
    assert stars == ["stars", "shape/star", "top", "4", "80.0", "10", "56.0", "1.87", "10", "1"]
    # The cache has one star and one of the rest, which are reused.
    assert any("10 of 10 pictures (30 states" in line for line in lines)
    assert any("100 samples, 70 of them" in line for line in lines)
    assert main(options) == 0  # of other states, so nothing is reused
    assert "12 of 12 pictures (72 states" in capsys.readouterr().out
    assert not any("none of the records" in line for line in lines)


def test_show_prints_a_class_that_the_student_never_learnt(
    distill_folder: Path, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text("classes:\n- {name: moons, pattern: shape/moon, priority: top}\n")
    with open(tmp_path / "prompts.txt", "a") as sentences:
        sentences.write("\nshape/moon\ta moon\n")
    assert main(["show", str(file), "--config", str(config_file), "--run", str(distill_folder.parent)]) == 0
    assert "class 'moons': none of the records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entries", "more", "reason"),
    [
        ("{name: a, pattern: shape/*, priority: top}", ["--count", "0"], "count = 0"),
        ("{name: a, pattern: shape/*, priority: top, pictures: 5}", ["--count", "4"], "ask for 5 pictures"),
        ("{name: a, pattern: shape/*, priority: top}, {name: b, pattern: '*/star', priority: low}", [], "both claim"),
        ("{name: a, pattern: 'sh*', priority: top, prior_class: cat/*}", [], "prior_class cat/\\* fits no record"),
    ],
)
def test_show_refuses_an_impossible_plan_in_one_line(
    distill_folder: Path, config_file: Path, tmp_path: Path, entries: str, more: Sequence[str], reason: str
) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(f"classes: [{entries}]\n")
    with pytest.raises(Refused, match=reason) as refusal:
        main(["show", str(file), "--config", str(config_file), "--run", str(distill_folder.parent), *more])
    assert "\n" not in str(refusal.value)


def test_the_time_to_train_follows_from_the_lines_about_training_alone(tmp_path):
    (tmp_path / "distill").mkdir()
    lines = [
        {"samples": 640, "samples_per_second": 10.0},
        {"samples": 640, "kind": "validation", "held_out": 0.1},
        {"samples": 1280, "samples_per_second": 30.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"samp'
    (tmp_path / "distill" / "journal.jsonl").write_text(text)
    assert training_time_text(tmp_path, 1200).startswith("1.0 minutes to train at the 20 samples/s")
    assert "unknown" in training_time_text(None, 1200)
