"""Training on a cache of three picture sizes, from its first batch to the last: samples, resume, processes, metrics."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.load import load
from shards.reader import Reader
from stages import __main__ as cli
from stages import cache_teacher, distill
from stages.david.fusion import PUBLISHED_BLOCK_WEIGHTS
from stages.david.saved_assessor import load_or_fit
from stages.nets.student import Student
from stages.tiny.anatomy import build_unet
from stages.train.block_weighter import make_block_weighter
from stages.train.journal import read_events, read_step_lines
from stages.train.loop import fit
from stages.train.objective import Objective, feature_scale
from stages.train.runtime import Runtime
from stages.train.validation import read_first_states, seen_states
from tests.train.test_david import run_processes

TINY = [Path("configs/tiny.yaml")]
SIZES = "[{size: 64x64, share: 2}, {size: 64x96, share: 1}, {size: 96x64, share: 1}]"
FEW = ["--count", "40", "--validation-count", "12", "--render.records-per-shard", "10", "--render.states.steps", "4"]
FEW += ["--render.states.trajectory-states", "2", "--render.states.renoised-states", "1", "--render.sizes", SIZES]
TRAIN = ["--train.max-samples", "45", "--train.batch-pixels", "24576", "--train.checkpoint-every-samples", "12"]
TRAIN += ["--train.keep.last", "9", "--train.optimizer.warmup-samples", "4", "--train.journal-every-samples", "4"]
TRAIN += ["--grid.sampler.steps", "2", "--validation.states", "12"]
TRAIN += ["--david.fit.steps", "40", "--david.fusion.warmup-samples", "8", "--david.sampling.scheme", "david"]
TRAIN += ["--david.sampling.profile-samples", "11"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of three sizes, and in `distill/david` a David fitted to it."""
    folder = tmp_path_factory.mktemp("runs") / "sizes"
    cache_teacher.run(load(cache_teacher.Config, "cache_teacher", TINY, ["--run", str(folder), *FEW]))
    load_or_fit(folder / "distill" / "david", folder / "cache", configured(folder).david.fit, 1000)
    return folder


def configured(run: Path, *options: str) -> distill.Config:
    return load(distill.Config, "distill", TINY, ["--run", str(run), *TRAIN, *options])


def linked(run: Path, folder: Path) -> Path:
    """Another run folder with the same cache and David."""
    (folder / "distill").mkdir(parents=True)
    (folder / "cache").symlink_to(run / "cache")
    shutil.copytree(run / "distill" / "david", folder / "distill" / "david")
    return folder


@pytest.fixture(scope="module")
def distilled(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = linked(run, tmp_path_factory.mktemp("distilled") / "whole")
    distill.run(configured(folder))
    return folder


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "distill" / "checkpoints").glob("[0-9]*"))


def test_training_ends_with_the_first_whole_batch_that_reaches_its_samples(distilled: Path) -> None:
    reader = Reader(distilled / "cache", "train", batch_pixels=24576)
    ends = [block.first + block.rows for block, _ in zip(reader.schedule.blocks(), range(20), strict=False)]
    assert {reader.rows_of(size) for size in reader.sizes} == {6, 4}
    end = next(end for end in ends if end >= 45)
    assert checkpoints(distilled)[-1] == end == int((distilled / "distill" / "COMPLETE").read_text())
    assert set(checkpoints(distilled)) <= set(ends)
    assert json.loads((distilled / "distill" / "export" / "diffusers" / "sollune.json").read_text())["samples"] == end


def test_errors_are_journaled_by_size(distilled: Path) -> None:
    names = {"64x64", "64x96", "96x64"}
    lines = read_step_lines(distilled / "distill")
    assert all(set(line["flow_by_size"]) == names for line in lines)
    assert all(any(line["flow_by_size"][name] for line in lines) for name in names)
    for line in read_events(distilled / "distill", "validation", 10**9):
        assert set(line["held_out_by_size"]) == names
        assert min(line["held_out_by_size"].values()) <= line["held_out"] <= max(line["held_out_by_size"].values())


def test_a_run_that_is_stopped_in_the_middle_ends_on_the_same_bits(run: Path, distilled: Path, tmp_path: Path) -> None:
    middle = checkpoints(distilled)[1]
    folder = linked(run, tmp_path / "cut")
    kept = distilled / "distill" / "checkpoints" / f"{middle:09d}"
    shutil.copytree(kept, folder / "distill" / "checkpoints" / kept.name)
    distill.run(configured(folder))
    last = f"{checkpoints(distilled)[-1]:09d}"
    for name in ("student", "ema"):
        one, two = (
            load_file(place / "distill" / "checkpoints" / last / f"{name}.safetensors") for place in (distilled, folder)
        )
        assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("wanted", [7, 12, 10**6])
