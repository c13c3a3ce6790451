"""Where teachers and their composed folders lie: other names, other working directories, folders that are gone."""

import os
import shutil
from pathlib import Path

import pytest

from stages.sampling.models import load_model
from stages.system.refusal import Refused
from stages.teacher_files.compose import teachers_home
from stages.teacher_files.open import open_teacher_files
from stages.teacher_files.recorded import absolute_place, find_teacher, recorded_sources
from stages.teacher_files.source import TeacherSource
from tests.single_files import MODEL, UNET, ldm_tensors, saved
from tests.teacher_files.test_single_files import assert_weights, opened

LDM = ldm_tensors()


def test_an_ending_in_capitals_is_the_same_ending(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = saved(tmp_path / "folder" / "Model.SAFETENSORS", LDM)
    assert opened(tmp_path / "folder").digests == opened(file).digests
    load_model(str(file), "cpu", config_from=str(MODEL))


@pytest.mark.parametrize("place", ["folder", "folder/model.safetensors"])
def test_a_model_is_looked_for_where_it_lay_when_the_working_directory_is_another(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    saved(tmp_path / "folder" / "model.safetensors", LDM)
    monkeypatch.chdir(tmp_path)
    source = TeacherSource(location=place, config=str(MODEL)).absolute()
    sources = recorded_sources(place, absolute_place(place), source.model_dump(mode="json"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_teacher(sources).digests == opened(tmp_path / place).digests
    load_model(str(tmp_path / place), "cpu", config_from=str(MODEL))


def test_the_cache_home_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for home in ("cache", "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        monkeypatch.chdir(tmp_path)
        assert teachers_home() == tmp_path / "cache" / "sollune" / "teachers"


def test_a_user_without_a_home_is_shown_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(Refused, match="XDG_CACHE_HOME"):
        teachers_home()


def test_a_folder_that_is_deleted_while_it_is_used_is_composed_again(tmp_path: Path) -> None:
    file = saved(tmp_path / "model.safetensors", LDM)
    teacher = opened(file)
    shutil.rmtree(teacher.folder)
    assert teacher.present_folder() == teacher.folder
    assert_weights(teacher.folder)
    shutil.rmtree(teacher.folder)
    saved(file, {**LDM, f"{UNET}out.2.bias": LDM[f"{UNET}out.2.bias"] + 1})
    with pytest.raises(Refused, match="others than before"):
        teacher.present_folder()
    file.unlink()
    with pytest.raises(Refused, match="no such file"):
        teacher.present_folder()


@pytest.mark.parametrize("name", ["README.md", "LICENSES"])
@pytest.mark.parametrize("kind", ["a link to nothing", "a folder", "a pipe"])
def test_what_only_has_the_name_of_a_card_is_passed_over(name: str, kind: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    card = folder / name
    card.unlink(missing_ok=True)
    {"a link to nothing": lambda: card.symlink_to("no"), "a folder": card.mkdir, "a pipe": lambda: os.mkfifo(card)}[
        kind
    ]()
    made = open_teacher_files(TeacherSource(location=str(folder), clip_skip=1)).folder
    assert not os.path.lexists(made / name)


@pytest.mark.parametrize(
    ("content", "problem"), [(b"", "is empty"), (b"version https://git-lfs.github.com/1", "git lfs pull")]
)
@pytest.mark.parametrize("configs", [None, str(MODEL)])
def test_a_file_to_sample_from_is_refused_by_what_it_is(
    content: bytes, problem: str, configs: str | None, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(Refused, match=problem):
        load_model(str(tmp_path / "model.safetensors"), "cpu", config_from=configs)
