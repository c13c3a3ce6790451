"""Broken files, outputs that cannot be written and devices that are not there, each refused in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers.utils import logging

from shards.manifest import MANIFEST_FILE as MANIFEST
from shards.table import write_table
from shards.writer import CacheWriter
from stages.cache.targets import RenderConfig, StatesConfig, make_records, recipe_of
from stages.nets.components import load_components
from stages.nets.run_folder import Origin
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.system.device import devices
from stages.train.block_weighter import DavidConfig

MODEL = "stages/tiny/model"
LINE = {"samples": 4, "lambdas": {}}
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What caching and distillation write, as far as a command reads it before the refusal."""
    root = tmp_path_factory.mktemp("runs") / "run"
    teacher = Teacher(load_components(MODEL, torch.device("cpu"), torch.float32), "hold")
    states = StatesConfig(steps=3, trajectory_states=2, renoised_states=1)
    writer = CacheWriter(root / "cache", recipe_of(teacher, RenderConfig(states=states), {"source": "test"}))
    prompts = [Prompt("a red star", "star/red", 1), Prompt("a blue ring", "ring/blue", 2)]
    for split in ("train", "validation"):
        writer.add(split, 0, make_records(teacher, prompts, ["000000000", "000000001"], states))
    write_table(root / "cache")
    checkpoint = root / "distill/checkpoints/000000064"
    checkpoint.mkdir(parents=True)
    save_file(Student.from_teacher(teacher.components.unet).state_dict(), checkpoint / "ema.safetensors")
    Origin.from_manifest(writer.manifest, MODEL).save(root / "distill")
    (root / "cache.yaml").write_text(
        f"cache_teacher: {{run: {root}, teacher: {MODEL}, prompts: {{source: symbolic}}}}\n"
    )
    settings = {"distill": {"david": DavidConfig().model_dump(mode="json"), "graft": True}}
    (root / "distill/config.yaml").write_text(yaml.safe_dump(settings))
    (root / "distill/journal.jsonl").write_text(json.dumps(LINE) + "\n")
    return root


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The same, a test's own."""
    logging.disable_progress_bar()
    return Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xff no such thing" * 9)


def folder(path: Path) -> None:
    """A folder in the place of a file."""
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)


def file(path: Path) -> None:
    """A file in the place of a folder."""
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("in the way\n")


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def text(content: str | bytes) -> Break:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def changed(**changes: object) -> Break:
    """A JSON object with other values."""
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def nothing(path: Path) -> None:
    """Leave all as it is: the words are what is wrong."""


RUN = "{run}/distill"
SAMPLE = ["sample", RUN, "a star", "--steps", "1", "--seeds", "0", "--out"]
EVALUATE = ["evaluate", RUN, "--config", "configs/tiny.yaml"]
SUGGEST = ["classes", "suggest", RUN, "--config", "configs/tiny.yaml", "--probe", "2", "--device", "cpu"]
DAVID = ["david", "show", RUN, "--states", "2"]
CACHE = ["cache-teacher", "--config", "configs/tiny.yaml", "--count", "2", "--validation-count", "2", "--run"]
IMPORT = ["import", "{run}/e.pt", "--teacher", MODEL, "--out"]
TAR, ORIGIN, EMA = "cache/data/train-000000.tar", "distill/origin.json", "distill/checkpoints/000000064/ema.safetensors"

