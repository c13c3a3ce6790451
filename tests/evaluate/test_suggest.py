"""Laws of `sollune classes suggest` and `show`."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml

from shards.table import write_table
from stages.classes import load_classes
from stages.classes.cached import CacheErrors, spread_evenly
from stages.classes.command import main
from stages.classes.difficulty import (
    ClassMeans,
    Estimate,
    ProbeErrors,
    assign_priority,
    probe_classes,
    rank_classes,
    relative_error_shares,
)
from stages.classes.suggestion import group_by_level
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.sampling.sampler import Sampler
from stages.system.refusal import Refused

SENTENCES = [
    f"shape/{shape}\ta {size} {colour} {shape} at the {place}"
    for shape in ("star", "ring")
    for size in ("small", "large")
    for colour in ("red", "blue", "green", "pink", "brown", "lime")
    for place in ("left", "right", "top", "bottom", "middle")
]
FEW = ["--probe", "2", "--records", "2", "--sampler.steps", "1"]


@pytest.fixture(scope="module")
def run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose cache has its table, and that tells how it was made."""
    runs = tmp_path_factory.mktemp("suggest")
    shutil.copytree(run_folder.parent, runs, dirs_exist_ok=True)
    write_table(runs / "cache")
    (runs / "distill" / "config.yaml").write_text("distill: {}\n")
    return runs / "distill"


@pytest.fixture
def section(tmp_path: Path) -> Path:
    """A configuration whose sentences are of the run's classes."""
    (tmp_path / "prompts.txt").write_text("\n".join(SENTENCES))
    prompts = {"source": "file", "path": str(tmp_path / "prompts.txt")}
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({"evaluate": {"prompts": prompts}, "finetune_classes": {"prompts": prompts, "count": 12}})
    )
    return path


