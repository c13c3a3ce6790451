"""`sollune evaluate` with distances: columns of the run and of folders, and samples that are stored and used again."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from stages.evaluate import stored
from stages.evaluate.distances.coco import PUBLISHED
from stages.evaluate.distances.columns import PictureSet, make_column, unit_of
from stages.evaluate.distances.folders import open_picture_folder
from stages.evaluate.measure import evaluate, main
from stages.evaluate.paired import PairedInputs
from stages.evaluate.recorded_prompts import distinct_texts
from stages.evaluate.report import Evaluation
from stages.evaluate.settings import Config
from stages.evaluate.stored import SampleStore
from stages.nets.teacher import Teacher
from stages.prompts import FileSource, derived_seed
from stages.sampling.fields import TwoBranchField, student_field, teacher_field
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler
from stages.tiny.score import features
from tests.evaluate.test_evaluate import SENTENCES, bright

FEATURES = "stages.tiny.score.features"
COUNT = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    path = tmp_path_factory.mktemp("source") / "prompts.txt"
    path.write_text("\n".join(f"{sentence} {place}" for place in ("", "again", "alone") for sentence in SENTENCES))
    return FileSource(path=path)


@pytest.fixture(scope="module")
def run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that this module's evaluations may write into."""
    return Path(shutil.copytree(run_folder.parent, tmp_path_factory.mktemp("own") / "runs")) / run_folder.name


def config_of(run: Path, source: FileSource, **settings: Any) -> Config:
    paired = {
        "prompts": COUNT,
        "steps": (1, 2),
        "reference_steps": 3,
        "controls": False,
        "sampler": {"guidance": 3.0, "batch_size": 4},
    }
    return Config.model_validate(
        {"run": run, "prompts": source, "velocity_states": 0, "paired": paired, "features": FEATURES, **settings}
    )


@pytest.fixture(scope="module")
def evaluation(run: Path, source: FileSource) -> Evaluation:
    return evaluate(config_of(run, source))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each batch that is sampled."""
    made: list[str] = []
    sample, generate = PairedInputs.sample, stored.generate_latents

    def counted(self: PairedInputs, field: TwoBranchField, sampler: Sampler) -> Tensor:
        made.append("latents")
        return sample(self, field, sampler)

    def counted_pictures(*arguments: Any) -> Tensor:
        made.append("pictures")
        return generate(*arguments)

    monkeypatch.setattr(PairedInputs, "sample", counted)
    monkeypatch.setattr(stored, "generate_latents", counted_pictures)
    return made


def save_png(picture: Tensor, path: Path) -> None:
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    Image.fromarray(pixels.numpy()).save(path)


def pictures_of(run: Path, source: FileSource, teacher: Teacher, student: Any, steps: int) -> tuple[list[str], Tensor]:
    """What the student of the run draws of the evaluation's prompts."""
    texts, sampler = distinct_texts(source, 1, 500)[:COUNT], Sampler(guidance=3.0, steps=steps)
    inputs = PairedInputs(teacher.encode_texts(texts), teacher.uncond, fixed_noises(1, COUNT, (4, 8, 8)))
    return texts, teacher.decode_latents(inputs.sample(student_field(student), sampler))


def test_columns_are_of_teacher_and_student_at_each_number_of_steps(evaluation: Evaluation) -> None:
    measured = evaluation.distances
    assert measured is not None
    assert {name: [one.steps for one in columns] for name, columns in measured.columns.items()} == {
        "teacher": [1, 2, 3],
        "student": [1, 2],
    }
    assert measured.floor is not None
    assert measured.floor.pictures == COUNT
    assert measured.floor.frechet.mean <= measured.floor.frechet.limit
    assert len(measured.prompts) == COUNT
    assert evaluation.straightness is not None
    assert evaluation.straightness.steps == {"teacher": 3, "student": 3}
    assert all(value > 0 for value in evaluation.straightness.relative.values())


def test_without_the_new_options_the_figures_are_those_of_before(
    evaluation: Evaluation, run_folder: Path, source: FileSource, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_folder.parent, tmp_path / "runs")) / run_folder.name
    plain = evaluate(config_of(run, source, features=None))
    assert plain.distances is None
    assert plain.paired == evaluation.paired


@pytest.mark.usefixtures("evaluation")
def test_a_second_evaluation_samples_nothing_and_gives_the_same(
    evaluation: Evaluation, run: Path, source: FileSource, calls: list[str]
) -> None:
    assert evaluate(config_of(run, source)) == evaluation
    assert calls == []