TABLE: dict[str, tuple[Break, str, list[str], list[str]]] = {
    # name: (how, what is broken, the command, what its line names)
    "a manifest that is cut": (cut, f"cache/{MANIFEST}", ["shards", "stats", "{run}"], ["manifest.json", "repair"]),
    "a manifest that is a folder": (folder, f"cache/{MANIFEST}", ["shards", "stats", "{run}"], ["manifest.json"]),
    "a manifest that is a pipe": (pipe, f"cache/{MANIFEST}", ["shards", "export-index", "{run}"], ["manifest.json"]),
    "a shard that is cut": (cut, TAR, ["shards", "show", "{run}", "--no-picture"], ["train-000000.tar", "repair"]),
    "a shard of garbage": (garbage, TAR, ["shards", "stats", "{run}"], ["train-000000.tar", "0 records"]),
    "a shard that is a link to itself": (loop, TAR, ["shards", "export-index", "{run}"], ["train-000000.tar"]),
    "a cache that is a file": (nothing, "", ["shards", "verify", "README.md"], ["README.md"]),
    "a cache whose name is too long": (nothing, "", ["shards", "verify", "x" * 300], ["xxx", "255 bytes"]),
    "a word too many": (nothing, "", ["shards", "show", "{run}", "--no-picture", "a", "b"], ["shards", "b"]),
    "no folder at all": (nothing, "", ["shards", "verify"], ["shards verify", "FOLDER"]),
    "a quarantine that is a file": (
        lambda path: (cut(path), file(path.parent.parent / "quarantine")),
        TAR,
        ["shards", "repair", "{run}"],
        ["quarantine"],
    ),
    "a record drawn into a folder": (
        nothing,
        "",
        ["shards", "show", "{run}", "--picture", "{run}"],
        ["run: cannot be written (Is a directory)"],
    ),
    "an origin that is a list": (text("[]"), ORIGIN, [*SAMPLE, "{run}/a.png"], ["origin.json"]),
    "an origin of absurd depth": (text("[" * 100_000), ORIGIN, [*SAMPLE, "{run}/a.png"], ["origin.json"]),
    "an origin with a number for a policy": (
        changed(tail=5),
        ORIGIN,
        [*SAMPLE, "{run}/a.png"],
        ["origin.json", "tail"],
    ),
    "an origin without identities": (changed(teacher_sha256=3), ORIGIN, EVALUATE, ["origin.json", "teacher_sha256"]),
    "an origin of unknown adapters": (changed(lora={"rang": 1}), ORIGIN, DAVID, ["origin.json", "rang"]),
    "weights that are cut": (cut, EMA, ["export", RUN, "--out", "{run}/out"], ["ema.safetensors"]),
    "weights that are a folder": (folder, EMA, ["export", RUN, "--out", "{run}/out"], ["ema.safetensors"]),
    "a journal with half a row": (
        text(f'{json.dumps(LINE)}\n{{"samples": 8, "lam\n{json.dumps(LINE)}\n'),
        "distill/journal.jsonl",
        DAVID,
        ["journal.jsonl:2"],
    ),
    "a journal that is a folder": (folder, "distill/journal.jsonl", DAVID, ["journal.jsonl"]),
    "a journal that is a pipe": (pipe, "distill/journal.jsonl", DAVID, ["journal.jsonl"]),
    "a journal that is not UTF-8": (text(b"\xe9\n"), "distill/journal.jsonl", DAVID, ["journal.jsonl:1"]),
    "a journal of other things": (text("[]\n"), "distill/journal.jsonl", DAVID, ["journal.jsonl:1"]),
    "settings that are not UTF-8": (text(b"distill: {\xe9: 1}"), "distill/config.yaml", DAVID, ["config.yaml"]),
    "settings that are a word": (text("distill: word"), "distill/config.yaml", DAVID, ["config.yaml", "word"]),
    "settings that are cut": (text("distill:\n  a: [1"), "distill/config.yaml", SUGGEST, ["config.yaml"]),
    "settings of another program": (
        text("distill: {david: {gadget: 3}}"),
        "distill/config.yaml",
        DAVID,
        ["config.yaml", "distill.david.gadget"],
    ),
    "a table half there": (lambda p: shutil.rmtree(p), "cache/table.zarr/class/c", SUGGEST, ["table.zarr/class/c/0"]),
    "a table without its head": (Path.unlink, "cache/table.zarr/zarr.json", SUGGEST, ["table.zarr"]),
    "a column that is cut": (cut, "cache/table.zarr/draw/c/0", SUGGEST, ["table.zarr/draw/c/0"]),
    "figures of another program": (
        text('{"samples": 64, "fidelity": [1], "paired": 3}'),
        "distill/evaluation.json",
        ["export", RUN, "--out", "{run}/out"],
        ["evaluation.json"],
    ),
    "a checkpoint's statement that is a list": (
        text("[]"),
        "distill/checkpoints/000000064/state.json",
        ["export", RUN, "--to", "pt", "--out", "{run}/out"],
        ["state.json"],
    ),
    "an export with an empty description": (
        lambda path: (path.parent.mkdir(parents=True), path.write_text("{}")),
        "distill/export/diffusers/sollune.json",
        ["export", RUN, "--verify"],
        ["sollune.json", "dtype"],
    ),
    "a checkpoint to import that is a folder": (folder, "e.pt", [*IMPORT, "{run}/new"], ["e.pt"]),
    "a checkpoint to import that is a pipe": (pipe, "e.pt", [*IMPORT, "{run}/new"], ["e.pt"]),
    "a checkpoint to import of garbage": (garbage, "e.pt", [*IMPORT, "{run}/new"], ["e.pt"]),
    "an import into a file": (nothing, "", [*IMPORT, "README.md"], ["README.md", "Not a directory"]),
    "pictures that are a folder": (folder, "a.png", [*SAMPLE, "{run}/a.png"], ["a.png", "is a folder"]),
    "pictures below a file": (nothing, "", [*SAMPLE, "README.md/a.png"], ["README.md", "Not a directory"]),
    "pictures behind a link to nowhere": (
        lambda path: path.symlink_to("nowhere/at/all"),
        "link",
        [*SAMPLE, "{run}/link/a.png"],
        ["link"],
    ),
    "pictures whose name is too long": (nothing, "", [*SAMPLE, f"{{run}}/{'x' * 300}.png"], ["255 bytes"]),
    "a drawing into a pipe": (pipe, "seen", [*DAVID, "--out", "{run}/seen"], ["seen", "pipe"]),
    "an evaluation that is a folder": (folder, "distill/evaluation.json", EVALUATE, ["evaluation.json"]),
    "a class file below a file": (nothing, "", [*SUGGEST, "--out", "README.md/a.yaml"], ["README.md/a.yaml"]),
    "a cache below a file": (nothing, "", [*CACHE, "README.md"], ["README.md", "Not a directory"]),
    "a cache behind a link to nowhere": (
        lambda path: path.symlink_to("nowhere"),
        "link",
        [*CACHE, "{run}/link"],
        ["link"],
    ),
    "a cache behind a link to itself": (
        lambda path: path.symlink_to("link"),
        "link",
        [*CACHE, "{run}/link"],
        ["link"],
    ),
    "a word that is no text": (nothing, "", ["sample", "run\udcff", "a star"], ["byte FF"]),
}


