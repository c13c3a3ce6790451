"""Trackers never end a run; packages that are not installed are replaced by small ones on the path."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stages.system.refusal import Refused
from stages.train.trackers import MAX_FAILURES, TrackingConfig, make_trackers

WANDB = """
calls = []

class Run:
    def define_metric(self, name, step_metric): calls.append(("axis", name, step_metric))
    def log(self, values, step=None):
        if broken: raise ConnectionError("no route\\nto host")
        calls.append(("log", values, step))
    def finish(self): calls.append(("finish",))

broken = False
refusing = False

def init(project, **more):
    if refusing: raise OSError("not logged in")
    calls.append(("init", project, more))
    return Run()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package that records its calls."""
    installed: list[str] = []

    def install(name: str) -> ModuleType:
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(WANDB)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        installed.append(name)
        return import_module(name)

    yield install
    for name in installed:
        del sys.modules[name]


def config(*to: str, **more: str) -> TrackingConfig:
    return TrackingConfig.model_validate({"to": to, **more})


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_is_the_default_and_hides_later_steps_of_a_killed_process(tmp_path):
    for samples, logged in ((0, (4, 8, 12)), (8, (12,))):
        trackers = make_trackers(TrackingConfig(), tmp_path, samples)
        assert trackers.start() == []
        for at in logged:
            assert trackers.log({"flow": at + samples}, at) == []
        assert trackers.close() == []
    assert scalars(tmp_path, "flow") == [(4, 4.0), (8, 8.0), (12, 20.0)]


def test_a_package_that_is_not_installed_is_refused_by_name(tmp_path):
    with pytest.raises(Refused, match=r"tracking\.to: trackio is not installed - pip install trackio"):
        make_trackers(config("trackio"), tmp_path, 0)


def test_wandb_gets_the_run_its_configuration_and_every_line_by_samples(tmp_path, package):
    wandb = package("wandb")
    folder = tmp_path / "tiny" / "distill"
    trackers = make_trackers(config("wandb", project="flows"), folder, 0, {"seed": 3})
    trackers.start()
    trackers.log({"flow": 0.5}, 640)
    trackers.close()
    (_, project, more), axis, logged, end = wandb.calls
    assert project == "flows"
    assert (more["name"], more["config"], more["resume"]) == ("tiny-distill", {"seed": 3}, "allow")
    assert axis == ("axis", "*", "samples")
    assert logged == ("log", {"flow": 0.5, "samples": 640}, None)
    assert end == ("finish",)


def test_a_resumed_run_keeps_its_id_and_a_new_one_does_not(tmp_path, package):
    wandb = package("wandb")
    for samples in (0, 640, 0):
        make_trackers(config("wandb"), tmp_path, samples).start()
    first, resumed, anew = (more["id"] for word, _, *rest in wandb.calls if word == "init" for more in rest)
    assert first == resumed != anew
    assert json.loads((tmp_path / "tracking.json").read_text()) == {"wandb": anew}


def test_trackio_continues_under_the_name_of_the_run(tmp_path, package):
    trackio = package("trackio")
    for samples in (0, 640):
        trackers = make_trackers(config("trackio", name="mine"), tmp_path, samples)
        trackers.start()
        trackers.log({"flow": 0.5}, samples + 640)
    inits = [more for word, _, more in trackio.calls if word == "init"]
    assert [(more["name"], more["resume"]) for more in inits] == [("mine", "never"), ("mine", "allow")]
    assert [step for word, _, step in trackio.calls if word == "log"] == [640, 1280]


def test_a_failing_tracker_is_reported_retried_and_given_up_in_the_end(tmp_path, package):
    wandb = package("wandb")
    trackers = make_trackers(config("wandb", "tensorboard"), tmp_path, 0)
    trackers.start()
    wandb.broken = True
    assert trackers.log({"flow": 1.0}, 1) == ["wandb: ConnectionError: no route to host - tried again at the next line"]
    wandb.broken = False
    assert trackers.log({"flow": 2.0}, 2) == []
    wandb.broken = True
    calls = [trackers.log({"flow": 3.0}, 3 + i) for i in range(MAX_FAILURES + 1)]
    assert [len(failures) for failures in calls] == [1] * MAX_FAILURES + [0]
    assert calls[-2][0].endswith("given up for this run")
    trackers.close()
    assert [step for step, _ in scalars(tmp_path, "flow")] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_does_not_start_is_opened_at_a_later_line(tmp_path, package):
    wandb = package("wandb")
    wandb.refusing = True
    trackers = make_trackers(config("wandb"), tmp_path, 0)
    assert "OSError: not logged in" in trackers.start()[0]
    wandb.refusing = False
    assert trackers.log({"flow": 1.0}, 1) == []
    assert [word for word, *_ in wandb.calls] == ["init", "axis", "log"]


def test_a_dead_tracker_ends_no_run_and_trackers_are_no_part_of_the_identity(
    tmp_path, package, train, power_cut, capsys
):
    package("wandb").broken = True
    with pytest.raises(InterruptedError):
        train(tmp_path / "run", {"tracking": {"to": ["wandb"]}}, batches=power_cut(14))
    train(tmp_path / "run", {"tracking": {"to": []}})
    output = capsys.readouterr().out
    assert output.count("wandb: ConnectionError") == MAX_FAILURES
    assert "train samples=24 of=24" in output