def test_pictures_of_the_scorer_are_sampled_once_too(run: Path, source: FileSource, calls: list[str]) -> None:
    settings = {"scorer": bright, "fidelity": {"prompts": 3, "control_prompts": 2, "steps": 2}}
    first = evaluate(config_of(run, source, **settings))
    assert calls.count("pictures") == 3
    calls.clear()
    assert evaluate(config_of(run, source, **settings)).fidelity == first.fidelity
    assert calls == []


def test_an_evaluation_that_was_ended_goes_on_where_it_was_and_a_damaged_file_is_sampled_again(
    evaluation: Evaluation,
    run_folder: Path,
    source: FileSource,
    tmp_path: Path,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Path(shutil.copytree(run_folder.parent, tmp_path / "runs")) / run_folder.name
    get, most = SampleStore.get, 5

    def ended(self: SampleStore, key: Any, make: Callable[[], Any]) -> Any:
        if len(calls) == most:
            raise KeyboardInterrupt
        return get(self, key, make)

    monkeypatch.setattr(SampleStore, "get", ended)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config_of(run, source))
    monkeypatch.setattr(SampleStore, "get", get)
    files = sorted((run / "evaluation").iterdir())
    assert len(files) == most
    files[0].write_bytes(files[0].read_bytes()[:-50])
    result = evaluate(config_of(run, source))
    assert result.paired == evaluation.paired
    assert len(calls) == len(list((run / "evaluation").iterdir())) + 1
    assert not (run / "evaluation.json").exists()  # which the command writes last


@pytest.mark.parametrize("change", ["prompts", "sampler", "seed", "weights"])
def test_samples_of_something_else_are_not_used(
    evaluation: Evaluation, run: Path, source: FileSource, tmp_path: Path, calls: list[str], change: str
) -> None:
    copy = Path(shutil.copytree(run.parent, tmp_path / "runs")) / run.name
    settings: dict[str, Any] = {"features": None}
    if change == "weights":
        from safetensors.torch import save_file

        weights = copy / "checkpoints" / "000000064" / "ema.safetensors"
        save_file({name: value * 1.01 for name, value in load_file(weights).items()}, weights)
    elif change == "prompts":
        settings["prompts"] = {"source": "file", "path": tmp_path / "other.txt"}
        (tmp_path / "other.txt").write_text(source.path.read_text().replace("a ", "one "))
    elif change == "seed":
        settings["seed"] = 2
    else:
        paired = config_of(copy, source).paired.model_dump()
        settings["paired"] = {**paired, "sampler": {**paired["sampler"], "guidance": 2.0}}
    result = evaluate(config_of(copy, source, **settings))
    assert result.paired["student"] != evaluation.paired["student"]
    assert calls


@pytest.mark.parametrize("kind", ["names", "json", "entries", "csv"])
def test_a_folder_of_pictures_is_measured_as_its_files_show_them(
    run: Path, source: FileSource, teacher: Teacher, student: Any, tmp_path: Path, kind: str
) -> None:
    texts, drawn = pictures_of(run, source, teacher, student, 2)
    folder = tmp_path / "another model"
    folder.mkdir()
    names = [f"{text.replace(' ', '_')}.png" if kind == "names" else f"{9 - i}.png" for i, text in enumerate(texts)]
    for name, picture in zip(names, drawn, strict=True):
        save_png(picture, folder / name)
    entries = [{"file": name, "prompt": text} for name, text in zip(names, texts, strict=True)]
    if kind == "json":
        (folder / "prompts.json").write_text(json.dumps(dict(zip(names, texts, strict=True))))
    elif kind == "entries":
        (folder / "prompts.json").write_text(json.dumps(entries))
    elif kind == "csv":
        rows = [f'{one["file"]},"{one["prompt"]}"' for one in entries]
        (folder / "prompts.csv").write_text("\n".join(["file,prompt", *rows]))
    measured = evaluate(config_of(run, source, pictures=(folder,))).distances
    assert measured is not None
    (column,) = measured.columns["another model"]
    assert (column.pictures, column.steps, column.floor) == (COUNT, None, None)
    noise = fixed_noises(derived_seed("other noise", 1), COUNT, (4, 8, 8))
    task = PairedInputs(teacher.encode_texts(texts), teacher.uncond, noise)
    real = teacher.decode_latents(task.sample(teacher_field(teacher), Sampler(guidance=3.0, steps=3)))
    rounded = (drawn.clamp(0, 1) * 255).round() / 255
    sets = [PictureSet(COUNT, features(pictures).double()) for pictures in (rounded, real)]
    unit = unit_of(sets[1], FEATURES)
    expected = make_column(*(one.in_units(unit) for one in sets))
    assert column.frechet == pytest.approx(expected.frechet, rel=0.01)
    assert column.kid == pytest.approx(expected.kid, rel=0.01, abs=0.01)


