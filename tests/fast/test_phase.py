"""The journey of students of few steps, from a cache to run folders that load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages import __main__ as cli
from stages.nets.components import Components
from stages.nets.guidance import PROJECTION_KEY, slow_columns
from stages.nets.run_folder import cache_folder, load_run_teacher, load_student, open_run
from stages.sampling.grids import read_settings
from stages.system.disk import file_sha256
from stages.train.journal import read_events, read_step_lines
from tests.fast.runs import command

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler


@pytest.fixture(scope="module")
def trained(distilled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN with RUN/fast/2 and RUN/fast/1."""
    run = Path(shutil.copytree(distilled, tmp_path_factory.mktemp("trained") / "run"))
    assert cli.main(command(run, "--windows", "2", "1")) == 0
    return run


@pytest.fixture(scope="module")
def parts(trained: Path) -> Components:
    return load_run_teacher(open_run(trained / "fast/2").origin, torch.device("cpu"), torch.float32)


def test_each_number_of_windows_has_a_run_folder_that_loads(trained: Path, parts: Components) -> None:
    for windows in (2, 1):
        run = open_run(trained / "fast" / str(windows))
        assert (run.origin.windows, run.origin.guidance_range, run.samples) == (windows, (3.0, 8.0), 24)
        assert (run.folder / "export/diffusers/unet/config.json").is_file()
        assert cache_folder(run.folder) == trained / "cache"
        student = load_student(run, parts)
        projection = student.unet.get_parameter(PROJECTION_KEY)
        assert projection[:, slow_columns()].any()
        assert not projection[:, ~slow_columns()].any()


def test_each_starts_from_the_student_before_it(trained: Path) -> None:
    identities = {
        windows: json.loads((trained / "fast" / windows / "checkpoints/000000024/state.json").read_text())["identity"]
        for windows in ("2", "1")
    }
    starts = {windows: identity["start"] for windows, identity in identities.items()}
    assert starts == {
        "2": file_sha256(open_run(trained / "distill").weights),
        "1": file_sha256(open_run(trained / "fast/2").weights),
    }


def test_the_validation_measures_landings_and_the_end(trained: Path) -> None:
    events = read_events(trained / "fast/2", "validation", 24)
    assert [event["samples"] for event in events] == [12, 24]
    for event in events:
        assert len(event["landing_by_s"]) == 2
        assert 0 < event["landing"] < 1
        assert 0 < event["end"] < 2


def test_a_grid_shows_the_teacher_and_the_students_before(trained: Path) -> None:
    grids = sorted(path.name for path in (trained / "fast/1/grids").glob("*.png"))
    assert grids == ["000000012.png", "000000024.png"]
    assert read_settings(trained / "fast/1/grids" / grids[0])["columns"] == [
        "teacher 3",
        "student 3",
        "student 2",
        "student 1",
    ]


def test_distill_is_not_changed_by_what_follows(distilled: Path, trained: Path) -> None:
    weights = [load_file(open_run(run / "distill").weights) for run in (distilled, trained)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_finished_run_is_not_trained_again_and_another_start_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = open_run(trained / "fast/1").weights.stat().st_mtime_ns
    assert cli.main(command(trained, "--windows", "2", "1")) == 0
    assert open_run(trained / "fast/1").weights.stat().st_mtime_ns == before
    assert cli.main(command(trained, "--windows", "1")) == 2
    assert "fast/1/checkpoints" in (message := capsys.readouterr().err)
    assert "start was" in message


def test_the_journal_has_no_terms_of_a_second_branch(trained: Path) -> None:
    two_branches, one = (read_step_lines(trained / folder)[0] for folder in ("distill", "fast/2"))
    assert set(two_branches) - set(one) == {"guidance", "block_term", "guidance_by_s", "blocks_by_s"}
    assert one["loss"] == one["flow"]
