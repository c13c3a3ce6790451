"""David in the loop: he judges a student's features, his word reaches the loss, and a resumed run hears the same."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from benchmarks.killing import fork_job, wait_for_exit
from configs.load import load
from shards.batch import Batch
from shards.reader import Reader
from stages import cache_teacher, distill
from stages.david.fusion import DEFAULT_BLOCK_WEIGHTS
from stages.david.saved import load_or_fit_and_save
from stages.nets.student import Prediction, Student
from stages.tiny.anatomy import build_unet
from stages.train.assessor import DavidConfig, DavidWeighter, make_block_weighter
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
BLOCKS = tuple(DEFAULT_BLOCK_WEIGHTS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and in `distill/david` a David who was fitted to it."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    cache_teacher.run(load(cache_teacher.Config, "cache_teacher", TINY, ["--run", str(folder), *FEW]))
    load_or_fit_and_save(folder / "distill" / "david", folder / "cache", asked(folder).david.fit, 1000)
    return folder


def asked(run: Path, *options: str) -> distill.Config:
    return load(distill.Config, "distill", TINY, ["--run", str(run), *TRAIN, *FIT, *options])


def david(run: Path, *options: str) -> tuple[DavidWeighter, Batch]:
    reader = Reader(run / "cache", batch_size=60)
    found = make_block_weighter(asked(run, *options).david, reader, BLOCKS, run / "distill", 0, CPU, 1000)
    assert isinstance(found, DavidWeighter)
    return found, next(reader.batches()).to("cpu", torch.float32)


def spoken(judge: DavidWeighter, batch: Batch, features: dict[str, torch.Tensor]) -> torch.Tensor:
    """His lambdas once the warm-up is over."""
    output = Prediction(batch.v_cond, batch.v_uncond, features)
    static = torch.ones(len(judge.assessor.blocks))
    return [told(judge, batch, output, static) for _ in range(4)][-1]


def told(judge: DavidWeighter, batch: Batch, output: Prediction, static: torch.Tensor) -> torch.Tensor:
    """His lambdas once he has learnt from this batch."""
    judge.lambdas(static)
    judge.update(judge.observe(batch, output, judge.importance_weight(batch)), len(batch))
    return judge.lambdas(static)


def test_a_faultless_student_is_weighed_as_configured(run: Path) -> None:
    judge, batch = david(run)
    found = spoken(judge, batch, dict(batch.features))
    assert torch.equal(found, judge.running_assessment.baseline_lambdas)
    assert judge.metrics()["coherence"] == dict.fromkeys(judge.assessor.blocks, 1.0)
    found = judge.lambda_variation()
    assert found is not None
    assert found.is_constant


def test_what_he_says_of_a_block_that_counts_nothing_is_no_voice(run: Path) -> None:
    judge, batch = david(run)
    output = Prediction(batch.v_cond, batch.v_uncond, {**batch.features, "up_3": 2 * batch.features["up_3"]})
    for silent in (False, True):
        static = torch.ones(9)
        static[8] = 0 if silent else 1
        for _ in range(4):
            told(judge, batch, output, static)
        found = judge.lambda_variation()
        assert found is not None
        assert found.is_constant == silent


@pytest.mark.parametrize("block", ["down_0", "mid", "up_2"])
def test_a_block_that_went_wrong_counts_more_and_the_others_as_before(run: Path, block: str) -> None:
    judge, batch = david(run)
    noise = torch.randn(batch.features[block].shape, generator=torch.Generator().manual_seed(0))
    wrong = batch.features[block] + batch.features[block].std(dim=0) * noise
    rise = spoken(judge, batch, {**batch.features, block: wrong}) - judge.running_assessment.baseline_lambdas
    place = judge.assessor.blocks.index(block)
    assert rise[place] > 0.1
    assert rise.count_nonzero() == 1


def test_nobody_is_fitted_where_nothing_depends_on_him(tmp_path: Path, run: Path) -> None:
    deaf = DavidConfig.model_validate({"fusion": {"formula": "static"}})
    judge = make_block_weighter(deaf, Reader(run / "cache"), BLOCKS, tmp_path, 0, CPU, 1000)
    assert not list(tmp_path.iterdir())
    found = judge.lambdas(torch.full((9,), 2.0))
    assert found.tolist() == pytest.approx([2 * DEFAULT_BLOCK_WEIGHTS[block] for block in BLOCKS])


def test_under_his_choice_of_times_the_weights_average_to_one(run: Path) -> None:
    judge, batch = david(run, "--david.sampling.scheme", "david", "--david.sampling.profile-samples", "60")
    assert judge.timestep_sampler is not None
    noise = torch.randn(60, 32, generator=torch.Generator().manual_seed(0)) * (batch.k > 500)[:, None]
    spoken(judge, batch, {**batch.features, "up_3": batch.features["up_3"] + 3 * noise})
    judge.timestep_sampler.update_q()
    late = judge.timestep_sampler.q[10:].sum() / judge.timestep_sampler.pi[10:].sum()
    assert late > 1.1
    everything = torch.arange(1000)
    weights = judge.importance_weight(replace(batch, k=everything, s=torch.zeros(1000))).double()
    bins = torch.div(everything * 20, 1000, rounding_mode="floor")
    share = judge.timestep_sampler.q[bins] / 50
    assert (share * weights).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("scheme", ["stored", "david"])
def test_a_resumed_run_with_david_ends_on_the_same_bits(run: Path, tmp_path: Path, scheme: str) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cache").symlink_to(run / "cache")
        shutil.copytree(run / "distill" / "david", tmp_path / name / "distill" / "david")
    options = ["--david.sampling.scheme", scheme, "--david.sampling.profile-samples", "12"]
    distill.run(asked(tmp_path / "whole", *options))
    kept = tmp_path / "whole" / "distill" / "checkpoints" / "000000016"
    shutil.copytree(kept, tmp_path / "cut" / "distill" / "checkpoints" / "000000016")
    distill.run(asked(tmp_path / "cut", *options))
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
    told = json.loads((tmp_path / "distill" / "export" / "diffusers" / "model_index.json").read_text())
    assert told["scheduler"][1].startswith(scheduler)


STEPS = 12
SHORT = ["--train.max-samples", str(4 * STEPS), "--view.prompt-fraction", "0.05"]
SHORT += ["--david.sampling.profile-samples", "12", "--train.optimizer.learning-rate", "1e-3"]
Left = tuple[int, int, signal.Signals]
"""The step before which a process, by its rank, sends itself a signal."""


def study(run: Path, folder: Path, *options: str, left: Left | None = None) -> None:
    """What distill does between its start and its export, in less than a second."""
    config, machine = asked(run, *SHORT, *options), Runtime(CPU)
    torch.manual_seed(0)
    student = Student(build_unet())
    rows, rank, world = machine.local_batch_size(4, config.train.accumulate), machine.rank, machine.world
    reader = Reader(run / "cache", "train", 0, rows, view=config.view, rank=rank, world=world)
    assert reader.samples_per_epoch < 4 * STEPS
    judge = make_block_weighter(config.david, reader, student.blocks, run / "distill", 0, CPU, 1000)

    def batches(first: int) -> Iterator[Batch]:
        for number, batch in enumerate(judge.batches(first), first // 4):
            if left is not None and left[:2] == (number, rank):
                os.kill(os.getpid(), left[2])
            yield batch

    objective = Objective(config.objective, student.blocks, feature_scale(run / "cache", config.objective.block_bins))
    uncond = torch.zeros_like(next(reader.batches()).cond[:1]).float()
    fit(student, objective, batches, uncond, config.train, folder, runtime=machine, identity={}, block_weighter=judge)
    machine.close()


def side_by_side(job: Callable[[], None], world: int) -> list[int]:
    """Exit codes of processes that do a job together."""
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


def lived(run: Path, folder: Path, world: int, signals: Sequence[signal.Signals], *options: str) -> dict[str, str]:
    """The end of a life in which the last process gets these signals before random steps."""
    moments = sorted(Random(world).sample(range(2, STEPS - 1), len(signals)))
    for step, number in zip(moments, signals, strict=True):
        codes = side_by_side(partial(study, run, folder, *options, left=(step, world - 1, number)), world)
        assert 0 not in codes
        newest = max(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
        assert newest == 4 * step + 4 if number == signal.SIGTERM else newest <= 4 * step
    assert side_by_side(partial(study, run, folder, *options), world) == [0] * world
    return last_files(folder)


@pytest.mark.parametrize("scheme", ["stored", "david"])
def test_five_random_signals_across_an_epoch_leave_no_trace(run: Path, tmp_path: Path, scheme: str) -> None:
    options = ("--david.sampling.scheme", scheme)
    assert side_by_side(partial(study, run, tmp_path / "whole", *options), 1) == [0]
    signals = [(signal.SIGKILL, signal.SIGTERM)[(number + len(scheme)) % 2] for number in range(5)]
    assert lived(run, tmp_path / "cut", 1, signals, *options) == last_files(tmp_path / "whole")


def test_two_processes_are_one_with_two_micro_batches_and_resume_bit_by_bit(run: Path, tmp_path: Path) -> None:
    options = ("--david.sampling.scheme", "david", "--objective.block-share", "0.2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert side_by_side(partial(study, run, one, *options, "--train.accumulate", "2"), 1) == [0]
    assert side_by_side(partial(study, run, two, *options), 2) == [0, 0]
    for name in ("student", "ema"):
        pair = [load_file(folder / "checkpoints" / f"{4 * STEPS:09d}" / f"{name}.safetensors") for folder in (one, two)]
        assert max(float((value - pair[1][key]).abs().max()) for key, value in pair[0].items()) < 1e-5
    lines = [json.loads((folder / "journal.jsonl").read_text().splitlines()[-1]) for folder in (one, two)]
    for number in ("loss", "flow", "grad_norm"):
        assert lines[0][number] == pytest.approx(lines[1][number], rel=1e-5)
    signals = [signal.SIGKILL, signal.SIGTERM]
    assert lived(run, tmp_path / "cut", 2, signals, *options) == last_files(two)
