"""Plans for rented GPUs that cannot be made: each is refused in one line."""

import json

import pytest

CACHE = ["cache-teacher", "--config", "configs/tiny.yaml", "--run"]
DISTILL = ["distill", "--config", "configs/tiny.yaml", "--run"]


@pytest.mark.parametrize("command", [CACHE, DISTILL], ids=["cache-teacher", "distill"])
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--plan", "--gpus", "8", "--gpu", "h1000"], ["h1000", "h100", "l40s", "t4"]),
        (["--plan", "--gpus", "8", "--gpu", "potato"], ["potato", "h100", "l40s", "t4"]),
        (["--plan", "--gpus", "0", "--gpu", "h100"], ["gpus", "0"]),
        (["--plan", "--gpus", "-3", "--gpu", "h100"], ["gpus", "-3"]),
        (["--plan", "--gpus", "8", "--gpu", "h100", "--price", "-2.5"], ["price", "-2.5"]),
        (["--plan", "--gpus", "8", "--gpu", "h100", "--price", "nan"], ["price"]),
        (["--gpus", "8", "--gpu", "h100"], ["gpus 8", "--plan"]),
        (["--price", "2.5"], ["price 2.5", "--plan"]),
        (["--plan", "--gpus", "8"], ["gpus 8", "--gpu"]),
        (["--plan", "--gpu", "h100"], ["gpu h100", "--gpus"]),
        (["--plan", "--gpus", "8", "--rates", "nowhere.json"], ["nowhere.json", "cannot be read"]),
    ],
)
def test_such_a_plan_is_refused(refused, tmp_path, command, words, named):
    refused([*command, str(tmp_path / "run"), *words], *named)


@pytest.mark.parametrize("words", [["--plan"], ["--plan", "--gpus", "8", "--gpu", "h100", "--windows", "4"]])
def test_distill_plans_its_distillation_for_gpus_alone(refused, tmp_path, words):
    refused([*DISTILL, str(tmp_path / "run"), *words], "plan true")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no file of benchmarks.gpu"),
        ("[1]", "no file of benchmarks.gpu"),
        ('{"parts": [{"name": "card"}]}', "no file of benchmarks.gpu"),
        ("[" * 100_000, "no file of benchmarks.gpu"),
        (json.dumps({"parts": [{"name": "card", "figures": {"name": "Radeon"}}]}), "Radeon"),
        (json.dumps({"parts": [{"name": "card", "figures": {"name": "NVIDIA L4"}}]}), "give --gpu l4"),
        (json.dumps({"parts": [{"name": "card", "figures": {"name": "NVIDIA H100"}}]}), "holds no rate"),
    ],
)
def test_a_file_without_rates_is_refused(refused, tmp_path, content, named):
    (tmp_path / "gpu.json").write_text(content)
    words = ["--plan", "--gpus", "8", "--gpu", "h100", "--rates", str(tmp_path / "gpu.json")]
    refused([*CACHE, str(tmp_path / "run"), *words], "gpu.json", named)
