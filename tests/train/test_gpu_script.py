"""Laws of `benchmarks.gpu`: every part works on the CPU, and no part's end keeps the report from telling the rest."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import gpu, gpu_process
from benchmarks.gpu_card import peak_of, shares_of_peak, unet_operations
from benchmarks.gpu_process import Executor, InProcess, OwnProcess, run_parts
from benchmarks.gpu_report import Part, Report, as_json
from stages.scale.cards import CARDS
from tests.train.gpu_parts import Settings


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The report of a dry run."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    assert gpu.main(["--dry", "--out", str(out)]) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def figures_of(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(part["figures"] for part in report["parts"] if part["name"] == name)


def test_a_dry_run_does_every_part(dry: Mapping[str, Any]) -> None:
    assert [part["name"] for part in dry["parts"]] == [part.name for part in gpu.PARTS]
    assert {part["name"]: part["error"] for part in dry["parts"] if part["status"] != "done"} == {}
    assert all(part["figures"] for part in dry["parts"])
    assert (dry["state"], dry["dry"]) == ("complete", True)


@pytest.mark.parametrize(
    "name", ["stage one, fp16", "stage one, fp32", "stage one, fp16, compiled", "stage one, fp32, compiled"]
)
def test_a_cache_is_measured_beyond_its_warm_up_and_audited(dry: Mapping[str, Any], name: str) -> None:
    figures = figures_of(dry, name)
    assert figures["prompts_per_second"] > 0
    assert 0.3 < figures["share_in_the_teacher"] <= 1.01
    # 4 steps of 2 prompts and 2 renoised states of each, both branches
    networks = figures["networks"]
    rows = {label: network["rows"] for label, network in networks.items() if label.startswith("float")}
    assert sum(rows.values()) == figures["counted_batches"] * 2 * 2 * (4 + 2)
    assert ("float16" in rows) == ("fp16" in name)
    for label in rows:
        operations = figures["operations_of_a_row"] * rows[label]
        assert networks[label]["tflops"] == pytest.approx(operations / networks[label]["seconds"] / 1e12, rel=1e-3)
    assert figures["audit"]["records"] == 4
    assert {"v_cond", "v_uncond", "features", "cond"} <= figures["audit"]["largest"].keys()
    assert all(largest["of_tolerance"] <= 1 for largest in figures["audit"]["largest"].values())


@pytest.mark.parametrize("overlay", ["80gb", "40gb", "24gb"])
def test_an_overlay_is_measured_under_its_own_settings(dry: Mapping[str, Any], overlay: str) -> None:
    figures = figures_of(dry, f"stage two, {overlay}")
    settings, forecast = figures["settings"], figures["forecast_gib"]
    assert settings["accumulate"] == (1 if overlay == "80gb" else 4)
    assert settings["gradient_checkpointing"] == (overlay == "24gb")
    assert figures["step_seconds"] > 0
    assert 0 <= figures["data_wait_share"] < 1
    parts = [value for name, value in forecast.items() if name != "total"]
    assert forecast["total"] == pytest.approx(sum(parts), rel=1e-3)


def test_ratios_are_those_of_one_run(dry: Mapping[str, Any]) -> None:
    figures = figures_of(dry, "stage two, peers")
    for loop in ("online", "diffusers"):
        ratio = figures[f"{loop}_seconds"] / figures["ours_seconds"]
        assert figures[f"{loop}_over_ours"] == pytest.approx(ratio, rel=1e-3)
    assert figures_of(dry, "stage two, settings").keys() >= {"plain", "muon", "channels_last", "both"}
    assert figures_of(dry, "stage two, compiled").keys() >= {"plain", "compile"}


def test_on_a_cpu_resuming_is_exact(dry: Mapping[str, Any]) -> None:
    figures = figures_of(dry, "resume")["fp32"]
    for run in ("same_run_again", "resumed"):
        assert figures[run]["unequal_tensors"] == 0, figures[run]
        assert figures[run]["equal_tensors"] > 500


def test_on_a_cpu_the_same_step_is_equal_and_micro_batches_nearly(dry: Mapping[str, Any]) -> None:
    figures = figures_of(dry, "micro-batches")["fp32"]
    assert figures["same_step_again"]["unequal_tensors"] == 0
    assert 0 < figures["accumulate_2"]["relative_difference"] < 1e-4
    assert figures["accumulate_2"]["loss"] == pytest.approx(figures["loss"], rel=1e-4)


def test_on_a_cpu_every_precision_is_fp32(dry: Mapping[str, Any]) -> None:
    for error in figures_of(dry, "precisions")["relative_squared_error"].values():
        assert error["computed_in"] == "fp32"
        assert error["velocity"] < 1e-6  # that of the stored velocities


def part(function: str, seconds: float = 60.0, **options: Any) -> Part:
    return Part(function, "a law", f"tests.train.gpu_parts:{function}", seconds, options.pop("least_seconds", 0.0))


def report_of(tmp_path: Path, executor: Executor, functions: Sequence[str | Part], seconds: float = 120) -> list[Any]:
    """The parts of the report after such parts."""
    parts = [part(one) if isinstance(one, str) else one for one in functions]
    report = Report(tmp_path / "gpu.json", parts, {})
    try:
        run_parts(parts, report, executor, seconds)
    finally:
        executor.close()
    content: list[Any] = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    return content


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "gpu.json")


def test_a_failure_is_one_line_and_the_next_part_goes_on(tmp_path: Path, settings: Settings) -> None:
    failed, memory, last = report_of(tmp_path, InProcess(settings), ["fails", "finds_no_memory", "measures"])
    assert (failed["status"], failed["error"]) == ("failed", "RuntimeError: a shape is wrong")
    assert memory["error"].startswith("out of memory: ")
    assert last["status"] == "done"
    assert last["figures"]["releases"] == 2  # what the failed ones held was given back


def test_a_used_budget_is_no_failure_and_keeps_its_figures(tmp_path: Path, settings: Settings) -> None:
    used, last = report_of(tmp_path, InProcess(settings), [part("uses_its_budget", 0.05), "measures"])
    assert (used["status"], used["figures"]) == ("budget used", {"steps": 3})
    assert "used up before another step" in used["error"]
    assert last["status"] == "done"


def test_the_report_is_whole_while_a_part_runs(tmp_path: Path, settings: Settings) -> None:
    (only,) = report_of(tmp_path, InProcess(settings), ["reads_the_report"])
    assert (only["status"], only["error"]) == ("done", None)


def test_no_part_begins_that_the_run_has_no_time_for(tmp_path: Path, settings: Settings) -> None:
    long, short = part("measures", 60, least_seconds=30), Part("short", "", "tests.train.gpu_parts:measures", 60, 1)
    left_out, done = report_of(tmp_path, InProcess(settings), [long, short], seconds=10)
    assert left_out["status"] == "left out"
    assert done["figures"]["budget"] <= 10  # and not its own 60


def test_a_process_is_ended_or_replaced_and_the_next_part_goes_on(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_process, "GRACE_SECONDS", 0.2)
    functions = ["fails", "breaks_the_device", "measures", "crashes", part("never_looks_at_its_budget", 3.0)]
    failed, broken, fresh, crashed, killed = report_of(tmp_path, OwnProcess(settings), functions)
    assert broken["figures"]["pid"] == failed["figures"]["pid"]  # an ordinary failure costs no new process
    assert fresh["figures"]["pid"] != broken["figures"]["pid"]
    assert (crashed["status"], crashed["error"]) == ("failed", "its process ended by SIGKILL")
    assert killed["status"] == "killed"
    assert killed["figures"] == {"begun": True, "infinite": "inf"}  # JSON knows no infinity


def test_an_interrupted_run_tells_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_world.Settings", lambda *_: Settings(tmp_path / "gpu.json"))
    parts = [part(one) for one in ("measures", "is_interrupted", "fails")]
    with pytest.raises(KeyboardInterrupt):
        gpu.run(parts, tmp_path / "gpu.json", 8, dry=True)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["state"] == "cut off"
    assert [one["status"] for one in content["parts"]] == ["done", "cut off", "left out"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "no GPU here"),
        (["--only", "stage two, 80"], "did you mean stage two, 80gb"),
        (["--dry", "--minutes", "0"], "--minutes 0"),
        (["--dry", "--minutes", "nan"], "--minutes nan"),
    ],
)
def test_a_wrong_call_is_one_line(
    words: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([*words, "--out", str(tmp_path / "gpu.json")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_card_is_known_by_its_name(name: str, half: float) -> None:
    peak = peak_of(name)
    assert peak is not None
    assert peak.half == half


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "Radeon", "cpu"])
def test_of_an_unknown_card_no_share_is_made_up(name: str) -> None:
    assert peak_of(name) is None
    assert str(shares_of_peak(1e12, torch.float16, name)["share_of_peak"]).startswith("unknown")


def test_a_share_is_of_the_peak_of_its_type() -> None:
    assert shares_of_peak(98.94e12, torch.float16, "NVIDIA H100 80GB HBM3") == {"share_of_peak": pytest.approx(0.1)}
    single = shares_of_peak(6.7e12, torch.float32, "NVIDIA H100 80GB HBM3")
    assert single == {"share_of_tf32_peak": pytest.approx(6.7 / 494.7), "share_of_fp32_peak": pytest.approx(0.1)}
    assert all(peak.half > peak.single for peak in CARDS)


def test_operations_count_attention_to_each_token() -> None:
    unet = UNet2DConditionModel.from_pretrained("stages/tiny/model/unet")
    one, two, three = (unet_operations(unet, tokens) for tokens in (24, 48, 72))
    assert one < two
    assert two - one == three - two


def test_only_what_json_knows_is_a_figure() -> None:
    assert as_json({"a": [0.123456789, float("nan"), True, 3]}) == {"a": [0.12346, "nan", True, 3]}
    with pytest.raises(TypeError):
        as_json(torch.zeros(1))
