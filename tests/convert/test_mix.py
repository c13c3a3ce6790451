"""`--mix MODEL:WEIGHT ...` is a teacher made from the base teacher."""

from pathlib import Path

import pytest

from stages.convert.mix import mixed_teacher
from stages.system.refusal import Refused
from stages.teacher_files.source import LoraFile, MixedModel, TeacherSource

BASE = TeacherSource(location="base", vae="other", clip_skip=1)


def entries(*words: str, base: TeacherSource = BASE) -> list[tuple[str, float]]:
    return [(one.model, one.weight) for one in mixed_teacher(base, words).mix]


@pytest.mark.parametrize(
    ("word", "model", "weight"),
    [
        ("A:.6", "A", 0.6),
        ("a/b.safetensors:1", "a/b.safetensors", 1.0),
        ("owner/name@v1.0:0.5", "owner/name@v1.0", 0.5),
        ("owner/name@main/file.ckpt:-2e-1", "owner/name@main/file.ckpt", -0.2),
        ("a:b:c:+3.", "a:b:c", 3.0),
        ("A:.6:.4", "A:.6", 0.4),
        ("a name: .5", "a name", 0.5),
    ],
)
def test_a_word_is_split_at_its_last_colon(word: str, model: str, weight: float) -> None:
    assert entries(word) == [(model, weight)]


def test_the_teacher_is_the_base_with_these_models_and_all_of_its_other_options() -> None:
    mixed = mixed_teacher(BASE, ["A:.6", "B:.4"])
    assert mixed == BASE.model_copy(
        update={"mix": (MixedModel(model="A", weight=0.6), MixedModel(model="B", weight=0.4))}
    )


def test_what_was_put_into_the_base_is_kept_by_what_the_weights_leave() -> None:
    base = TeacherSource(
        location="base",
        mix=(MixedModel(model="A", weight=0.5), MixedModel(model="C", weight=1.0)),
        loras=(LoraFile(file="l", scale=2.0),),
    )
    mixed = mixed_teacher(base, ["A:.2", "B:.3"])
    assert [(one.model, one.weight) for one in mixed.mix] == [("A", 0.45), ("C", 0.5), ("B", 0.3)]
    assert [lora.scale for lora in mixed.loras] == [1.0]
    whole = mixed_teacher(base, ["A:.1", "B:.2", "D:.7"])
    assert [(one.model, one.weight) for one in whole.mix] == [("A", 0.1), ("B", 0.2), ("D", 0.7)]
    assert whole.loras == ()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "names no model"),
        (["A"], "A: has no weight - "),
        (["owner/name@main"], "has no weight - "),
        (["owner/name@v1:x"], "has no weight - "),
        (["A:"], "no weight - "),
        (["A:0,6"], "has no weight - "),
        (["A:60%"], "has no weight - "),
        (["A:1_0"], "has no weight - "),
        (["A:٣"], "has no weight - "),
        ([":.5"], "should name a folder"),
        (["A:nan"], "finite"),
        (["A:-inf"], "finite"),
        (["A:1e999"], "finite"),
        (["A:0.0"], "leave the model out"),
        (["A:.5", "A:.5"], "A: comes twice - "),
        (["A\n:.5"], "several lines"),
        (["A\x07:.5"], "control characters"),
    ],
)
def test_a_word_without_a_model_and_a_usable_weight_is_refused(words: list[str], problem: str) -> None:
    with pytest.raises(Refused) as refusal:
        mixed_teacher(BASE, words)
    assert problem in str(refusal.value)
    assert " - " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_one_model_by_two_names_comes_twice(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(Refused, match="comes twice"):
        mixed_teacher(BASE, [f"{tmp_path}/a:.5", f"{tmp_path}/b:.5"])
