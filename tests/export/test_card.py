"""The card states what is known, shows what was measured, and its example runs as it stands."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from stages.evaluate.metrics import Fidelity
from stages.evaluate.paired import PairedError
from stages.evaluate.report import Evaluation, to_json
from stages.export.card import licence_of, model_card
from stages.export.history import RunHistory, read_history
from stages.export.tensorfile import single_file_name
from stages.nets.run_folder import Origin
from stages.system.refusal import Refused
from stages.train.validation import RelativeError, VelocityErrors

FACTS = {"base_model": "someone/sd-embedded", "samples": 64, "prediction": "velocity", "flow_shift": 2.5}
SENTENCE = 'a star, "red" as rust'
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as far as its history goes."""
    folder = tmp_path / "distill"
    (folder / "grids").mkdir(parents=True)
    Origin("someone/sd-embedded", {}, "hold", "0" * 64).save(folder)
    settings = {
        "run": "runs/x",
        "device": "auto",
        "hub": {"repo": "me/secret"},
        "target": "velocity",
        "david": {"published": "/home/me/david"},
    }
    settings["grid"] = {"prompts": [SENTENCE]}
    (folder / "config.yaml").write_text(yaml.safe_dump({"distill": settings}))
    for samples in (32, 64, 96):
        Image.new("RGB", (samples, 8)).save(folder / "grids" / f"{samples:09d}.png")
    return folder


def measured(samples: int) -> str:
    error = RelativeError(0.0123, (0.1, None))
    evaluation = Evaluation(
        run="runs/x",
        samples=samples,
        tail="hold",
        settings={},
        fidelity={"student": Fidelity({"colour": 0.875}, 0.5, 8)},
        paired={"student": [PairedError(4, 0.2, 0.1, 1.1, 0.125, (0.1, 0.2))]},
        velocity=VelocityErrors(error, error, 600),
    )
    return to_json(evaluation, [])


def parsed(history: RunHistory | None = None, **facts: object) -> ModelCard:
    return ModelCard(model_card({**FACTS, **facts}, history))


def test_the_example_of_the_card_runs_in_the_folder_where_the_card_lies(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(whole / "diffusers", tmp_path / "diffusers"))
    (example,) = PYTHON.findall((folder / "README.md").read_text())
    monkeypatch.chdir(folder)
    exec(compile(example, "README.md", "exec"), {})
    with Image.open("picture.png") as picture:
        assert picture.size == (64, 64)


def test_the_head_is_what_hubs_read() -> None:
    head = parsed().data.to_dict()
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == "text-to-image"
    assert head["base_model"] == "someone/sd-embedded"
    assert head["base_model_relation"] == "finetune"
    assert {"stable-diffusion", "flow-matching"} <= set(head["tags"])
    assert "license" not in head
    assert "base_model" not in ModelCard(model_card({"teacher": "model"})).data.to_dict()


def test_the_card_shows_the_settings_first_prompt_and_pictures_of_the_run_up_to_the_checkpoint(run: Path) -> None:
    history = read_history(run, 64)
    assert history is not None
    text = parsed(history).text
    assert 'pipeline("a star, \\"red\\" as rust", ' in text
    assert "target: velocity" in text
    assert "runs/x" not in text
    assert "me/secret" not in text
    assert "published: david" in text
    assert "![samples](samples.png)" in text
    assert history.pictures == {"samples.png": run / "grids" / "000000064.png"}


def test_figures_are_shown_of_the_very_checkpoint_alone(run: Path) -> None:
    assert "Not measured yet" in parsed(read_history(run, 64)).text
    (run / "evaluation.json").write_text(measured(64))
    shown = parsed(read_history(run, 64))
    assert "| student | 87.5 | 50.0 | 8 |" in shown.text
    assert "| student | 4 | 0.2000 | 0.1000 | 1.1000 | 0.1250 |" in shown.text
    assert "| velocity | 0.0123 | 0.1000 | - |" in shown.text
    assert {result.metric_value for result in shown.data.eval_results} == {0.0123, 0.125}
    assert "Not measured yet" in parsed(read_history(run, 96)).text


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"steps": 3})])
def test_an_evaluation_of_something_else_is_refused_by_name(run: Path, content: str) -> None:
    (run / "evaluation.json").write_text(content)
    with pytest.raises(Refused, match=r"evaluation\.json: no evaluation of ours"):
        read_history(run, 64)


def test_a_folder_that_is_no_run_has_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path, 64) is None


def test_the_licence_is_the_one_that_the_teachers_card_states(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("no head")
    assert licence_of(tmp_path, "stable-diffusion-v1-5/stable-diffusion-v1-5") == {"license": "creativeml-openrail-m"}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n# x\n")
    stated = licence_of(tmp_path, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert stated == {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    assert parsed(**stated).data.to_dict()["license_name"] == "mine"


def test_what_a_licence_demands_and_what_the_pictures_lack_is_stated() -> None:
    unknown, openrail = parsed().text, parsed(license="creativeml-openrail-m").text
    assert "whose folder states none" in unknown
    assert "attachment A" in openrail
    assert "LAION-5B" in openrail
    assert "LAION-5B" not in unknown
    for text in (unknown, openrail):
        assert "There is no safety filter" in text
        assert "AbstractPhil/sd15-flow-lune" in text


def test_exports_of_both_training_commands_have_different_names() -> None:
    assert single_file_name(FACTS, None, False) == "sd-embedded-flow.safetensors"
    assert (
        single_file_name({**FACTS, "classes": {"stars": "top"}}, None, False) == "sd-embedded-classes-flow.safetensors"
    )
    assert single_file_name(FACTS, "mine-flow", True) == "mine-unet-flow.safetensors"
