"""Laws of the values that users write: homes are opened, numbers have a measure, text is text."""

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from configs.load import load, parse_common_options
from configs.values import Location, Strict
from stages.system.refusal import Refused


class Inner(Strict):
    table: dict[str, Path] = Field({}, description="files by name")


class Config(Strict):
    """All that a value can be."""

    run: Path | None = Field(None, description="a folder")
    files: tuple[Path, ...] = Field((), description="files")
    teacher: Location = Field("org/name", description="a folder or hub id")
    text: str = Field("", description="a sentence")
    seed: int = Field(0, description="a number")
    share: float | None = Field(None, description="a share")
    shares: dict[str, float] = Field({}, description="shares")
    inner: Inner = Field(Inner(), description="more")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/a/test")


def test_a_home_is_opened_wherever_a_path_stands_and_in_no_sentence(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("distill: {files: [~/a, b~, c/~], inner: {table: {x: ~/d}}, text: ~ is a tilde}\n")
    config = load(Config, "distill", [file], ["--run", "~", "--teacher", "~/t"])
    assert (config.run, config.teacher, config.text) == (Path("/home/of/a/test"), "/home/of/a/test/t", "~ is a tilde")
    assert config.files == (Path("/home/of/a/test/a"), Path("b~"), Path("c/~"))
    assert config.inner.table == {"x": Path("/home/of/a/test/d")}


def test_a_home_is_opened_where_a_configuration_lies() -> None:
    assert parse_common_options(["--config", "~/a.yaml", "b.yaml"]).files == (
        Path("/home/of/a/test/a.yaml"),
        Path("b.yaml"),
    )


def test_a_variable_of_the_environment_is_not_opened() -> None:
    assert load(Config, "distill", [], ["--run", "$HOME/x"]).run == Path("$HOME/x")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--run ~no-such-user/x", "no user 'no-such-user'"),
        ("--files a ~no-such-user", "no user 'no-such-user'"),
        ("--teacher ~no-such-user/x", "no user 'no-such-user'"),
        ("--seed 9223372036854775808", "64 bits"),
        ("--share inf", "finite"),
        ("--share nan", "finite"),
        ("--shares a=-inf", "finite"),
        ("--text a\x1bb", r"U\+001B"),
        ("--text a\udcffb", "byte FF"),
        (f"--run {'k' * 256}", "255 bytes"),
    ],
)
def test_a_meaningless_value_is_refused_with_its_key(words: str, reason: str) -> None:
    with pytest.raises(Refused, match=f"command line: distill.*{reason}") as refusal:
        load(Config, "distill", [], words.split(" "))
    assert str(refusal.value).isprintable()


def test_a_value_of_the_program_is_validated_like_one_of_a_file() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Config(share=float("inf"))
