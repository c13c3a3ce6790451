"""Plans for rented GPUs: figures that follow from one another."""

import json
import re

import pytest

from stages import __main__ as cli
from stages.scale.cards import CARDS, card_named, card_of_device
from stages.scale.fleet import CachingWork, Fleet, TrainingWork, longest_share
from stages.scale.rates import OPERATIONS_OF_A_STATE, Rates

H100 = Rates.of_card(card_named("h100"))
TRAINING = TrainingWork(48_000, 32, 1e12, 10**9, 10**9, 10, 6000, False)


def number(text: str, line: str, pattern: str = r"([\d.,]+)") -> float:
    """The first number after the name of a line."""
    (row,) = [row for row in text.splitlines() if row.startswith(line)]
    return float(re.search(pattern, row.removeprefix(line))[1].replace(",", ""))


def test_every_card_is_known_by_both_its_names() -> None:
    assert all(card_named(card.name.upper()) is card for card in CARDS)
    assert card_of_device("NVIDIA H100 80GB HBM3") is card_named("h100")


@pytest.mark.parametrize(("gpus", "hours"), [(1, 100), (4, 25), (10, 10), (3, 34), (1000, 1)])
def test_the_time_is_that_of_the_gpu_with_most_whole_shards(gpus: int, hours: float) -> None:
    work = CachingWork([(250, H100.half * H100.teacher_share * 3600 / 250, 1e6)] * 100, 0.0)
    text = "\n".join(work.lines(Fleet(gpus, H100, 2.5)))
    assert number(text, "time") == pytest.approx(hours)
    assert number(text, "money") == pytest.approx(gpus * hours * 2.5)
    assert number(text, "bytes") == 250 * 1e6 * 100
    seconds, nodes = hours * 3600, -(-gpus // 8)
    assert number(text, "bandwidth") == pytest.approx(25e9 / nodes / seconds / 1e6, abs=0.06)


def test_full_precision_of_some_steps_takes_its_own_rate() -> None:
    half, single, mixed = (CachingWork([], share).seconds_of(1e15, H100) for share in (0.0, 1.0, 0.3))
    assert mixed == pytest.approx(0.7 * half + 0.3 * single)
    assert single / half == pytest.approx(H100.half / H100.single)


def test_shards_go_to_whoever_is_free() -> None:
    assert longest_share([5, 1, 1, 1], 2) == 5
    assert longest_share([1, 1, 1, 5], 2) == 6


def test_more_gpus_train_sooner_and_never_in_proportion() -> None:
    one, eight, many = (TRAINING.step_seconds(Fleet(gpus, H100, None)) for gpus in (1, 8, 32))
    assert one / 8 < eight < one
    assert TRAINING.gradient_bytes(Fleet(1, H100, None)) == 0
    assert TRAINING.gradient_bytes(Fleet(32, H100, None)) == pytest.approx(2 * 31 / 32 * 4e9)
    assert many > 7.75e9 / 25e9


def test_each_node_reads_the_whole_cache() -> None:
    text = "\n".join(TRAINING.lines(Fleet(32, H100, None)))
    assert number(text, "requests") == 4 * 10 * 2  # four nodes, ten shards of 95 MiB in parts of 50
    assert "price not given" in text


def gpu_file(path, **changes):
    figures = {
        "card": {"name": "NVIDIA H100 80GB HBM3"},
        "stage one, fp16": {
            "networks": {"float16": {"tflops": 300}, "float32": {"tflops": 50}, "texts": {"rows": 1}},
            "share_in_the_teacher": 0.97,
            "operations_of_a_row": 8e11,
        },
        "stage two, 80gb": {"states_per_second": 60.0},
        "stage two, 24gb": {"states_per_second": 20.0},
    } | changes
    path.write_text(json.dumps({"parts": [{"name": name, "figures": one} for name, one in figures.items()]}))
    return path


def test_measured_rates_take_the_place_of_assumed_ones(tmp_path) -> None:
    rates = Rates.measured(gpu_file(tmp_path / "gpu.json"), None)
    assert (rates.card.name, rates.half, rates.single, rates.teacher_share) == ("h100", 300e12, 50e12, 0.97)
    assert rates.training == pytest.approx(60 * OPERATIONS_OF_A_STATE * 8e11)
    assert "assumed" not in rates.source


def test_what_a_cut_off_run_did_not_measure_is_assumed_and_named(tmp_path) -> None:
    broken = {"stage two, 80gb": {}, "stage two, 24gb": {"states_per_second": None}}
    rates = Rates.measured(gpu_file(tmp_path / "gpu.json", **broken), card_named("h100"))
    assert (rates.half, rates.training) == (300e12, H100.training)
    assert rates.source.endswith("assumed from what is stated: training")


def test_both_commands_plan_and_write_nothing(tmp_path, capsys) -> None:
    few = ["--count", "6", "--validation-count", "2", "--render.records-per-shard", "2", "--render.states.steps", "4"]
    words = ["--config", "configs/tiny.yaml", "--run", str(tmp_path / "run")]
    fleet = ["--plan", "--gpus", "2", "--gpu", "h100", "--price", "2.5"]
    assert cli.main(["cache-teacher", *words, *few, *fleet]) == 0
    planned = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert number(planned, "prompts to make") == 8
    assert "in 4 shards" in planned
    assert cli.main(["cache-teacher", *words, *few]) == 0
    written = sum(file.stat().st_size for file in (tmp_path / "run/cache/data").iterdir())
    assert number(planned, "bytes") == pytest.approx(written, rel=0.3)
    capsys.readouterr()
    assert cli.main(["distill", *words, *fleet]) == 0
    assert number(capsys.readouterr().out, "samples") == 25600
    assert not (tmp_path / "run/distill").exists()
