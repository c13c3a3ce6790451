"""Laws of make: a value that would end in the middle of a command is refused by a sentence, before anything is made."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def make(*words: str, folder: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What make would do; nothing is done."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    return subprocess.run(
        ["make", "-n", *words], cwd=folder, env={**kept, **environment}, capture_output=True, text=True, check=False
    )


RUNS = [
    "a b",
    "",
    " ",
    "a\tb",
    "a\nb",
    "a'b",
    'a"b',
    "a$b",
    "a$$b",
    "$(HOME)/x",
    "a#b",
    "a:b",
    "a%b",
    "a;b",
    "a&b",
    "a\\b",
]
RUNS += ["a*", "a?", "a|b", "a<b", "a(b", "a,b", "a=b", "`id`", "-x", "/", ".", "..", "../..", str(ROOT), "runs/.."]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("target", ["distill", "clean-run"])
def test_a_run_that_is_no_single_plain_folder_is_refused(run: str, target: str) -> None:
    for done in (make(target, f"RUN={run}"), make(target, RUN=run)):
        assert done.returncode == 2
        assert done.stdout == ""
        assert "*** RUN = " in done.stderr
        assert " - name a folder" in done.stderr
        assert done.stderr.endswith("such as RUN=runs/tiny.  Stop.\n")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("none.yaml", "there is no none.yaml"),
        ("configs/tiny.yaml none.yaml", "there is no none.yaml"),
        ("configs/t'iny.yaml", "holds '"),
        ("$x", "holds $"),
        ("a;b", "holds ;"),
        ("", "is empty"),
    ],
)
def test_a_configuration_that_is_not_there_is_refused(config: str, named: str) -> None:
    done = make("cache-teacher", f"CONFIG={config}")
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
    assert " - name YAML files such as CONFIG=configs/tiny.yaml" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["RUN=runs/other"],
        ["RUN=/somewhere/runs/a-b_c.1"],
        ["RUN=rüns/é"],
        ["CONFIG=configs/tiny.yaml configs/cards/24gb.yaml"],
    ],
)
def test_plain_values_are_taken(words: list[str]) -> None:
    done = make("distill", *words)
    assert done.returncode == 0, done.stderr
    run = next((word.removeprefix("RUN=") for word in words if word.startswith("RUN=")), "runs/tiny")
    assert f"--run {run}" in done.stdout


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (["TEACHER=models/style.safetensors", "BASE=runs/tiny"], "runs/style"),
        (["TEACHER=models/style/", "BASE=runs/tiny"], "runs/style"),
        (["TEACHER=someone/style@v1", "BASE=runs/tiny", "RUN=runs/own"], "runs/own"),
        (["TEACHER=models/dream_v1.5", "BASE=runs/tiny"], "runs/dream_v1.5"),
        (["TEACHER=models/dream_v1.5.ckpt", "BASE=runs/tiny"], "runs/dream_v1.5"),
    ],
)
def test_a_conversion_goes_to_a_run_of_its_own(words: list[str], out: str) -> None:
    done = make("convert", *words)
    assert done.returncode == 0, done.stderr
    model = words[0].removeprefix("TEACHER=")
    assert f"sollune convert {model} --config configs/tiny.yaml --base runs/tiny --out {out}" in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "TEACHER = ''"),
        (["TEACHER=models/style"], "BASE = ''"),
        (["TEACHER=a b", "BASE=runs/tiny"], "TEACHER = 'a b'"),
        (["TEACHER=a;b", "BASE=runs/tiny"], "TEACHER = a;b: holds ;"),
        (["TEACHER=-x", "BASE=runs/tiny"], "TEACHER = -x"),
        (["TEACHER=a", "BASE=$(HOME)"], "BASE = $(HOME): holds"),
        (["TEACHER=a", "BASE=-x"], "BASE = -x"),
    ],
)
def test_a_conversion_of_no_single_model_and_base_is_refused(words: list[str], named: str) -> None:
    done = make("convert", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"*** {named}" in done.stderr
    assert " - name " in done.stderr


def test_make_in_another_folder_prints_how(tmp_path: Path) -> None:
    done = make("-f", str(ROOT / "Makefile"), "distill", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"say make -C {ROOT} distill" in done.stderr
    assert make("-C", str(ROOT), "distill", folder=tmp_path).returncode == 0


def test_an_unknown_target_is_makes_own_to_refuse() -> None:
    assert "No rule to make target 'nosuch'" in make("nosuch").stderr


@pytest.mark.parametrize(
    ("windows", "taken"), [("4", "4"), ("4 2 1", "4 2 1"), ("8 1", "8 1"), (" 4\t2 ", "4 2"), ("4\n2", "4 2")]
)
def test_windows_that_fall_by_divisors_are_taken_in_one_line(windows: str, taken: str, tmp_path: Path) -> None:
    done = make("distill-fast", f"WINDOWS={windows}", f"RUN={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f" --run {tmp_path} --windows {taken} --processes" in done.stdout


@pytest.mark.parametrize(
    "windows", ["", " ", "3", "16", "0", "-1", "04", "4.0", "four", "4 4", "2 4", "4,2", "*", "%", "4;ls", "$(HOME)"]
)
def test_other_windows_are_refused(windows: str, tmp_path: Path) -> None:
    done = make("distill-fast", f"WINDOWS={windows}", f"RUN={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"*** WINDOWS = '{windows.strip()}'" in done.stderr.replace("' '", "''")
    assert " - take some of 8 4 2 1, such as WINDOWS='4 2 1'" in done.stderr


@pytest.mark.parametrize(
    ("finished", "windows", "is_called"),
    [
        (["2"], "2", False),
        (["4", "2"], "4 2", False),
        (["2"], "4 2", True),
        (["4"], "4 2", True),
        (["4", "1"], "4 2 1", True),
    ],
)
def test_a_student_that_is_missing_is_made(finished: list[str], windows: str, is_called: bool, tmp_path: Path) -> None:
    for folder in ("cache", "distill", *(f"fast/{number}" for number in finished)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "COMPLETE").touch()
    done = make("distill-fast", f"WINDOWS={windows}", f"RUN={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert ("--windows" in done.stdout) == is_called


def test_the_number_of_processes_is_that_of_the_cores_whatever_threads_each_has() -> None:
    def workers(**environment: str) -> str:
        return make("cache-teacher", "RUN=runs/none", **environment).stdout.rpartition("--workers ")[2].split()[0]

    assert workers(OMP_NUM_THREADS="1") == workers(OMP_NUM_THREADS="64") == workers()