def test_a_folder_of_some_of_the_prompts_has_a_floor_of_its_own_and_is_judged_as_a_whole(
    run: Path, source: FileSource, teacher: Teacher, student: Any, tmp_path: Path
) -> None:
    texts, drawn = pictures_of(run, source, teacher, student, 2)
    for text, picture in zip([*texts[1:5], "a sentence of another list"], drawn[1:6], strict=True):
        save_png(picture, tmp_path / f"{text}.png")
    settings = {"scorer": bright, "fidelity": {"prompts": 3, "control_prompts": 2, "steps": 2}}
    result = evaluate(config_of(run, source, pictures=(tmp_path,), **settings))
    assert result.distances is not None
    (column,) = result.distances.columns[tmp_path.name]
    assert column.pictures == 4
    assert column.floor is not None
    assert column.floor.pictures == 4
    assert result.fidelity[tmp_path.name].pictures == 5


def test_pictures_of_one_prompt_are_taken_in_their_order(tmp_path: Path) -> None:
    for name in "abcd":
        save_png(torch.zeros(3, 4, 4), tmp_path / f"{name}.png")
    prompts = {"a.png": "x", "b.png": "y", "c.png": " x ", "d.png": "x"}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    assert open_picture_folder(tmp_path, "f").rows_of(["x", "z", "x", "y"]) == ([0, 2, 3], [0, 2, 1])


def test_the_command_prints_and_stores_the_distances(
    run: Path, source: FileSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config_of(run, source).model_dump(mode="json", exclude={"run", "gates", "lora"}, exclude_none=True)
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({"evaluate": content}))
    assert main([str(run), "--config", str(tmp_path / "e.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "Frechet" in printed
    assert "curvature" in printed
    stored_figures = json.loads((run / "evaluation.json").read_text())
    assert stored_figures["distances"]["features"] == FEATURES
    assert stored_figures["distances"]["columns"]["student"][0]["frechet"] >= 0


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, Path]:
    """Eight photographs of noise, with two captions each, the first of which is not the first in the file."""
    photographs, generator = tmp_path / "val2017", torch.Generator().manual_seed(0)
    photographs.mkdir()
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for i in range(8):
        save_png(torch.rand(3, 70 + i, 90, generator=generator), photographs / f"{i:012d}.png")
        images.append({"id": 100 + i, "file_name": f"{i:012d}.png", "height": 70 + i, "width": 90})
        annotations.append({"id": 50 - i, "image_id": 100 + i, "caption": "a second caption"})
        annotations.append({"id": 10 + i, "image_id": 100 + i, "caption": f"a red star  number {i}\n"})
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return captions, photographs


def coco_words(run: Path, coco: Sequence[Path], *more: str) -> list[str]:
    words = [str(run), "--coco.captions", str(coco[0]), "--coco.images", str(coco[1]), "--coco.count", "6"]
    return [*words, "--features", FEATURES, "--coco.sampler.steps", "2", "--coco.sampler.batch-size", "4", *more]


def test_the_coco_protocol_measures_student_and_teacher_against_the_photographs_once(
    run: Path, coco: tuple[Path, Path], calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(coco_words(run, coco)) == 0
    printed = capsys.readouterr().out
    assert "PeRFlow" in printed
    assert "22.97" in printed
    result = json.loads((run / "coco.json").read_text())
    columns = result["columns"]
    assert list(columns) == ["photographs", "one half of them against the other", "student", "teacher"]
    assert (columns["student"]["pictures"], columns["student"]["steps"]) == (6, 2)
    assert columns["student"]["frechet"] > 0
    assert len(result["published"]) == len(PUBLISHED)
    assert len(calls) == 4  # two models, two batches
    calls.clear()
    assert main(coco_words(run, coco)) == 0
    assert calls == []
    assert json.loads((run / "coco.json").read_text())["columns"] == columns


def test_photographs_as_a_column_have_no_distance_to_themselves(
    run: Path, coco: tuple[Path, Path], tmp_path: Path
) -> None:
    copies = Path(shutil.copytree(coco[1], tmp_path / "copies"))
    prompts = {f"{i:012d}.png": f"a red star number {i}" for i in range(8)}
    (copies / "prompts.json").write_text(json.dumps(prompts))
    assert main(coco_words(run, coco, "--pictures", str(copies))) == 0
    column = json.loads((run / "coco.json").read_text())["columns"]["copies"]
    assert column["pictures"] == 6
    assert column["frechet"] == pytest.approx(0, abs=1e-2)


def test_judge_features_are_what_the_judge_answers_from() -> None:
    from stages.tiny.score import load_classifier

    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    net = load_classifier()
    torch.testing.assert_close(net.head(features(pictures)), torch.cat(net(pictures * 2 - 1), 1))
