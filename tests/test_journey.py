"""All commands at a small size: 8 prompts, 3 steps, 2 classes, exports that stock diffusers loads, and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler
from PIL import Image
from safetensors.torch import load_file

from configs.load import load
from shards.manifest import Manifest
from stages import cache_teacher, distill, finetune_classes
from stages.evaluate import david as david_tool
from stages.nets.run_folder import open_run
from stages.system.refusal import Refused
from tests.cache_checks import open_verified

TINY = [Path("configs/tiny.yaml")]
CACHE = ["--count", "8", "--validation-count", "2", "--render.records-per-shard", "4", "--render.states.steps", "4"]
TRAIN = ["--train.max-samples", "11", "--train.batch-size", "4", "--train.checkpoint-every-samples", "8"]  # ends at 12
TRAIN += ["--train.optimizer.warmup-samples", "4"]
DAVID = ["--david.fit.steps", "3", "--david.fit.bins", "10", "--david.fit.patterns", "4"]
CLASSES = """
classes:
  - {name: stars, pattern: star/*, priority: top}
  - {name: rest, pattern: "[!s]*", priority: low}
  - {name: mine, images: IMAGES, caption: a zork, priority: mid}
"""


def cache_config(run: Path, *options: str) -> cache_teacher.Config:
    return load(cache_teacher.Config, "cache_teacher", TINY, ["--run", str(run), *CACHE, *options])


def distill_config(run: Path, *options: str) -> distill.Config:
    few = ["--validation.states", "6", "--grid.sampler.steps", "2"]
    return load(distill.Config, "distill", TINY, ["--run", str(run), *TRAIN, *DAVID, *few, *options])


def classes_config(run: Path, *options: str) -> finetune_classes.Config:
    (run / "images").mkdir(exist_ok=True)
    for name in ("red", "green"):
        Image.new("RGB", (80, 64), name).save(run / "images" / f"{name}.png")
    (run / "input.yaml").write_text(CLASSES.replace("IMAGES", str(run / "images")))
    few = ["--classes", str(run / "input.yaml"), "--count", "5", "--exam.pictures", "2", "--exam.sampler.steps", "2"]
    render = ["--render.records-per-shard", "4", "--render.states.steps", "4", "--gate.score", "0"]  # blurs in 4 steps
    return load(finetune_classes.Config, "finetune_classes", TINY, ["--run", str(run), *TRAIN, *few, *render, *options])


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after all three commands."""
    run = tmp_path_factory.mktemp("runs") / "miniature"
    cache_teacher.run(cache_config(run))
    distill.run(distill_config(run))
    finetune_classes.run(classes_config(run))
    return run


def test_every_command_ends_with_its_mark(journey: Path) -> None:
    assert [(journey / part / "COMPLETE").read_text() for part in ("distill", "classes")] == ["12\n"] * 2
    assert (journey / "cache" / "COMPLETE").is_file()


def test_the_cache_is_whole(journey: Path) -> None:
    manifest = open_verified(journey / "cache")
    assert [shard.records for shard in manifest.shards] == [4, 4, 2]
    assert [shard.draws for shard in manifest.shards] == [24, 24, 12]


@pytest.mark.parametrize("part", ["distill", "classes"])
def test_stock_diffusers_loads_and_samples_the_export(journey: Path, part: str) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(journey / part / "export" / "diffusers")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)
    picture = pipeline("a red star", num_inference_steps=2, output_type="pt").images
    assert picture.shape == (1, 3, 64, 64)
    assert bool(torch.isfinite(torch.as_tensor(picture)).all())


def test_no_trained_tensor_is_still_the_teachers(journey: Path) -> None:
    teacher = load_file("stages/tiny/model/unet/diffusion_pytorch_model.safetensors")
    distilled, finetuned = (
        load_file(journey / part / "checkpoints" / "000000012" / "ema.safetensors") for part in ("distill", "classes")
    )
    assert {name.removeprefix("unet.") for name in distilled} == set(teacher)
    assert all(not torch.equal(value, teacher[name.removeprefix("unet.")].float()) for name, value in distilled.items())
    assert any(not torch.equal(value, finetuned[name]) for name, value in distilled.items())


@pytest.mark.parametrize(("part", "name"), [("distill", "model"), ("classes", "model-classes")])
def test_one_file_for_other_programs_lies_beside_the_folder(journey: Path, part: str, name: str) -> None:
    files = sorted(path.name for path in (journey / part / "export").iterdir())
    assert files == ["diffusers", f"{name}-flow.safetensors", "workflow-comfyui.json"]


def test_what_david_sees_is_drawn(journey: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert david_tool.main(["show", str(journey / "distill"), "--states", "6"]) == 0
    with Image.open(capsys.readouterr().out.strip()) as picture:
        assert picture.width > 1000
        assert len(picture.convert("L").getcolors() or []) > 10


def test_the_table_of_classes_has_a_row_for_each(journey: Path) -> None:
    lines = (journey / "classes" / "per_class.csv").read_text().splitlines()
    assert lines[0].startswith("class,priority,paired_error_before,paired_error_after,all_before,all_after")
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["stars", "top"],
        ["rest", "low"],
        ["mine", "mid"],
        ["(outside)", ""],
    ]


def test_grids_and_journal_are_there_for_each_checkpoint(journey: Path) -> None:
    assert [path.stem for path in sorted((journey / "distill" / "grids").iterdir())] == ["000000008", "000000012"]
    lines = [json.loads(line) for line in (journey / "distill" / "journal.jsonl").read_text().splitlines()]
    samples = [line["samples"] for line in lines if "kind" not in line]
    assert samples == sorted(set(samples))
    assert samples[-1] == 12
    validated = [line for line in lines if line.get("kind") == "validation"]
    assert [line["samples"] for line in validated] == [8, 12]
    assert all(line["held_out"] > 0 and len(line["seen_new_noise_by_s"]) == 5 for line in validated)


def test_classes_are_separate_in_the_journal_and_drawn_at_each_checkpoint(journey: Path) -> None:
    folder, names = journey / "classes", ["stars", "rest", "mine", "(outside)"]
    assert [path.stem for path in sorted((folder / "grids").iterdir())] == ["000000008", "000000012"]
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert list(lines[0]["flow_by_class"]) == [*names[:3], "(prior)"]
    examined = [line for line in lines if line.get("kind") == "classes"]
    assert [line["samples"] for line in examined] == [8, 12]
    assert all(list(line["all"]) == list(line["lost"]) == names for line in examined)


def test_a_second_call_changes_nothing(journey: Path) -> None:
    before = {path: path.read_bytes() for path in (journey / "cache").rglob("*") if path.is_file()}
    weights = (journey / "distill" / "checkpoints" / "000000012" / "ema.safetensors").read_bytes()
    cache_teacher.run(cache_config(journey))
    distill.run(distill_config(journey))
    assert {path: path.read_bytes() for path in (journey / "cache").rglob("*") if path.is_file()} == before
    assert (journey / "distill" / "checkpoints" / "000000012" / "ema.safetensors").read_bytes() == weights


def test_two_caches_of_one_recipe_are_the_same_bytes(journey: Path, tmp_path: Path) -> None:
    cache_teacher.run(cache_config(tmp_path))
    files = sorted(path.relative_to(tmp_path) for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(journey) for path in (journey / "cache").rglob("*") if path.is_file())
    assert all((tmp_path / file).read_bytes() == (journey / file).read_bytes() for file in files)


def test_more_prompts_only_add_shards(journey: Path, tmp_path: Path) -> None:
    shutil.copytree(journey / "cache", tmp_path / "cache")
    old = {path: path.read_bytes() for path in (tmp_path / "cache" / "data").iterdir()}
    cache_teacher.run(cache_config(tmp_path, "--count", "12"))
    assert {path: path.read_bytes() for path in old} == old
    assert [shard.records for shard in open_verified(tmp_path / "cache").shards] == [4, 4, 4, 2]


def test_another_recipe_is_refused_with_the_field_and_both_values(journey: Path) -> None:
    with pytest.raises(Refused, match=r"guidance_max was 8\.0, is now 6\.0"):
        cache_teacher.run(cache_config(journey, "--render.states.guidance-max", "6"))


def test_a_truncated_shard_stops_distillation_with_its_name(journey: Path, tmp_path: Path) -> None:
    shutil.copytree(journey / "cache", tmp_path / "cache")
    shard = tmp_path / "cache" / "data" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    with pytest.raises(Refused, match=r"train-000001\.tar: .* manifest says 4"):
        distill.run(distill_config(tmp_path))
    assert not (tmp_path / "distill" / "checkpoints").exists()


def test_another_teacher_is_refused_before_training(journey: Path, tmp_path: Path) -> None:
    shutil.copytree(journey / "cache", tmp_path / "cache")
    shutil.copytree("stages/tiny/model", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "other" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"beta_end": 0.02}))
    with pytest.raises(Refused, match="scheduler changed since the cache was made"):
        distill.run(distill_config(tmp_path, "--teacher", str(tmp_path / "other")))


def test_a_v_predicting_teacher_is_cached_by_its_own_scheduler_config(tmp_path: Path) -> None:
    shutil.copytree("stages/tiny/model", tmp_path / "v")
    path = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    named = ("--teacher", str(tmp_path / "v"), "--teacher.prediction", "v_prediction")  # its weights predict epsilon
    cache_teacher.run(cache_config(tmp_path, *named, "--count", "4"))
    assert Manifest.open(tmp_path / "cache").shards_of("train")[0].records == 4


def test_distillation_killed_in_mid_epoch_ends_on_the_same_bits(journey: Path, tmp_path: Path) -> None:
    """A kill leaves the newest checkpoint; a run that goes on from it must end as one that was never stopped."""
    for part in ("cache", "distill"):
        shutil.copytree(journey / part, tmp_path / part)
    shutil.rmtree(tmp_path / "distill" / "checkpoints" / "000000012")
    (tmp_path / "distill" / "COMPLETE").unlink()
    distill.run(distill_config(tmp_path))
    for name in ("student.safetensors", "ema.safetensors"):
        ended = Path("distill/checkpoints/000000012") / name
        assert (tmp_path / ended).read_bytes() == (journey / ended).read_bytes()


def test_finetuning_that_is_killed_ends_on_the_same_bits(journey: Path, tmp_path: Path) -> None:
    """Photographs among its pictures, whose noise is drawn in training."""
    for part in ("cache", "distill", "classes"):
        shutil.copytree(journey / part, tmp_path / part)
    shutil.rmtree(tmp_path / "classes" / "checkpoints" / "000000012")
    (tmp_path / "classes" / "COMPLETE").unlink()
    finetune_classes.run(classes_config(tmp_path))
    for name in ("student.safetensors", "ema.safetensors"):
        ended = Path("classes/checkpoints/000000012") / name
        assert (tmp_path / ended).read_bytes() == (journey / ended).read_bytes()


def test_finetuning_that_ends_early_exports_its_best_checkpoint(journey: Path, tmp_path: Path) -> None:
    for part in ("cache", "distill"):
        (tmp_path / part).symlink_to(journey / part)
    shutil.copytree(journey / "classes" / "cache", tmp_path / "classes" / "cache")
    often = ["--train.max-samples", "40", "--train.checkpoint-every-samples", "4"]
    impatient = ["--stop.patience", "1", "--stop.most-lost", "100", "--exam.checkpoint-pictures", "1"]
    finetune_classes.run(classes_config(tmp_path, *often, *impatient))
    folder = tmp_path / "classes"
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    scores = {line["samples"]: line["wrong"] for line in lines if line.get("kind") == "classes"}
    best = min(scores, key=lambda samples: (scores[samples], samples))
    assert max(scores) == best + 4
    assert (folder / "COMPLETE").read_text() == f"{best}\n"
    assert open_run(folder).samples == best
    assert json.loads((folder / "export" / "diffusers" / "sollune.json").read_text())["samples"] == best
