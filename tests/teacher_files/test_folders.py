"""Folders and hub repositories: which weights are read, and that exactly those are fetched."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors

from stages.nets.components import load_components
from stages.system.refusal import Refused
from stages.teacher_files import hub
from stages.teacher_files.folder import component_digests, component_files
from stages.teacher_files.open import open_teacher_files
from stages.teacher_files.source import TeacherSource
from stages.teacher_files.variants import WEIGHT_FILES, choose_weights, plain_name
from tests.single_files import MODEL, folder_of, ldm_tensors, saved

CPU = torch.device("cpu")
STEM = "diffusion_pytorch_model"


def named(*variants: str, ending: str = "safetensors") -> list[str]:
    return [f"{STEM}{f'.{variant}' if variant else ''}.{ending}" for variant in variants]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (named("fp16", "", "fp32"), ""),
        (named("fp16", "fp32"), "fp32"),
        (named("non_ema", "fp16"), "non_ema"),
        (named("non_ema", "ema_only"), "ema_only"),
        (named("bf16", "fp16"), "fp16"),
        (named("fp16.non_ema", "fp16"), "fp16"),
    ],
)
def test_of_several_variants_the_fullest_precision_is_read(names: list[str], taken: str) -> None:
    assert choose_weights({"unet": names})["unet"].variant == taken


def test_precision_comes_before_format_and_whole_files_before_shards() -> None:
    both = [*named("", ending="bin"), *named("fp16")]
    assert choose_weights({"vae": both})["vae"].name == f"{STEM}.bin"
    shards = [f"{STEM}.safetensors.index.json", f"{STEM}.bin"]
    assert choose_weights({"vae": shards})["vae"].name == shards[0]
    assert choose_weights({"vae": [*shards, f"{STEM}.safetensors"]})["vae"].name == f"{STEM}.safetensors"
    assert choose_weights({"vae": ["config.json", "notes.safetensors"]}) == {}


def test_one_variant_is_read_of_all_parts_where_they_share_one() -> None:
    chosen = choose_weights({"unet": named("ema_only", "non_ema"), "vae": named("non_ema")})
    assert {part: file.variant for part, file in chosen.items()} == {"unet": "non_ema", "vae": "non_ema"}


@pytest.mark.parametrize("name", ["X.fp16.safetensors.index.json", "X.safetensors.index.fp16.json"])
def test_the_index_of_a_variant_has_the_plain_name_for_libraries(name: str) -> None:
    assert plain_name("unet", name.replace("X", STEM)) == f"{STEM}.safetensors.index.json"


@pytest.mark.parametrize("variant", ["fp16", "non_ema", "bf16", "ema_only"])
def test_a_folder_with_one_variant_is_loaded_and_said(variant: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "teacher", variant, "variant")
    teacher = open_teacher_files(TeacherSource(location=str(folder)))
    assert teacher.folder == folder
    assert variant in teacher.notes[0]
    assert teacher.digests == component_digests(folder)
    whole, read = (load_components(str(it), CPU, torch.float32) for it in (MODEL, folder))
    for part in WEIGHT_FILES:
        same = getattr(whole, part).state_dict()
        assert all(torch.equal(value, same[name]) for name, value in getattr(read, part).state_dict().items())


def test_a_folder_without_an_index_is_the_one_file_in_it(tmp_path: Path) -> None:
    saved(tmp_path / "model.safetensors", ldm_tensors())
    source = TeacherSource(location=str(tmp_path), config=str(MODEL))
    assert [file.path for file in open_teacher_files(source).sources] == [tmp_path / "model.safetensors"]
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model-b.safetensors")
    with pytest.raises(Refused, match=r"there are model-b\.safetensors, model\.safetensors - name one"):
        open_teacher_files(source)


class Hub:
    """A hub of one repository, which lies in a folder."""

    def __init__(self, repository: Path, snapshot: Path, revision: str | None = None) -> None:
        self.repository, self.snapshot, self.revision = repository, snapshot, revision

    def list_repo_files(self, _name: str, revision: str | None = None) -> list[str]:
        assert revision == self.revision
        return [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]

    def snapshot_download(self, _name: str, revision: str | None, allow_patterns: Sequence[str]) -> str:
        assert revision == self.revision
        for name in allow_patterns:
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / name, self.snapshot / name)
        return str(self.snapshot)

    def fetched(self) -> set[str]:
        return {str(path.relative_to(self.snapshot)) for path in self.snapshot.rglob("*") if path.is_file()}


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def make(repository: Path, revision: str | None = None) -> Hub:
        fake = Hub(repository, tmp_path / "snapshot", revision)
        monkeypatch.setattr(hub, "HfApi", lambda: fake)
        monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
        return fake

    return make


READ = {
    str(file.relative_to(MODEL))
    for part in (*WEIGHT_FILES, "tokenizer", "scheduler")
    for file in component_files(MODEL, part)
} | {"model_index.json", "README.md"}


def test_of_a_hub_exactly_what_is_read_is_fetched(tmp_path: Path, on_hub: Callable[..., Hub]) -> None:
    repository = Path(shutil.copytree(MODEL, tmp_path / "repository"))
    for part, (safe, old) in WEIGHT_FILES.items():
        for name in (old, safe.replace(".safe", ".fp16.safe"), safe.replace(".safe", ".non_ema.safe")):
            (repository / part / name).write_bytes(b"0")
    for name in ("v1-5-pruned.safetensors", "safety_checker/model.safetensors", "picture.png", "notes/x.json"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"0")
    fake = on_hub(repository, "main2")
    teacher = open_teacher_files(TeacherSource(location="someone/model@main2"))
    assert fake.fetched() == READ
    assert teacher.digests == component_digests(MODEL)


@pytest.mark.parametrize("pickled", [("unet", "vae", "text_encoder"), ("text_encoder",), ()])
def test_older_weights_are_fetched_where_there_are_no_others(
    pickled: tuple[str, ...], tmp_path: Path, on_hub: Callable[..., Hub]
) -> None:
    for part, (safe, old) in WEIGHT_FILES.items():
        (tmp_path / "repository" / part).mkdir(parents=True)
        for name in (old, old.replace(".bin", ".fp16.bin"), *([] if part in pickled else [safe])):
            (tmp_path / "repository" / part / name).write_bytes(b"0")
    fake = on_hub(tmp_path / "repository")
    hub.resolve_folder("someone/model")
    assert fake.fetched() == {f"{part}/{names[part in pickled]}" for part, names in WEIGHT_FILES.items()}


def test_shards_are_fetched_by_their_index(tmp_path: Path, on_hub: Callable[..., Hub]) -> None:
    repository = Path(shutil.copytree(MODEL, tmp_path / "repository"))
    safe = WEIGHT_FILES["unet"][0]
    (repository / "unet" / safe).rename(repository / "unet" / "one.safetensors")
    index = {"weight_map": {"conv_in.weight": "one.safetensors"}}
    (repository / "unet" / f"{safe}.index.json").write_text(json.dumps(index))
    fake = on_hub(repository)
    open_teacher_files(TeacherSource(location="someone/model"))
    assert fake.fetched() == (READ - {f"unet/{safe}"}) | {f"unet/{safe}.index.json", "unet/one.safetensors"}


@pytest.mark.parametrize("location", ["someone/model", "someone/model/x.safetensors"])
def test_the_one_file_of_a_repository_is_a_single_file(location: str, tmp_path: Path, on_hub: Any) -> None:
    (tmp_path / "repository").mkdir()
    saved(tmp_path / "repository" / "x.safetensors", ldm_tensors())
    (tmp_path / "repository" / "x.ckpt").write_bytes(b"0")
    fake = on_hub(tmp_path / "repository")
    teacher = open_teacher_files(TeacherSource(location=location, config=str(MODEL)))
    assert fake.fetched() == {"x.safetensors"}
    assert teacher.is_composed


def test_several_files_of_a_repository_are_named(tmp_path: Path, on_hub: Callable[..., Hub]) -> None:
    (tmp_path / "repository").mkdir()
    for name in ("a.safetensors", "b.ckpt"):
        (tmp_path / "repository" / name).write_bytes(b"0")
    fake = on_hub(tmp_path / "repository")
    with pytest.raises(Refused, match=r"there are a\.safetensors, b\.ckpt - name one as someone/model/FILE"):
        open_teacher_files(TeacherSource(location="someone/model"))
    assert fake.fetched() == set()


@pytest.mark.parametrize("root", ["", "vae"])
def test_an_autoencoder_of_a_hub_is_fetched_alone(root: str, tmp_path: Path, on_hub: Callable[..., Hub]) -> None:
    shutil.copytree(MODEL / "vae", tmp_path / "repository" / root, dirs_exist_ok=True)
    (tmp_path / "repository" / "x.ckpt").write_bytes(b"0")
    fake = on_hub(tmp_path / "repository")
    open_teacher_files(TeacherSource(location=str(MODEL), vae="someone/vae"))
    assert fake.fetched() == {str(Path(root) / name) for name in ("config.json", WEIGHT_FILES["vae"][0])}


def test_of_a_hub_that_serves_configs_no_weights_are_fetched(tmp_path: Path, on_hub: Callable[..., Hub]) -> None:
    fake = on_hub(Path(shutil.copytree(MODEL, tmp_path / "repository")))
    file = saved(tmp_path / "x.safetensors", ldm_tensors())
    open_teacher_files(TeacherSource(location=str(file)))
    assert fake.fetched() == {name for name in READ if not name.endswith((".safetensors", ".md"))}


def test_a_revision_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def list_repo_files(self, *_args: object, **_named: object) -> list[str]:
            raise errors.RevisionNotFoundError.__new__(errors.RevisionNotFoundError)

    monkeypatch.setattr(hub, "HfApi", Missing)
    with pytest.raises(Refused, match="no revision 'v9'"):
        open_teacher_files(TeacherSource(location="someone/model@v9"))