def test_a_suggestion_is_a_class_file_with_every_class_and_what_was_measured(
    run: Path, section: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "suggested.yaml"
    words = ["suggest", str(run), "--config", str(section), "--level", "2", "--out", str(out), *FEW]
    assert main(words) == 0
    assert sorted(spec.pattern or "" for spec in load_classes(out).classes) == ["shape/ring", "shape/star"]
    assert out.read_text().count("paired error 0.") == 2
    assert "±" in capsys.readouterr().out
    with pytest.raises(Refused, match=r"suggested\.yaml: is there already"):
        main(words)


def test_all_classes_are_probed_with_the_same_noises_and_what_only_the_teacher_shows_is_lost(
    student: Student, teacher: Teacher
) -> None:
    calls = count()

    def content_with_the_teacher(texts: Sequence[str], pictures: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {
            "said": torch.full((len(texts),), 1.0 - next(calls) % 2),
            "unsaid": torch.full((len(texts),), torch.nan),
        }

    prompts = [Prompt("a red star", "star", 1), Prompt("a blue ring", "ring", 2)]
    asked = {"one": prompts, "other": prompts}
    found = probe_classes(student, teacher, asked, 0, Sampler(steps=1, batch_size=4), content_with_the_teacher)
    assert found.paired_errors[0].tolist() == pytest.approx(found.paired_errors[1].tolist(), rel=1e-3)
    assert float(found.paired_errors[0, 0]) != pytest.approx(float(found.paired_errors[0, 1]), rel=1e-3)
    assert found.lost_pictures is not None
    assert found.lost_pictures.tolist() == [[1, 1], [1, 1]]


def test_a_level_with_one_class_is_refused(run: Path, section: Path, tmp_path: Path) -> None:
    words = ["suggest", str(run), "--config", str(section), "--out", str(tmp_path / "x.yaml"), *FEW]
    with pytest.raises(Refused, match=r"--level 1: .* holds one class there, 'shape/\*' - go deeper"):
        main(words)
    assert not (tmp_path / "x.yaml").exists()


def test_a_level_is_a_depth_and_names_are_no_globs() -> None:
    records = {"a/b/c": [2], "a/b/d": [0], "a/e": [1], "f": [3], "g*/h": [4]}
    assert group_by_level(records, 1) == {"a/*": [0, 1, 2], "f": [3], "g[*]/*": [4]}
    assert group_by_level(records, 2) == {"a/b/*": [0, 2], "a/e": [1], "f": [3], "g[*]/h": [4]}


def test_records_are_spread_over_all_there_are() -> None:
    assert spread_evenly(range(10), 3) == [0, 3, 6]
    assert spread_evenly([7, 8], 3) == [7, 8]


def test_parts_of_the_error_average_to_one_and_go_with_need_and_frequency() -> None:
    need = ClassMeans(torch.tensor([0.02, 0.02, 0.04]).double().log(), torch.full((3,), 0.1).double())
    parts, errors = relative_error_shares(need, torch.tensor([1e6, 2e6, 1e6]).double())
    assert float(parts.mean()) == pytest.approx(1)
    assert (parts / parts[0]).tolist() == pytest.approx([1, 2, 2], rel=1e-3)
    assert errors.tolist() == pytest.approx([0.1, 0.1, 0.1], rel=1e-3)


def test_a_difference_in_frequency_that_chance_explains_counts_for_nothing() -> None:
    need = ClassMeans(torch.zeros(3).double(), torch.zeros(3).double())
    assert relative_error_shares(need, torch.tensor([95.0, 105.0, 100.0]).double())[0].tolist() == pytest.approx(
        [1, 1, 1]
    )


@pytest.mark.parametrize(
    ("part", "error", "lost", "expected"),
    [
        (1.5, 0.3, None, "top"),
        (1.5, 0.5, None, "mid"),
        (0.5, 0.5, None, "low"),
        (0.7, 0.5, None, "mid"),
        (0.5, 0.1, Estimate(0.3, 0.1), "top"),
        (0.5, 0.1, Estimate(0.2, 0.1), "low"),
    ],
)
def test_only_what_stands_out_of_its_error_is_top_or_low(
    part: float, error: float, lost: Estimate | None, expected: str
) -> None:
    assert assign_priority(part, error, lost) == expected


def test_the_worst_class_comes_first_and_equal_ones_are_all_mid() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 40, generator=generator).double()
    names, records = [f"class{i}" for i in range(12)], [1000] * 12
    cached = CacheErrors(list((0.3 * noise[:, :16]).exp()), None)
    worse = noise.clone()
    worse[7] += 2
    first, *others = rank_classes(names, records, ProbeErrors(0.02 * worse.exp(), None), cached)
    assert (first.pattern, first.priority) == ("class7", "top")
    assert first.relative_error_share > 2 * others[0].relative_error_share
    flat = noise - noise.mean(1, keepdim=True)
    assert {need.priority for need in rank_classes(names, records, ProbeErrors(0.02 * flat.exp(), None), cached)} == {
        "mid"
    }


def test_show_tells_pictures_draws_and_what_the_cache_holds(
    run: Path, section: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(
        "classes:\n- {name: stars, pattern: shape/star, priority: top}\n- {name: rest, pattern: '*', priority: low}\n"
    )
    asked = ["show", str(file), "--config", str(section), "--run", str(run.parent)]
    asked += ["--train.max-samples", "96", "--train.batch-size", "10", "--prior-share", "0.3"]
    as_cached = {"steps": 3, "trajectory-states": 2, "renoised-states": 1}
    alike = [word for name, value in as_cached.items() for word in (f"--render.states.{name}", str(value))]
    assert main([*asked, *alike]) == 0
    lines = capsys.readouterr().out.splitlines()
    stars = next(line.split() for line in lines if line.strip().startswith("stars"))
    # 10 batches of 7 rows of the classes, 4/5 of them stars; 10 of 12 pictures of 3 states each.
    assert stars == ["stars", "shape/star", "top", "4", "80.0", "10", "56.0", "1.87", "10", "1"]
    # The cache has one star and one of the rest, which need not be painted again.
    assert any("10 of 10 pictures (30 states" in line for line in lines)
    assert any("100 samples, 70 of them" in line for line in lines)
    assert main(asked) == 0  # of other states, so nothing is taken
    assert "12 of 12 pictures (72 states" in capsys.readouterr().out
    assert not any("none of the records" in line for line in lines)


def test_show_tells_a_class_that_the_student_never_learnt(
    run: Path, section: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text("classes:\n- {name: moons, pattern: shape/moon, priority: top}\n")
    with open(tmp_path / "prompts.txt", "a") as sentences:
        sentences.write("\nshape/moon\ta moon\n")
    assert main(["show", str(file), "--config", str(section), "--run", str(run.parent)]) == 0
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
def test_show_refuses_what_cannot_be_in_one_line(
    run: Path, section: Path, tmp_path: Path, entries: str, more: Sequence[str], reason: str
) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(f"classes: [{entries}]\n")
    with pytest.raises(Refused, match=reason) as refusal:
        main(["show", str(file), "--config", str(section), "--run", str(run.parent), *more])
    assert "\n" not in str(refusal.value)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(Refused, match="classes shwo: unknown command - did you mean show"):
        main(["shwo"])
