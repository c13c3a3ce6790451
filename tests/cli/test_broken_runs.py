"""Run folders: a refused command changes, loses and shares nothing, to the last file."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from stages import __main__ as cli
from stages.nets.original_checkpoint import CHECKPOINT_KEYS
from stages.system.ownership import CLAIM_FILE as CLAIM
from stages.system.ownership import boot_id, machine_id, pid_namespace, process_token

TINY = ["--config", "configs/tiny.yaml"]
CACHE = ["--count", "8", "--validation-count", "2", "--render.records-per-shard", "4", "--render.states.steps", "4"]
TRAIN = ["--train.max-samples", "11", "--train.batch-size", "4", "--train.checkpoint-every-samples", "8"]
TRAIN += ["--train.optimizer.warmup-samples", "4"]
DISTILL = [*TRAIN, "--david.fit.steps", "3", "--david.fit.bins", "10", "--david.fit.patterns", "4"]
DISTILL += ["--validation.states", "6", "--grid.sampler.steps", "2"]
CLASSES = [*TRAIN, "--count", "5", "--exam.pictures", "2", "--exam.sampler.steps", "2", "--gate.score", "0"]
CLASSES += ["--render.records-per-shard", "4", "--render.states.steps", "4"]
CLASS_FILE = """
classes:
  - {name: stars, pattern: star/*, priority: top}
  - {name: rest, pattern: "[!s]*", priority: low}
"""


def cache_teacher(run: Path, *words: str) -> list[str]:
    return ["cache-teacher", *TINY, "--run", str(run), *CACHE, *words]


def distill(run: Path, *words: str) -> list[str]:
    return ["distill", *TINY, "--run", str(run), *DISTILL, *words]


def finetune(run: Path, *words: str) -> list[str]:
    return ["finetune-classes", *TINY, "--run", str(run), "--classes", str(run / "input.yaml"), *CLASSES, *words]


@pytest.fixture(scope="module", autouse=True)
def _no_bars() -> Iterator[None]:
    """No progress bars, as in the command line, where a variable disables them when libraries are imported."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after all three commands, which no test may change."""
    run = tmp_path_factory.mktemp("runs") / "miniature"
    run.mkdir()
    (run / "input.yaml").write_text(CLASS_FILE)
    for words in (cache_teacher(run), distill(run), finetune(run)):
        assert cli.main(words) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A test's own copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def claim(folder: Path, word: str, process: int, host: str = "elsewhere", **more: str) -> None:
    (folder / CLAIM).write_text(json.dumps({"owner": word, "process": process, "host": host, **more}))


def here(folder: Path) -> None:
    """This very process works there."""
    claim(folder, process_token(), os.getpid(), socket.gethostname(), machine=machine_id(), boot=boot_id())


def of_another_host(folder: Path) -> None:
    claim(folder, "77-5@elsewhere-00000000", 77)


def flip(file: Path) -> None:
    """One bit of a file's middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def without(*parts: str):
    """Take parts of the run folder away."""

    def take(run: Path) -> None:
        for part in parts:
            shutil.rmtree(run / part) if (run / part).is_dir() else (run / part).unlink()

    return take


def wrote(name: str, content: str):
    """Put a file of one's own into the run folder."""

    def put(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)

    return put


def edited(name: str, old: str, new: str):
    """Change a word of a file in the run folder."""

    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return change


def nothing(_run: Path) -> None:
    pass


def in_folder(name: str, act):
    return lambda run: act(run / name)


def tensors_of_their_own(file: Path) -> None:
    save_file({"weight": torch.ones(2)}, file)


def in_the_place_of_the_run(run: Path) -> None:
    shutil.rmtree(run / "distill")
    (run / "distill").write_text("mine")


def header_rewritten(run: Path) -> None:
    """What tools for metadata do to a single file."""
    from stages.export import folder as ours
    from stages.export import tensorfile
    from stages.export.verify_export import read_tensors

    file = run / "distill/export/model-flow.safetensors"
    tensorfile.write(run / "edited", read_tensors(file), ours.read_header(file) | {"modelspec.author": "me"})
    (run / "edited").replace(file)


DISTILLING = {
    "another learning rate": (nothing, ["--train.optimizer.learning-rate", "0.5"], ["learning_rate was 0.001, is 0.5"]),
    "longer training": (nothing, ["--train.max-samples", "20"], ["max_samples was 11, is 20"]),
    "another seed": (nothing, ["--train.seed", "9"], ["train.seed was 0, is 9"]),
    "another weight of the blocks": (nothing, ["--objective.block-weight", "0.9"], ["block_weight was 0.2, is 0.9"]),
    "another half of the target": (nothing, ["--graft", "false"], ["graft was True, is False"]),
    "a run where none may be": (nothing, ["--resume", "never"], ["holds a run already"]),
    "micro-batches that do not divide": (
        nothing,
        ["--train.accumulate", "3"],
        ["train.batch_size = 4", "multiple of 3"],
    ),
    "processes that do not divide": (nothing, ["--processes", "3"], ["processes = 3", "train.batch_size = 4"]),
    "processes beyond all cores": (
        nothing,
        ["--processes", "4096", "--train.batch-size", "4096"],
        ["processes = 4096", "cores"],
    ),
    "the rate of an unknown block": (
        without("distill/checkpoints"),
        ["--train.optimizer.block-rates", '{"down_9": 1}'],
        ["block_rates.down_9"],
    ),
    "the weight of an unknown block": (
        without("distill/checkpoints"),
        ["--objective.block-weights", '{"down_9": 1}'],
        ["block_weights.down_9"],
    ),
    "weights of David's own": (
        without("distill"),
        ["--david.fusion.block-weights", '{"down_3": 1}'],
        ["david.fusion.block-weights"],
    ),
    "a David of another fit": (without("distill/checkpoints"), ["--david.fit.bins", "5"], ["David was fitted"]),
    "a David who is absent": (without("distill"), ["--david.published", "absent"], ["absent"]),
    "a David with another state": (without("distill/david/david.safetensors"), [], ["david.safetensors"]),
    "an optimizer without its library": (
        without("distill"),
        ["--train.optimizer.kind", "adamw_8bit"],
        ["adamw_8bit", "pip install"],
    ),
    "a tracker that is not installed": (nothing, ["--train.tracking.to", "wandb"], ["wandb", "pip install"]),
    "a hub without a token": (without("distill"), ["--hub.repo", "org/name"], ["hub org/name", "no token"]),
    "a view of nothing": (without("distill"), ["--view.steps", "5000:5001"], ["view"]),
    "a shard with a wrong bit": (in_folder("cache/data/train-000001.tar", flip), [], ["train-000001.tar"]),
    "a shard with a wrong bit, a new run": (
        lambda run: (shutil.rmtree(run / "distill"), flip(run / "cache/data/train-000000.tar")),
        [],
        ["train-000000.tar"],
    ),
    "no table of the features": (without("cache/table.zarr"), [], ["table"]),
    "a cache that is gone": (without("cache"), [], ["cache"]),
    "another process in the folder": (in_folder("distill", here), [], [f"process {os.getpid()}", socket.gethostname()]),
    "a process on another host": (in_folder("distill", of_another_host), [], ["process 77", "elsewhere", "remove"]),
    "a claim that cannot be read": (wrote("distill/.claim", "{"), [], [".claim", "remove it"]),
    "a model card that was edited": (
        edited("distill/export/diffusers/README.md", "## Use", "## My use"),
        [],
        ["README.md"],
    ),
    "a scheduler that was edited": (
        edited("distill/export/diffusers/scheduler/scheduler_config.json", '"flow_shift"', '"shift"'),
        [],
        ["scheduler/scheduler_config.json"],
    ),
    "facts that were edited": (
        edited("distill/export/diffusers/sollune.json", '"tail": "hold"', '"tail": "mine"'),
        [],
        ["sollune.json"],
    ),
    "a workflow that was edited": (
        edited("distill/export/workflow-comfyui.json", "a lighthouse", "mine"),
        [],
        ["workflow"],
    ),
    "a single file of their own": (
        in_folder("distill/export/model-flow.safetensors", tensors_of_their_own),
        [],
        ["model-flow.safetensors"],
    ),
    "a single file with a header of their own": (header_rewritten, [], ["model-flow.safetensors"]),
    "a folder of their own": (
        lambda run: (shutil.rmtree(run / "distill/export"), wrote("distill/export/diffusers/mine.txt", "mine")(run)),
        [],
        ["no export of ours"],
    ),
    "a file in the place of the run": (in_the_place_of_the_run, [], ["distill"]),
}


@pytest.mark.parametrize("name", DISTILLING)
def test_a_distillation_that_is_refused_changes_nothing(name, run, refused, monkeypatch):
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.setenv(variable, str(run / "absent") if variable.endswith("PATH") else "")
    before, words, named = DISTILLING[name]
    before(run)
    refused(distill(run, *words), *named)


FINETUNING = {
    "another learning rate": (
        nothing,
        ["--train.optimizer.learning-rate", "0.5"],
        ["learning_rate was 0.0002, is 0.5"],
    ),
    "another share of the prior": (nothing, ["--prior-share", "0.5"], ["prior_share was 0.3, is 0.5"]),
    "a share that leaves no rows": (nothing, ["--prior-share", "0.05"], ["prior_share = 0.05"]),
    "other pictures": (nothing, ["--count", "4"], ["4"]),
    "a gate that sets all aside": (nothing, ["--gate.score", "1.5"], ["class 'stars'", "gate.score"]),
    "a gate with another threshold": (nothing, ["--gate.duplicate", "0.5"], ["pictures was"]),
    "a scorer that is absent": (nothing, ["--gate.clip", "absent/model"], ["clip"]),
    "adapters on a run without": (nothing, ["--lora.rank", "2"], ["lora"]),
    "a stop by a score without a scorer": (
        without("classes"),
        ["--scorer", "null", "--stop.most-lost", "2"],
        ["stop.most_lost"],
    ),
    "a class without prompts": (edited("input.yaml", "star/*", "galaxy/*"), [], ["stars"]),
    "a class file that is gone": (without("input.yaml"), [], ["input.yaml"]),
    "the rate of an unknown block": (
        without("classes"),
        ["--train.optimizer.block-rates", '{"down_9": 1}'],
        ["down_9"],
    ),
    "a tracker that is not installed": (without("classes"), ["--train.tracking.to", "wandb"], ["wandb"]),
    "processes that do not divide": (without("classes"), ["--processes", "3"], ["processes = 3"]),
    "no distilled run": (without("distill"), [], ["distill"]),
    "a cache that is gone": (without("cache", "classes"), [], ["cache"]),
    "another process in the folder": (in_folder("classes", here), [], [f"process {os.getpid()}"]),
    "a model card that was edited": (
        edited("classes/export/diffusers/README.md", "## Use", "## My use"),
        [],
        ["README.md"],
    ),
}


@pytest.mark.parametrize("name", FINETUNING)
def test_a_fine_tuning_that_is_refused_changes_nothing(name, run, refused):
    before, words, named = FINETUNING[name]
    before(run)
    refused(finetune(run, *words), *named)


CACHING = {
    "another recipe": (["--render.states.steps", "5"], ["steps was 4, is now 5"]),
    "fewer prompts": (["--count", "4"], ["holds 8 train prompts"]),
    "shards that are not there": (["--shard-range", "0:9"], ["shard_range = 0:9"]),
    "workers beyond all cores": (["--count", "12", "--workers", "4096"], ["workers = 4096", "cores"]),
    "a cluster without its library": (["--count", "12", "--cluster", "ray:absent:1"], ["ray"]),
}


@pytest.mark.parametrize("name", CACHING)
def test_a_caching_that_is_refused_changes_nothing(name, run, refused, monkeypatch):
    words, named = CACHING[name]
    if "ray" in named:
        monkeypatch.setattr("stages.cache.engines.find_spec", lambda _name: None)
    refused(cache_teacher(run, *words), *named)


def export(run: Path, *words: str) -> list[str]:
    return ["export", str(run / "distill"), *words]


EXPORTING = {
    "two wishes that exclude each other": (nothing, ["--unet-only", "--single-file", "false"], ["--unet-only"]),
    "a checkpoint that is absent": (nothing, ["--checkpoint", "5"], ["no checkpoint at 5"]),
    "a single file of their own": (
        in_folder("distill/export/mine-flow.safetensors", tensors_of_their_own),
        ["--name", "mine"],
        ["mine-flow.safetensors"],
    ),
    "a checkpoint of their own": (
        lambda run: torch.save(
            {part: {} for part in CHECKPOINT_KEYS} | {"gstep": 1}, run / "distill/export/model-flow.pt"
        ),
        ["--to", "pt"],
        ["model-flow.pt"],
    ),
    "a file where the variant belongs": (
        wrote("distill/export/diffusers/unet/diffusion_pytorch_model.fp16.safetensors", "mine"),
        ["--dtype", "both"],
        ["fp16.safetensors", "not ours"],
    ),
    "another process in the folder": (in_folder("distill/export", here), [], [f"process {os.getpid()}"]),
    "an evaluation that cannot be read": (wrote("distill/evaluation.json", "{"), [], ["evaluation.json"]),
    "a file in the place of the folder": (wrote("there", "mine"), ["--out", "RUN/there"], ["there"]),
}


@pytest.mark.parametrize("name", EXPORTING)
def test_an_export_that_is_refused_changes_nothing(name, run, refused):
    before, words, named = EXPORTING[name]
    before(run)
    refused(export(run, *(word.replace("RUN", str(run)) for word in words)), *named)


def evaluate(run: Path) -> list[str]:
    few = [
        "--fidelity.prompts",
        "2",
        "--fidelity.control-prompts",
        "1",
        "--fidelity.steps",
        "1",
        "--velocity-states",
        "4",
    ]
    paired = ["--paired.prompts", "2", "--paired.steps", "1", "--paired.reference-steps", "2"]
    return ["evaluate", str(run / "distill"), *TINY, *few, *paired]


@pytest.mark.parametrize(
    ("before", "named"),
    [(without("cache"), ["cache"]), (without("distill/export/diffusers"), ["sollune export"])],
    ids=["a cache that is gone", "an export that is gone"],
)
def test_an_evaluation_that_is_refused_changes_nothing(before, named, run, refused):
    before(run)
    refused(evaluate(run), *named)


def test_an_import_that_is_refused_makes_no_folder(run, refused):
    assert cli.main(export(run, "--to", "pt")) == 0
    content = torch.load(run / "distill/export/model-flow.pt", weights_only=True)
    content["cfg"]["tail"] = "bent"
    torch.save(content, run / "bent.pt")
    words = ["import", str(run / "bent.pt"), "--teacher", "stages/tiny/model", "--out", str(run / "new" / "folder")]
    refused(words, "cfg.tail", "bent")


def test_a_disk_that_is_full_is_refused_before_the_first_folder(run, refused, monkeypatch):
    shutil.rmtree(run / "distill")
    monkeypatch.setattr("stages.train.checkpoint.shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    refused(distill(run), "MiB free", "a checkpoint takes")


def test_processes_beyond_the_memory_are_refused_with_both_figures(run, refused, monkeypatch):
    monkeypatch.setattr("stages.system.memory.available_bytes", lambda: 10**8)
    monkeypatch.setattr("stages.system.memory.MOST_PER_CORE", 10**6)
    monkeypatch.setattr("stages.train.runtime.run_processes", lambda *_: pytest.fail("a process was started"))
    refused(distill(run, "--processes", "4"), "processes = 4", "GiB of memory", "0.1 GiB are free")


def test_a_card_keeps_the_training_settings_after_a_refusal(run, refused):
    card = run / "distill/export/diffusers/README.md"
    before, settings = card.read_text(), (run / "distill/config.yaml").read_text()
    refused(distill(run, "--train.optimizer.learning-rate", "0.5"), "learning_rate")
    assert cli.main(export(run)) == 0
    assert card.read_text() == before
    assert "learning_rate: 0.001" in before
    assert (run / "distill/config.yaml").read_text() == settings


def test_a_setting_that_may_change_is_stored_with_its_new_value(run):
    assert cli.main(distill(run, "--train.journal-every-samples", "4")) == 0
    stored = yaml.safe_load((run / "distill/config.yaml").read_text())["distill"]["train"]
    assert stored["journal_every_samples"] == 4


def dead(folder: Path) -> None:
    claim(
        folder, f"{os.getpid()}-1@{pid_namespace()}", os.getpid(), socket.gethostname()
    )  # the number was given out again


def before_the_last_start(folder: Path) -> None:
    claim(folder, "77-5@here-00000000", 77, socket.gethostname(), machine=machine_id(), boot="another")


def begun(folder: Path) -> None:
    (folder / CLAIM).touch()


@pytest.mark.parametrize("leave", [dead, before_the_last_start, begun])
def test_the_claim_of_a_dead_process_is_taken_over_and_ends_with_the_run(leave, run, monkeypatch):
    monkeypatch.setattr("stages.system.ownership.machine_id", lambda: "this machine")
    leave(run / "distill")
    if leave is before_the_last_start:
        content = json.loads((run / "distill" / CLAIM).read_text()) | {"machine": "this machine"}
        (run / "distill" / CLAIM).write_text(json.dumps(content))
    assert cli.main(distill(run)) == 0
    assert not (run / "distill" / CLAIM).exists()
