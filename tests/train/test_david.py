"""David in the training loop: its lambdas reach the loss, and a resumed run ends on the same bits."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from benchmarks.killing import fork_job, wait_for_exit
from configs.load import load
from shards.batch import Batch
from shards.reader import Reader
from stages import cache_teacher, distill
from stages.david.fusion import PUBLISHED_BLOCK_WEIGHTS, translate_stored
from stages.david.saved_assessor import load_or_fit
from stages.nets.student import Prediction, Student
from stages.tiny.anatomy import build_unet
from stages.train.block_weighter import DavidConfig, DavidWeighter, make_block_weighter
from stages.train.journal import read_step_lines
from stages.train.loop import fit
from stages.train.objective import Objective, feature_scale
from stages.train.runtime import Runtime

TINY = [Path("configs/tiny.yaml")]
FEW = ["--count", "60", "--validation-count", "6", "--render.records-per-shard", "30", "--render.states.steps", "8"]
FIT = ["--david.fit.steps", "60", "--david.fusion.warmup-samples", "8"]
TRAIN = [
    "--train.max-samples",
    "24",
    "--train.batch-size",
    "4",
    "--train.checkpoint-every-samples",
    "8",
    "--train.keep.last",
    "9",
]
TRAIN += ["--train.optimizer.warmup-samples", "4", "--grid.sampler.steps", "2", "--train.journal-every-samples", "4"]
TRAIN += ["--validation.states", "0"]
CPU = torch.device("cpu")
BLOCKS = tuple(PUBLISHED_BLOCK_WEIGHTS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and in `distill/david` a David fitted to it."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    cache_teacher.run(load(cache_teacher.Config, "cache_teacher", TINY, ["--run", str(folder), *FEW]))
    load_or_fit(folder / "distill" / "david", folder / "cache", configured(folder).david.fit, 1000)
    return folder


def configured(run: Path, *options: str) -> distill.Config:
    return load(distill.Config, "distill", TINY, ["--run", str(run), *TRAIN, *FIT, *options])


def david(run: Path, *options: str, w: Mapping[str, float] = PUBLISHED_BLOCK_WEIGHTS) -> tuple[DavidWeighter, Batch]:
    reader = Reader(run / "cache", batch_size=60)
    weighter = make_block_weighter(configured(run, *options).david, reader, w, run / "distill", CPU, 1000)
    assert isinstance(weighter, DavidWeighter)
    return weighter, next(reader.batches()).to("cpu", torch.float32)


def lambdas_after(weighter: DavidWeighter, batch: Batch, features: dict[str, torch.Tensor]) -> torch.Tensor:
    """The lambdas once the warm-up is over."""
    output = Prediction(batch.v_cond, batch.v_uncond, features)
    for _ in range(4):
        weighter.update(weighter.observe(batch, output, weighter.importance_weight(batch)), len(batch))
    return weighter.lambdas()


def test_a_faultless_student_is_weighted_as_configured(run: Path) -> None:
    weighter, batch = david(run)
    lambdas = lambdas_after(weighter, batch, dict(batch.features))
    assert torch.equal(lambdas, weighter.running_assessment.baseline_lambdas)
    assert lambdas.tolist() == pytest.approx(list(PUBLISHED_BLOCK_WEIGHTS.values()))
    assert weighter.metrics()["coherence"] == dict.fromkeys(weighter.assessor.blocks, 1.0)
    variation = weighter.lambda_variation()
    assert variation is not None
    assert variation.is_constant


@pytest.mark.parametrize("w", [0.7, 0.0])
def test_a_block_of_weight_zero_does_not_count_in_the_variation_of_lambda(run: Path, w: float) -> None:
    weighter, batch = david(run, w={**PUBLISHED_BLOCK_WEIGHTS, "up_3": w})
    lambdas = lambdas_after(weighter, batch, {**batch.features, "up_3": 2 * batch.features["up_3"]})
    variation = weighter.lambda_variation()
    assert variation is not None
    assert variation.is_constant == (w == 0)
    assert (float(lambdas[8]) == 0) == (w == 0)


def test_configured_block_weights_override_the_published_ones_and_these_override_one(run: Path) -> None:
    objective = configured(run, "--objective.block-weights", '{"mid": 2}').objective
    expected = {"mid": 2.0, "up_2": 0.9, "up_3": 0.0, "head": 1.0}
    assert objective.weights_of(tuple(expected), PUBLISHED_BLOCK_WEIGHTS) == expected
    assert configured(run).objective.weights_of(("mid", "up_3"), {}) == {"mid": 1.0, "up_3": 0.0}


def test_the_identity_and_the_settings_of_an_earlier_run_are_read_alike() -> None:
    golden = Path("tests/golden/data/distill")
    stored = json.loads((golden / "checkpoints" / "000000008" / "state.json").read_text())["identity"]
    assert "block_weights" in stored["david"]["fusion"], "the golden run has both vectors of weights"
    identity = translate_stored(stored)
    section = translate_stored(yaml.safe_load((golden / "config.yaml").read_text())["distill"])
    config = distill.Config.model_validate(section)
    assert identity["david"] == config.david.model_dump(mode="json")
    assert identity["objective"] == config.objective.identity()


def test_an_earlier_run_of_the_original_recipe_has_the_identity_of_this_version(run: Path) -> None:
    config = load(distill.Config, "distill", [*TINY, Path("configs/seed.yaml")], ["--run", str(run)])
    david, objective = config.david.model_dump(mode="json"), config.objective.model_dump(mode="json")
    fusion = {**david["fusion"], "formula": "seed", "block_weights": PUBLISHED_BLOCK_WEIGHTS}
    stored = {"david": {**david, "fusion": fusion}, "objective": {**objective, "block_weights": {"up_3": 1.0}}}
    assert translate_stored(stored) == {"david": david, "objective": objective}


@pytest.mark.parametrize("block", ["down_0", "mid", "up_2"])
def test_a_block_that_went_wrong_counts_more_and_the_others_as_before(run: Path, block: str) -> None:
    weighter, batch = david(run)
    noise = torch.randn(batch.features[block].shape, generator=torch.Generator().manual_seed(0))
    wrong = batch.features[block] + batch.features[block].std(dim=0) * noise
    rise = (
        lambdas_after(weighter, batch, {**batch.features, block: wrong}) - weighter.running_assessment.baseline_lambdas
    )
    place = weighter.assessor.blocks.index(block)
    assert rise[place] > 0.1
    assert rise.count_nonzero() == 1


def test_no_david_is_fitted_where_nothing_depends_on_it(tmp_path: Path, run: Path) -> None:
    static = DavidConfig.model_validate({"fusion": {"formula": "static"}})
    w = {block: 2 * w for block, w in PUBLISHED_BLOCK_WEIGHTS.items()}
    weighter = make_block_weighter(static, Reader(run / "cache"), w, tmp_path, CPU, 1000)
    assert not list(tmp_path.iterdir())
    assert weighter.lambdas().tolist() == pytest.approx(list(w.values()))


def test_the_importance_weights_of_sampled_times_average_to_one(run: Path) -> None:
    weighter, batch = david(run, "--david.sampling.scheme", "david", "--david.sampling.profile-samples", "60")
    assert weighter.timestep_sampler is not None
    noise = torch.randn(60, 32, generator=torch.Generator().manual_seed(0)) * (batch.k > 500)[:, None]
    lambdas_after(weighter, batch, {**batch.features, "up_3": batch.features["up_3"] + 3 * noise})
    weighter.timestep_sampler.update_q()
    late = weighter.timestep_sampler.q[10:].sum() / weighter.timestep_sampler.pi[10:].sum()
    assert late > 1.1
    everything = torch.arange(1000)
    weights = weighter.importance_weight(replace(batch, k=everything, s=torch.zeros(1000))).double()
    bins = torch.div(everything * 20, 1000, rounding_mode="floor")
    share = weighter.timestep_sampler.q[bins] / 50
    assert (share * weights).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("scheme", ["stored", "david"])
def test_a_resumed_run_with_david_ends_on_the_same_bits(run: Path, tmp_path: Path, scheme: str) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cache").symlink_to(run / "cache")
        shutil.copytree(run / "distill" / "david", tmp_path / name / "distill" / "david")
    options = ["--david.sampling.scheme", scheme, "--david.sampling.profile-samples", "12"]
    distill.run(configured(tmp_path / "whole", *options))
    kept = tmp_path / "whole" / "distill" / "checkpoints" / "000000016"
    shutil.copytree(kept, tmp_path / "cut" / "distill" / "checkpoints" / "000000016")
    distill.run(configured(tmp_path / "cut", *options))
    one, two = (
        load_file(tmp_path / name / "distill" / "checkpoints" / "000000024" / "ema.safetensors")
        for name in ("whole", "cut")
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    lines = [read_step_lines(tmp_path / name / "distill")[-1] for name in ("whole", "cut")]
    timeless = [
        {name: value for name, value in line.items() if not name.endswith(("_seconds", "_per_second", "_gib"))}
        for line in lines
    ]
    assert timeless[0] == timeless[1]
    assert set(lines[0]["timestep_error"]) == set(lines[0]["lambdas"])
    assert ("effective_share" in lines[0]) == (scheme == "david")


@pytest.mark.parametrize(("overlay", "scheduler"), [("seed", "DDIMScheduler"), ("seed_repaired", "UniPC")])
def test_the_original_recipe_and_its_repair_run_to_an_export(
    run: Path, tmp_path: Path, overlay: str, scheduler: str
) -> None:
    (tmp_path / "cache").symlink_to(run / "cache")
    shutil.copytree(run / "distill" / "david", tmp_path / "distill" / "david")
    files = [*TINY, Path(f"configs/{overlay}.yaml")]
    distill.run(load(distill.Config, "distill", files, ["--run", str(tmp_path), *TRAIN, *FIT]))
    line = read_step_lines(tmp_path / "distill")[-1]
    assert all(value > 0 for value in line["lambdas"].values()) == (overlay == "seed")
    index = json.loads((tmp_path / "distill" / "export" / "diffusers" / "model_index.json").read_text())
    assert index["scheduler"][1].startswith(scheduler)


STEPS = 12
SHORT = ["--train.max-samples", str(4 * STEPS), "--view.prompt-fraction", "0.05"]
SHORT += ["--david.sampling.profile-samples", "12", "--train.optimizer.learning-rate", "1e-3"]
SignalAt = tuple[int, int, signal.Signals]
"""The step before which a process, by its rank, sends itself a signal."""


def train(run: Path, folder: Path, *options: str, signal_at: SignalAt | None = None) -> None:
    """The training of distill, without start and export, in less than a second."""
    config, runtime = configured(run, *SHORT, *options), Runtime(CPU)
    torch.manual_seed(0)
    student = Student(build_unet())
    rows, rank, world = 4 // runtime.world, runtime.rank, runtime.world
    reader = Reader(run / "cache", "train", 0, rows, view=config.view, rank=rank, world=world)
    assert reader.samples_per_epoch < 4 * STEPS
    scale = feature_scale(run / "cache", config.objective.block_bins)
    objective = Objective(config.objective, student.blocks, scale, PUBLISHED_BLOCK_WEIGHTS)
    weighter = make_block_weighter(config.david, reader, objective.block_weights, run / "distill", CPU, 1000)
    sampler = weighter.timestep_sampler
    stream = partial(sampler.batches, stream=reader.batches) if sampler else reader.batches

    def batches(first: int) -> Iterator[Batch]:
        for number, batch in enumerate(stream(first), first // 4):
            if signal_at is not None and signal_at[:2] == (number, rank):
                os.kill(os.getpid(), signal_at[2])
            yield batch

    uncond = torch.zeros_like(next(reader.batches()).cond[:1]).float()
    fit(
        student,
        objective,
        batches,
        uncond,
        config.train,
        folder,
        runtime=runtime,
        identity={},
        block_weighter=weighter,
    )
    runtime.close()


def run_processes(job: Callable[[], None], world: int) -> list[int]:
    """Exit codes of processes that share a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def of(rank: str) -> Callable[[], None]:
        def one() -> None:
            AcceleratorState._reset_state(reset_partial_state=True)
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            os.environ.update({**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {})
            signal.alarm(120)
            job()

        return one

    return [wait_for_exit(pid) for pid in [fork_job(of(str(rank))) for rank in range(world)]]


def last_files(folder: Path) -> dict[str, str]:
    return json.loads((folder / "checkpoints" / f"{4 * STEPS:09d}" / "state.json").read_text())["files"]


def train_with_signals(
    run: Path, folder: Path, world: int, signals: Sequence[signal.Signals], *options: str
) -> dict[str, str]:
    """The final files of a training in which the last process gets these signals before random steps."""
    moments = sorted(Random(world).sample(range(2, STEPS - 1), len(signals)))
    for step, number in zip(moments, signals, strict=True):
        codes = run_processes(partial(train, run, folder, *options, signal_at=(step, world - 1, number)), world)
        assert 0 not in codes
        newest = max(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
        assert newest == 4 * step + 4 if number == signal.SIGTERM else newest <= 4 * step
    assert run_processes(partial(train, run, folder, *options), world) == [0] * world
    return last_files(folder)


@pytest.mark.parametrize("scheme", ["stored", "david"])
def test_five_random_signals_across_an_epoch_do_not_change_the_result(run: Path, tmp_path: Path, scheme: str) -> None:
    options = ("--david.sampling.scheme", scheme)
    assert run_processes(partial(train, run, tmp_path / "whole", *options), 1) == [0]
    signals = [(signal.SIGKILL, signal.SIGTERM)[(number + len(scheme)) % 2] for number in range(5)]
    assert train_with_signals(run, tmp_path / "cut", 1, signals, *options) == last_files(tmp_path / "whole")


def test_two_processes_are_one_with_two_micro_batches_and_resume_bit_by_bit(run: Path, tmp_path: Path) -> None:
    options = ("--david.sampling.scheme", "david", "--objective.block-share", "0.2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_processes(partial(train, run, one, *options, "--train.accumulate", "2"), 1) == [0]
    assert run_processes(partial(train, run, two, *options), 2) == [0, 0]
    for name in ("student", "ema"):
        pair = [load_file(folder / "checkpoints" / f"{4 * STEPS:09d}" / f"{name}.safetensors") for folder in (one, two)]
        assert max(float((value - pair[1][key]).abs().max()) for key, value in pair[0].items()) < 1e-5
    lines = [json.loads((folder / "journal.jsonl").read_text().splitlines()[-1]) for folder in (one, two)]
    for number in ("loss", "flow", "grad_norm"):
        assert lines[0][number] == pytest.approx(lines[1][number], rel=1e-5)
    signals = [signal.SIGKILL, signal.SIGTERM]
    assert train_with_signals(run, tmp_path / "cut", 2, signals, *options) == last_files(two)
