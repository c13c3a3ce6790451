"""`sollune evaluate` by picture size: the paired errors of each, the gates of the native one, and the report."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from configs.values import PictureSize
from shards.reader import Reader
from shards.writer import CacheWriter
from stages.cache.fill import fill, tasks_of
from stages.cache.sizes import RenderSizes, SizeShare
from stages.cache.targets import RenderConfig, StatesConfig, make_records, recipe_of
from stages.evaluate.measure import evaluate, main
from stages.evaluate.metrics import refuse_blind_scorer
from stages.evaluate.paired import PairedInputs, make_reference, paired_error
from stages.evaluate.recorded_prompts import distinct_texts
from stages.evaluate.report import Gates, check_gates, print_report, to_json
from stages.evaluate.settings import Config
from stages.export.history import model_index_results
from stages.export.tables import metric_tables
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import FileSource, Prompt, derived_seed
from stages.sampling.fields import student_field, teacher_field
from stages.sampling.grids import fixed_noises
from stages.system.refusal import Refused
from stages.tiny.score import score

SENTENCES = [
    f"a {colour} {shape} at the {place}"
    for colour in ("red", "blue", "green", "pink")
    for shape in ("star", "ring", "moon", "heart")
    for place in ("left", "right", "top")
]
PAIRED = {"prompts": 2, "steps": [1, 2], "reference_steps": 4}


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(SENTENCES))
    return FileSource(path=path)


@pytest.fixture
def sized_run(run_folder: Path, tmp_path: Path) -> Path:
    """The run as one that learnt three sizes, of which the native one is not the most frequent."""
    run = Path(shutil.copytree(run_folder.parent, tmp_path / "runs")) / run_folder.name
    return with_sizes(run, ["64x96", "64x64", "96x64"])


def with_sizes(run: Path, sizes: Sequence[str]) -> Path:
    origin = json.loads((run / "origin.json").read_text())
    (run / "origin.json").write_text(json.dumps({**origin, "sizes": list(sizes)}))
    return run


def config_of(run: Path, source: FileSource, sizes: Sequence[str] = (), **settings: object) -> Config:
    values: Mapping[str, Any] = {"run": run, "prompts": source, "velocity_states": 0, **settings}
    return Config.model_validate({**values, "paired": {**PAIRED, "sizes": tuple(sizes)}})


def test_each_learnt_size_is_measured_with_noises_floor_and_ceiling_of_its_own(
    sized_run: Path, source: FileSource, teacher: Teacher, student: Student
) -> None:
    result = evaluate(config_of(sized_run, source))
    assert list(result.by_size) == ["64x96", "64x64", "96x64"]
    assert result.size == "64x64"
    assert result.by_size["64x64"].paired == result.paired["student"]
    assert list(result.paired) == ["student", "undistilled graft", "undistilled copy", "wrong prompts"]
    texts, seed = distinct_texts(source, 1, 2), 1
    for text, errors in result.by_size.items():
        shape = teacher.components.latent_shape(PictureSize.parse(text))
        noise, other = (fixed_noises(one, 2, shape) for one in (seed, derived_seed("other noise", seed)))
        inputs = PairedInputs(teacher.encode_texts(texts), teacher.uncond, noise)
        sampler = config_of(sized_run, source).paired.sampler
        reference = make_reference(teacher_field(teacher), inputs, other, sampler, [1, 2], 4)
        for error in errors.paired:
            expected = paired_error(student_field(student), reference, error.steps)
            assert error.student == pytest.approx(expected.student, rel=1e-4)
            assert (error.floor, error.ceiling) == pytest.approx((expected.floor, expected.ceiling), rel=1e-4)
    assert len({errors.paired[0].ceiling for errors in result.by_size.values()}) == 3


def test_a_run_without_sizes_is_measured_as_before(run_folder: Path, source: FileSource) -> None:
    result, named = (evaluate(config_of(run_folder, source, sizes)) for sizes in ((), ("64x64",)))
    assert result.paired == named.paired
    assert result.by_size == named.by_size == {}
    assert metric_tables(json.loads(to_json(result, []))).count("**") == 2  # the one title


def test_sizes_that_were_not_learnt_may_be_measured(run_folder: Path, source: FileSource) -> None:
    result = evaluate(config_of(run_folder, source, ["64x64", "80x80"]))
    assert list(result.by_size) == ["64x64", "80x80"]
    alone = evaluate(config_of(run_folder, source, ["80x80"]))
    assert (alone.size, alone.by_size) == ("80x80", {})
    assert alone.paired["student"] == pytest.approx(result.by_size["80x80"].paired)


def test_gates_are_those_of_the_native_size_whatever_is_measured_beside_it(sized_run: Path, source: FileSource) -> None:
    native = evaluate(config_of(sized_run, source, ["64x64"]))
    all_sizes = evaluate(config_of(sized_run, source))
    gates = Gates(score={1: 0.5, 2: 0.5})
    assert check_gates(native, gates) == check_gates(all_sizes, gates)


def test_the_report_tells_each_size_and_readers_of_before_find_what_they_read(
    sized_run: Path, source: FileSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"prompts": {"source": "file", "path": str(source.path)}, "velocity_states": 0, "paired": PAIRED}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump({"evaluate": settings}))
    assert main([str(sized_run), "--config", str(tmp_path / "evaluate.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "paired-noise error at 64x64" in printed
    assert "of the student by size" in printed
    assert "64x96" in printed
    stored = json.loads((sized_run / "evaluation.json").read_text())
    assert stored["paired"]["student"] == stored["by_size"]["64x64"]["paired"]
    tables = metric_tables(stored)
    assert "The student at each picture size" in tables
    assert "| 96x64 |" in tables
    names = [one.metric_name for one in model_index_results(stored)]
    assert names == [
        "paired-noise score at 1 steps",
        "paired-noise score at 2 steps",
        *(f"paired-noise score at {n} steps, {size}" for size in ("64x96", "96x64") for n in (1, 2)),
    ]
    before = {key: value for key, value in stored.items() if key not in ("size", "by_size")}
    assert "each picture size" not in metric_tables(before)
    assert [one.metric_name for one in model_index_results(before)] == names[:2]


def test_velocity_errors_are_told_of_each_size_of_the_cache(
    sized_run: Path, source: FileSource, teacher: Teacher, student: Student, capsys: pytest.CaptureFixture[str]
) -> None:
    states = StatesConfig(steps=3, trajectory_states=2, renoised_states=1)
    sizes = tuple(SizeShare(size=size, share=share) for size, share in (("64x96", 3), ("64x64", 2), ("96x64", 1)))
    render, drawn = RenderConfig(states=states, sizes=sizes), RenderSizes(PictureSize(64, 64), sizes)
    held_out = [Prompt(text, "shape/star", seed) for seed, text in enumerate(SENTENCES[:12])]
    shutil.rmtree(sized_run.parent / "cache")
    writer = CacheWriter(sized_run.parent / "cache", recipe_of(teacher, render, {"source": "test"}))
    tasks = tasks_of({"validation": held_out}, 4, 4, drawn)
    fill(writer, tasks, lambda of, keys, size: make_records(teacher, of, keys, states, size), show_progress=False)
    result = evaluate(config_of(sized_run, source, velocity_states=36))
    assert result.velocity is not None
    assert result.velocity.states == 36
    sums: dict[str, list[float]] = {}
    for record in Reader(sized_run.parent / "cache", "validation").records():
        of = record.states
        cond = record.cond.float().expand(3, -1, -1)
        output = student(of.x_s.float(), of.s, cond, teacher.uncond)
        own = sums.setdefault(str(record.size), [0.0, 0.0])
        for v, v_star in ((output.v_cond, of.v_cond), (output.v_uncond, of.v_uncond)):
            own[0] += float((v - v_star.float()).double().square().sum())
            own[1] += float(v_star.double().square().sum())
    expected = {size: error / target for size, (error, target) in sums.items()}
    assert len(expected) == 3
    assert {size: errors.velocity for size, errors in result.by_size.items()} == pytest.approx(expected, rel=1e-3)
    stored = json.loads(to_json(result, []))
    assert stored["velocity"].keys() == {"velocity", "guidance", "states"}
    assert {size: errors["velocity"] for size, errors in stored["by_size"].items()} == pytest.approx(expected, rel=1e-3)
    print_report(result, [], Console(width=200))
    assert "velocity at 96x64" in capsys.readouterr().out
    assert "velocity error |" in metric_tables(stored)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (["60x64"], "paired.sizes: 60x64: sides of this model are multiples of 8 pixels - take 64x64 or 56x64"),
        (["64x64", "512x768"], "paired.sizes: 512x768: .* up to 256 pixels - take 256x256"),
    ],
)
def test_a_size_that_the_model_has_not_is_refused_before_anything_is_measured(
    run_folder: Path, source: FileSource, sizes: list[str], reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        evaluate(config_of(run_folder, source, sizes))


def test_a_size_named_twice_is_refused(run_folder: Path, source: FileSource) -> None:
    with pytest.raises(ValueError, match="64x96 stands there more than once"):
        config_of(run_folder, source, ["64x96", "64x64", "64x96"])


def test_a_scorer_that_knows_no_such_pictures_is_refused() -> None:
    refuse_blind_scorer(score, "a red star", PictureSize(64, 64), "hint")
    with pytest.raises(Refused, match="scorer: it judges no picture of 64x96 - hint"):
        refuse_blind_scorer(score, "a red star", PictureSize(64, 96), "hint")
    scores = score(["a red star"] * 2, torch.zeros(2, 3, 96, 64))
    assert all(value.isnan().all() and value.shape == (2,) for value in scores.values())