@pytest.mark.parametrize("name", TABLE)
def test_broken_files_are_refused(name: str, run: Path, refused: Callable[..., str]) -> None:
    broken, where, words, named = TABLE[name]
    broken(run / where)
    refused([word.replace("{run}", str(run)) for word in words], *named)


DEVICES = (
    "mps",
    "xpu",
    "meta",
    "cuda:7",
    "nonsense",
    "cpu:3",
    "",
    "cuda:-1",
    "vulkan",
    "hpu",
    "mkldnn",
    "privateuseone",
)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_is_tried_before_anything_else(device: str, run: Path, refused: Callable[..., str]) -> None:
    if device in {one.partition(":")[0] for one in devices()} | {*devices()}:
        pytest.skip("it is there")
    message = refused([*SAMPLE[:1], MODEL, *SAMPLE[2:], str(run / "a.png"), "--device", device], f"device {device}: ")
    assert "use auto or cpu" in message


@pytest.mark.parametrize("words", [EVALUATE, SUGGEST[:-2], ["shards", "verify", "{run}", "--deep"]])
def test_every_command_tries_its_device_before_it_reads_a_broken_run(
    words: list[str], run: Path, refused: Callable[..., str]
) -> None:
    shutil.rmtree(run / "distill/checkpoints")
    garbage(run / TAR)
    refused([*(word.replace("{run}", str(run)) for word in words), "--device", "meta"], "device meta: ")


def test_what_stands_in_the_place_of_a_folder_is_moved_aside_by_repair(run: Path) -> None:
    from shards.verify import quarantine

    file(run / "cache/data")
    file(run / "cache/journal")
    moved = quarantine(run / "cache")
    assert [path.name for path in moved] == ["data", "journal"]
    assert all(path.read_text() == "in the way\n" for path in moved)
    assert not (run / "cache/data").exists()