def test_the_first_states_of_a_split_are_each_sizes_share_and_each_comes_once(run: Path, wanted: int) -> None:
    reader = Reader(run / "cache", "validation")
    batches = list(read_first_states(reader, wanted, 8))
    rows = [
        (key, state) for batch in batches for key, state in zip(batch.keys, batch.state_index.tolist(), strict=True)
    ]
    assert len(set(rows)) == len(rows) == min(wanted, reader.samples_per_epoch)
    for size, pairs in zip(reader.sizes, reader.pairs_of_sizes, strict=True):
        of_size = [batch for batch in batches if batch.size == size]
        assert abs(sum(map(len, of_size)) - len(rows) * len(pairs) / reader.samples_per_epoch) < 1
        assert all(batch.x_s.shape[2:] == (size.height // 8, size.width // 8) for batch in of_size)
        assert all(len(batch) * size.pixels <= 8 * 64 * 64 for batch in of_size)


def test_seen_states_are_renoised_pictures_of_every_size(run: Path) -> None:
    reader = Reader(run / "cache", "train")
    seen = list(seen_states(reader, 20))
    assert sum(len(batch) for _, batch in seen) == 20
    assert {batch.size for _, batch in seen} == set(reader.sizes)
    for x0, batch in seen:
        assert x0.shape == batch.x_s.shape
        assert set(batch.state_index.tolist()) == {2}, "the last of the three states is renoised"


CLASSES = "classes:\n  - {name: stars, pattern: star/*, priority: top}\n"
MISFITS = {
    "a size that the prior lacks": (
        ["--render.sizes", "[{size: 64x64, share: 1}, {size: 80x80, share: 1}]"],
        "holds no picture of 80x80, and pictures of the classes have that size; it has 64x64, 64x96, 96x64 - ",
    ),
    "rows that micro-batches cannot share": (
        ["--train.batch-pixels", "40000", "--train.accumulate", "2"],
        "train.batch_pixels = 40000: gives 9 rows of 64x64, 6 of 64x96",
    ),
    "a size whose rows leave the prior none": (
        ["--train.batch-pixels", "6144"],
        "prior_share = 0.3: gives 0 of 1 rows of 64x64 to the prior",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_classes_of_sizes_that_do_not_fit_are_refused_before_any_picture(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    options, message = MISFITS[case]
    (tmp_path / "classes.yaml").write_text(CLASSES)
    words = ["finetune-classes", "--config", "configs/tiny.yaml", "--run", str(distilled), "--count", "8"]
    words += ["--classes", str(tmp_path / "classes.yaml"), "--exam.pictures", "1", "--train.max-samples", "8"]
    assert cli.main([*words, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (distilled / "classes").exists()


def train(run: Path, folder: Path, *options: str) -> None:
    """The training of distill, without start and export."""
    config, runtime = configured(run, *options), Runtime(CPU)
    torch.manual_seed(0)
    student = Student(build_unet())
    pixels = config.train.batch_pixels
    reader = Reader(run / "cache", "train", 0, 1, rank=runtime.rank, world=runtime.world, batch_pixels=pixels)
    scale = feature_scale(run / "cache", config.objective.block_bins)
    objective = Objective(config.objective, student.blocks, scale, PUBLISHED_BLOCK_WEIGHTS)
    weighter = make_block_weighter(config.david, reader, objective.block_weights, run / "distill", CPU, 1000)
    assert weighter.timestep_sampler is not None
    fit(
        student,
        objective,
        partial(weighter.timestep_sampler.batches, stream=reader.batches),
        torch.zeros_like(reader.batch(torch.arange(1).numpy()).cond[:1]).float(),
        config.train,
        folder,
        runtime=runtime,
        identity={},
        block_weighter=weighter,
        last_sample=reader.schedule.boundary(config.train.max_samples),
        sizes=[size for size in reader.sizes if size],
    )
    runtime.close()


def test_two_processes_are_one_with_two_micro_batches(run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_processes(partial(train, run, one, "--train.accumulate", "2"), 1) == [0]
    assert run_processes(partial(train, run, two), 2) == [0, 0]
    last = max(path.name for path in (one / "checkpoints").glob("[0-9]*"))
    for name in ("student", "ema"):
        pair = [load_file(folder / "checkpoints" / last / f"{name}.safetensors") for folder in (one, two)]
        assert max(float((value - pair[1][key]).abs().max()) for key, value in pair[0].items()) < 1e-5
    lines = [read_step_lines(folder)[-1] for folder in (one, two)]
    for size, error in lines[0]["flow_by_size"].items():
        assert lines[1]["flow_by_size"][size] == (None if error is None else pytest.approx(error, rel=1e-4))
