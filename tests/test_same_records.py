"""A cache holds the same records whichever files its teacher was read from, and its identity says which they were."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from configs.load import load
from shards.manifest import Manifest
from stages import __main__ as cli
from stages import cache_teacher
from stages.nets.run_folder import Origin, load_run_teacher
from stages.system.refusal import Refused
from stages.teacher_files.source import TeacherMove, TeacherSource
from stages.teacher_files.variants import WEIGHT_FILES
from stages.upkeep import find_origin
from tests.fine_tunes import fine_tune
from tests.single_files import MODEL, folder_of, ldm_tensors, part_weights, saved

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
FEW = ["--count", "3", "--validation-count", "1", "--render.records-per-shard", "2", "--render.states.steps", "4"]
CONFIG, GRAMMAR = (Path(name).absolute() for name in ("configs/tiny.yaml", "stages/tiny/grammar.yaml"))
CONFIGS = ["--teacher.config", str(MODEL)]


@pytest.fixture(autouse=True, scope="module")
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def cache(run: Path, *words: str) -> Manifest:
    config = ["--run", str(run), *FEW, "--prompts.grammar", str(GRAMMAR), "--teacher", *words]
    cache_teacher.run(load(cache_teacher.Config, "cache_teacher", [CONFIG], config))
    return Manifest.open(run / "cache")


def shard_hashes(manifest: Manifest) -> list[tuple[str, str]]:
    return [(shard.file, shard.sha256) for shard in manifest.shards]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return cache(tmp_path_factory.mktemp("reference") / "run", str(MODEL))


def single(folder: Path) -> list[str]:
    return [str(saved(folder / "m.safetensors", ldm_tensors())), *CONFIGS]


def checkpoint(folder: Path) -> list[str]:
    torch.save({"state_dict": ldm_tensors(), "callbacks": {"x": torch.nn.ReLU()}}, folder / "m.ckpt")
    return [str(folder / "m.ckpt"), *CONFIGS]


def sharded(folder: Path) -> list[str]:
    """The UNet in two shards."""
    target = Path(shutil.copytree(MODEL, folder / "sharded"))
    file = target / "unet" / WEIGHT_FILES["unet"][0]
    file.unlink()
    names = [f"{file.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(part_weights("unet"))}
    for shard in names:
        saved(file.with_name(shard), {n: v for n, v in part_weights("unet").items() if where[n] == shard})
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return [str(target)]


SOURCES: dict[str, Callable[[Path], list[str]]] = {
    "a single .safetensors": single,
    "a .ckpt with foreign objects": checkpoint,
    ".bin files": lambda folder: [str(folder_of(folder / "bin", "", "bin"))],
    "shards": sharded,
    "fp16 files alone, of the same values": lambda folder: [str(folder_of(folder / "half", "fp16", "variant"))],
}


@pytest.mark.parametrize("name", SOURCES)
def test_records_are_the_same_and_the_identity_says_the_files(name: str, tmp_path: Path, reference: Manifest) -> None:
    words = SOURCES[name](tmp_path)
    manifest = cache(tmp_path / "run", *words)
    assert shard_hashes(manifest) == shard_hashes(reference)
    assert manifest.recipe.identity["teacher"] != reference.recipe.identity["teacher"]
    named = [file["path"] for file in manifest.recipe.information["teacher_files"]]  # type: ignore[index,union-attr,call-overload]
    assert named
    assert all(str(path).startswith(words[0]) for path in named)


def test_a_mix_of_one_model_of_weight_1_has_the_records_of_that_model_and_is_found_again(
    tmp_path: Path, reference: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(MODEL, tmp_path / "here/model")
    monkeypatch.chdir(tmp_path / "here")
    words = [str(fine_tune(tmp_path / "base", 1)), "--teacher.mix", "[{model: model, weight: 1}]"]
    manifest = cache(tmp_path / "run", *words)
    assert shard_hashes(manifest) == shard_hashes(reference)
    monkeypatch.chdir(tmp_path)
    (one,) = find_origin(tmp_path / "run/cache").teacher_source().mix
    assert (one.model, one.weight) == (str(tmp_path / "here/model"), 1.0)
    origin = Origin.from_manifest(manifest)
    assert load_run_teacher(origin, CPU, torch.float32).change_facts["mix"][0]["name"] == "model"
    moved = (tmp_path / "here/model").rename(tmp_path / "moved")
    there = TeacherMove.model_validate({"mix": [{"model": str(moved), "weight": 1}]})
    assert load_run_teacher(origin.with_teacher(there), CPU, torch.float32).change_facts["mix"][0]["name"] == "moved"


def test_two_workers_make_the_same_cache_of_a_single_file(tmp_path: Path, reference: Manifest) -> None:
    assert shard_hashes(cache(tmp_path / "run", *single(tmp_path), "--workers", "2")) == shard_hashes(reference)


def test_a_file_that_moved_is_opened_where_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    saved(Path("m.safetensors"), ldm_tensors())
    manifest = cache(tmp_path / "run", "m.safetensors", *CONFIGS, "--teacher.clip-skip", "1")
    monkeypatch.chdir(tmp_path)
    origin = Origin.from_manifest(manifest)
    assert load_run_teacher(origin, CPU, torch.float32).text_encoder.config.num_hidden_layers == 2
    assert find_origin(tmp_path / "run/cache").teacher_location() == str(tmp_path / "home/m.safetensors")
    origin.save(tmp_path)
    assert Origin.open(tmp_path) == origin
    moved = (tmp_path / "home/m.safetensors").rename(tmp_path / "n.safetensors")
    with pytest.raises(Refused, match=r"no model lies there any more.*--teacher"):
        load_run_teacher(origin, CPU, torch.float32)
    there = origin.with_teacher(TeacherMove(location=str(moved)))
    assert load_run_teacher(there, CPU, torch.float32).name_facts == {"teacher": "n"}
    saved(moved, {name: 1.5 * value for name, value in ldm_tensors().items()})
    with pytest.raises(Refused, match="unet, vae, text_encoder changed since the cache was made"):
        load_run_teacher(there, CPU, torch.float32)


def test_a_composed_teacher_is_audited_and_its_cache_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = cache(tmp_path / "run", *single(tmp_path))
    folder = str(tmp_path / "run/cache")
    assert cli.main(["shards", "verify", folder, "--deep", "--sample", "1", "--device", "cpu"]) == 0
    moved = (tmp_path / "m.safetensors").rename(tmp_path / "n.safetensors")
    (tmp_path / "run/cache" / manifest.shards[0].file).unlink()
    assert cli.main(["shards", "repair", folder, "--teacher", str(moved)]) == 0
    assert shard_hashes(Manifest.open(tmp_path / "run/cache")) == shard_hashes(manifest)
    capsys.readouterr()


def test_a_bare_value_in_yaml_or_behind_the_option_is_the_location(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("cache_teacher: {teacher: X}\n")
    (tmp_path / "b.yaml").write_text("cache_teacher: {teacher: {vae: V, zero_terminal_snr: true}}\n")
    words = ["--run", "r", "--prompts.grammar", str(GRAMMAR)]

    def teacher(*more: str, files: str = "ab") -> TeacherSource:
        paths = [CONFIG, *(tmp_path / f"{name}.yaml" for name in files)]
        return load(cache_teacher.Config, "cache_teacher", paths, [*words, *more]).teacher

    both = TeacherSource(location="X", vae="V", zero_terminal_snr="true")
    assert teacher() == both
    assert teacher("--teacher", "Y") == teacher("--teacher=Y") == teacher("--teacher.location", "Y") == both.at("Y")
    assert teacher("--teacher.clip-skip", "2").clip_skip == 2
    loras = teacher("--teacher.loras", "[{file: a.safetensors, scale: .5}]").loras
    assert [(lora.file, lora.scale) for lora in loras] == [("a.safetensors", 0.5)]
