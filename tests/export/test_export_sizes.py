"""The picture sizes that an export tells: in sollune.json, on the card, in the workflow, in the file's header."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.values import PictureSize
from stages.export.card import model_card
from stages.export.comfyui import is_unmodified_workflow
from stages.export.diffusers import export_diffusers
from stages.export.folder import learnt_sizes, read_facts, read_header
from stages.export.ldm import export_ldm, open_export
from stages.export.verify_export import ExportOptions
from stages.nets.student import Student
from stages.system.refusal import Refused

FACTS = {"base_model": "someone/sd-embedded", "tail": "hold", "samples": 64, "native_size": "64x64"}


def latent_size(workflow: str) -> list[int]:
    """Width, height and count of the workflow's empty latent image."""
    (node,) = [node for node in json.loads(workflow)["nodes"] if node["type"] == "EmptyLatentImage"]
    return list(node["widgets_values"])


def example_arguments(card: str) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call in the card's example, which must be Python."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "pipeline"]
    return {word.arg or "": ast.literal_eval(word.value) for word in call.keywords}


@pytest.mark.parametrize(
    ("sizes", "frequent", "resolution"),
    [
        (None, [64, 64], "64x64"),
        (["64x64"], [64, 64], "64x64"),
        (["64x96", "64x64", "96x64"], [64, 96], "64x64"),
        (["96x64", "64x96"], [96, 64], "96x64"),
        (["80x80"], [80, 80], "80x80"),
    ],
)
def test_workflow_header_and_facts_tell_the_sizes(
    sizes: list[str] | None,
    frequent: list[int],
    resolution: str,
    student: Student,
    teacher_folder: Path,
    tmp_path: Path,
) -> None:
    facts = {**FACTS, **({"sizes": sizes} if sizes else {})}
    folder = export_diffusers(student, teacher_folder, tmp_path, facts, ExportOptions(dtype="float32"))
    assert read_facts(folder).get("sizes") == sizes
    header = read_header(export_ldm(folder))
    assert header["modelspec.resolution"] == resolution
    assert json.loads(header.get("sollune.sizes", "null")) == sizes
    workflow = (tmp_path / "workflow-comfyui.json").read_text()
    assert latent_size(workflow) == [*frequent, 1]
    assert is_unmodified_workflow(workflow)
    card = (folder / "README.md").read_text()
    arguments = example_arguments(card)
    size = {key: arguments[key] for key in ("width", "height") if key in arguments}
    assert size == ({} if frequent == [64, 64] else dict(zip(("width", "height"), frequent, strict=True)))
    listed = ", ".join(sizes or ())
    assert (f"the most frequent first: {listed}." in card) == (sizes not in (None, ["64x64"]))


def test_the_card_of_an_export_of_before_has_no_size() -> None:
    card = model_card({"teacher": "sd", "prediction": "velocity"})
    assert set(example_arguments(card)) == {"num_inference_steps", "guidance_scale"}
    assert "sizes" not in card


@pytest.mark.parametrize("sizes", ["64x64", ["64"], [64], {"64x64": 1}, None, ["64x96", "big"]])
def test_facts_with_other_sizes_are_refused(sizes: object, exported: Path, tmp_path: Path) -> None:
    facts = json.loads((exported / "sollune.json").read_text())
    (tmp_path / "sollune.json").write_text(json.dumps({**facts, "sizes": sizes}))
    with pytest.raises(Refused, match=r"sollune\.json: sizes is .* - export the run again"):
        read_facts(tmp_path)


def test_an_export_of_before_is_of_the_native_size(exported: Path) -> None:
    assert learnt_sizes(exported, read_facts(exported)) == ()
    assert open_export(exported).sizes == (PictureSize(64, 64),)
