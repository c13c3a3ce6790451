"""Laws of the configuration loader: a given setting is either used or refused by name."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from pydantic import Field, ImportString, ValidationError, model_validator

from configs.load import load, parse_common_options, resolved_yaml
from configs.schema import metavar
from configs.values import Strict
from stages import cache_teacher
from stages.cache.sizes import SizeShare
from stages.evaluate.lora_file import ScaledLora
from stages.prompts.source import WeightedSource
from stages.system.refusal import Refused
from stages.teacher_files.source import LoraFile


class Grammar(Strict):
    source: Literal["grammar"] = Field("grammar", description="the world's sentences")
    unsaid: float = Field(0.3, ge=0, le=1, description="share of sentences, 0..1")


class TextFile(Strict):
    source: Literal["text"] = Field("text", description="a file")
    file: Path = Field(description="one prompt a line")


Source = Annotated[Grammar | TextFile, Field(discriminator="source")]


class Train(Strict):
    batch_size: int = Field(8, ge=1, description="rows in a step")
    learning_rate: float = Field(1e-3, gt=0, description="peak, per step")
    size: tuple[int, int] = Field((1, 2), description="pixels")
    grids_at: tuple[int, ...] = Field((), description="samples")
    weights: dict[str, float] = Field({"mid": 1.0}, description="per block")
    rates: dict[str, float] | Literal["even"] = Field({"mid": 1.0}, description="a table, or a rule by its name")
    clip: float | None = Field(1.0, description="largest gradient norm")
    ema: bool = Field(False, description="average the weights")


class ClassSpec(Strict):
    pattern: str = Field(description="which classes")
    priority: Literal["top", "mid", "low"] = Field(description="how much they matter")


class Spare(Strict):
    rank: int = Field(16, description="how many")


class Config(Strict):
    """A configuration for tests."""

    run: Path = Field(description="the run folder")
    function: ImportString[Callable[[float], float]] = Field("math.cos", description="a function")
    classes: tuple[ClassSpec, ...] = Field((), description="priorities")
    prompts: Source = Field(Grammar(unsaid=0.5), description="where prompts come from")
    others: Source | None = Field(None, description="where others come from")
    train: Train = Field(Train(learning_rate=0.5), description="the steps")
    spare: Spare | None = Field(None, description="a part that is left out unless requested")

    @model_validator(mode="after")
    def _grids_fit(self) -> Self:
        if self.train.grids_at and self.train.grids_at[-1] < self.train.batch_size:
            raise ValueError(f"train.grids_at = {self.train.grids_at[-1]} is below train.batch_size, raise it")
        return self


RULE, TABLE = "--train.rates even", "--train.rates up=3"


def write_yaml(folder: Path, text: str, name: str = "one.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def load_config(words: str = "--run r", *files: Path) -> Config:
    return load(Config, "distill", files, words.split())


def refusal_message(words: str = "--run r", *files: Path) -> str:
    with pytest.raises(Refused) as refused:
        load_config(words, *files)
    return str(refused.value)


def test_later_files_lie_over_earlier_ones_and_options_over_both(tmp_path: Path) -> None:
    one = write_yaml(tmp_path, "distill: {run: a, train: {batch_size: 2, learning_rate: 1e-4, grids_at: [10, 20, 30]}}")
    two = write_yaml(tmp_path, "distill: {train: {batch_size: 3, grids_at: [40]}}", "two.yaml")
    config = load_config("--train.batch-size 4", one, two)
    assert (config.run, config.train.batch_size, config.train.learning_rate) == (Path("a"), 4, 1e-4)
    assert config.train.grids_at == (40,)
    assert load_config("", two, one).train.batch_size == 2


def test_a_file_that_changes_one_key_of_a_nested_default_keeps_the_others(tmp_path: Path) -> None:
    config = load_config(
        "--run r", write_yaml(tmp_path, "distill: {train: {batch_size: 3, weights: {up: 2}}, prompts: {unsaid: 0}}")
    )
    assert config.train.learning_rate == 0.5
    assert config.train.weights == {"mid": 1.0, "up": 2.0}
    assert config.prompts == Grammar(unsaid=0)


def test_options_spell_every_kind_of_value() -> None:
    words = "--run=r --train.size 4 5 --train.grids-at 8 9 --train.weights up=2 --train.clip none --train.ema"
    config = load_config(f"{words} --function math.sin")
    assert (config.train.size, config.train.grids_at, config.train.clip) == ((4, 5), (8, 9), None)
    assert (config.train.weights, config.train.ema, config.function) == ({"mid": 1.0, "up": 2.0}, True, math.sin)
    assert load(Config, "distill", (), ["--run", "r", "--classes", "[{pattern: a/*, priority: top}]"]).classes == (
        ClassSpec(pattern="a/*", priority="top"),
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--train.grids-at 8 --run r --train.grids-at 9", (8, 9)),
        ("--train.grids-at=8 --train.grids_at 9 10 --run r", (8, 9, 10)),
        ("--run r --train.grids-at 8 8 --train.grids-at=8", (8, 8, 8)),
    ],
)
def test_a_list_that_is_given_several_times_keeps_every_value(words: str, expected: tuple[int, ...]) -> None:
    assert load_config(words).train.grids_at == expected


def test_of_a_single_value_or_a_pair_that_is_given_twice_the_last_one_counts() -> None:
    config = load_config("--run r --train.size 4 5 --train.batch-size 2 --train.size 6 7 --train.batch-size 3")
    assert (config.train.size, config.train.batch_size) == ((6, 7), 3)


def test_another_member_of_a_union_replaces_the_earlier_one() -> None:
    assert load_config("--run r --prompts.source text --prompts.file p.txt").prompts == TextFile(file=Path("p.txt"))


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    message = refusal_message("--run r", write_yaml(tmp_path, "distil: {run: a}"))
    assert re.search(r"one\.yaml: distil: unknown section - did you mean distill\?", message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {bach_size: 3}", "one.yaml: distill.train.bach_size = 3: unknown key - did you mean batch_size?"),
        ("trian: {batch_size: 3}", "one.yaml: distill.trian: unknown key - did you mean train?"),
        (
            "classes: [{patern: a, pattern: b, priority: top}]",
            "distill.classes.0.patern = a: unknown key - did you mean pattern?",
        ),
        ("train: {batch_size: 0}", "one.yaml: distill.train.batch_size = 0: should be greater than or equal to 1"),
        ("train: {size: [1]}", "distill.train.size.1: required"),
        ("classes: [{pattern: b, priority: tpo}]", "distill.classes.0.priority = tpo: should be 'top', 'mid' or 'low'"),
        ("prompts: {source: tex}", "one.yaml: distill.prompts.source = tex: should be one of 'grammar', 'text'"),
        ("prompts: {source: text}", "distill.prompts.file: required"),
        ("function: math.cosine", "one.yaml: distill.function = math.cosine: "),
        ("train: {grids_at: [4]}", "distill: train.grids_at = 4 is below train.batch_size, raise it"),
    ],
)
def test_an_error_in_a_file_is_refused_by_its_full_path(tmp_path: Path, text: str, expected: str) -> None:
    message = refusal_message("--run r", write_yaml(tmp_path, f"distill:\n  {text}\n"))
    assert expected in message
    assert "\n" not in message


def test_a_table_may_be_replaced_by_a_rule_that_has_a_name(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, "distill: {run: r, train: {rates: {up: 2}}}")
    rates = {words: load(Config, "distill", [file], words.split()).train.rates for words in ("", RULE, TABLE)}
    assert rates == {"": {"mid": 1.0, "up": 2.0}, RULE: "even", TABLE: {"mid": 1.0, "up": 3.0}}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--train.bach-size 3", "--train.bach-size: unknown option - did you mean --train.batch-size?"),
        ("--train.batch-size -3", "command line: distill.train.batch_size = -3: should be greater than or equal to 1"),
        ("--train.batch-size many", "command line: distill.train.batch_size = many: should be a valid integer"),
        ("--train.batch-size 3 4", "--train.batch-size: takes one value (INT), not 2: 3 4"),
        ("--train.batch-size", "--train.batch-size: needs a value (INT)"),
        ("--train.weights up", "--train.weights: up is not of the form NAME=VALUE"),
        ("--train.grids-at 2", "distill: train.grids_at = 2 is below train.batch_size"),
        ("--classes [{", "--classes: [{ is not a YAML list or mapping"),
    ],
)
def test_an_error_on_the_command_line_is_refused(words: str, expected: str) -> None:
    message = refusal_message(f"--run r {words}")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("annotation", "written"),
    [
        (tuple[ScaledLora, ...], "FILE[:SCALE] ..."),
        (tuple[LoraFile, ...], "FILE ..."),
        (tuple[SizeShare, ...], "[{size: WIDTHxHEIGHT, share: FLOAT}, ...]"),
        (tuple[WeightedSource, ...], "[{weight: INT, prompts: {...}}, ...]"),
    ],
)
def test_a_list_of_models_is_written_as_the_command_line_takes_it(annotation: Any, written: str) -> None:
    assert metavar(annotation) == written


def test_a_missing_required_key_is_refused() -> None:
    assert refusal_message("") == "distill.run: required - write it in a YAML file or give --run"


def test_every_error_has_its_own_line() -> None:
    assert len(refusal_message("--train.batch-size 0 --train.learning-rate 0").splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distill: {run: a\n", "one.yaml:2: not good YAML"),
        ("distill:\n  run: a\n  run: b\n", "one.yaml:3: not good YAML: run is a duplicate key"),
        ("- distill\n", "one.yaml: should be a mapping of sections"),
        ("distill: 3\n", "one.yaml: distill = 3: should be a mapping of keys to values"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal_message("--run r", write_yaml(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "nowhere.yaml does not exist - --config takes YAML files" in refusal_message(
        "--run r", tmp_path / "nowhere.yaml"
    )


def test_the_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(
        "--run r --prompts.source text --prompts.file p.txt --train.clip none --train.learning-rate 1e-7"
    )
    (tmp_path / "config.yaml").write_text(resolved_yaml(config, "distill"))
    assert load_config("", tmp_path / "config.yaml") == config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_config().run = Path("other")  # type: ignore[misc]


def test_help_shows_every_field_with_default_and_meaning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_config("--help", write_yaml(tmp_path, "distill: {train: {batch_size: 77}}"))
    shown = " ".join(re.sub(r"[│─╭╮╰╯+|]|-{3,}", " ", capsys.readouterr().out).split())
    assert stopped.value.code == 0
    assert "--run PATH the run folder (required)" in shown
    assert "train options the steps" in shown
    assert "--train.batch-size INT rows in a step (default: 77)" in shown
    assert "--train.learning-rate FLOAT peak, per step (default: 0.5)" in shown
    assert "--prompts.file PATH one prompt a line [source text]" in shown
    assert "--others.file PATH one prompt a line [source text]" in shown
    assert "--spare.rank INT how many (default: 16)" in shown


def test_an_optional_union_is_described_like_a_required_one() -> None:
    assert load_config().others is None
    assert load_config("--run r --others.source text --others.file f").others == TextFile(file=Path("f"))
    assert "others.unsaid" in refusal_message("--run r --others.source grammar --others.unsaid 7")


def test_files_and_print_config_are_taken_out_of_the_words() -> None:
    common = parse_common_options(
        ["--config", "a.yaml", "b.yaml", "--run", "r", "--print-config", "--config", "c.yaml"]
    )
    assert common.files == (Path("a.yaml"), Path("b.yaml"), Path("c.yaml"))
    assert (common.print_config, common.options) == (True, ("--run", "r"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("[64x64]", "sizes.0 = 64x64: should be a mapping of keys to values"),
        ("[{size: 64x64}]", "sizes.0.share: required - write share into that entry"),
        ("{64x64: 1}", "sizes: should be a list"),
    ],
)
def test_a_list_of_mappings_is_refused_in_words_of_yaml(sizes: str, message: str) -> None:
    with pytest.raises(Refused, match=re.escape(message)):
        load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], ["--render.sizes", sizes])
