"""What a prompt is, which split owns it, and what sources of composed sentences have in common."""

import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import ValidationError

from configs.load import first_error
from configs.values import Strict
from configs.yaml_text import read_yaml
from stages.system.refusal import Refused

Split = Literal["train", "validation"]
VALIDATION_ONE_IN = 16


@dataclass(frozen=True)
class Prompt:
    """A sentence, the class it belongs to (`family/member`, for quotas and globs) and the seed of its picture."""

    text: str
    class_name: str
    seed: int
    derivation: tuple[tuple[str, str], ...] = ()
    """How the sentence was made: (choice, what was chosen), in the order of choosing."""


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (not on the process, platform or order of calls)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def split_of(text: str) -> Split:
    """The split that owns a sentence: decided by the sentence itself, so no source can leak one into the other."""
    return "validation" if derived_seed("split", text) % VALIDATION_ONE_IN == 0 else "train"


class SentenceMaker(Protocol):
    """A loaded grammar or lexicon."""

    def prompt(self, seed: int, index: int) -> Prompt:
        """Prompt number `index` of this seed."""


class ComposedSource(Strict):
    """What sources of composed sentences have in common: every sentence is usable, and nothing depends on a format."""

    def load(self) -> SentenceMaker:
        """Read the source's file; raises `Refused` with its name."""
        raise NotImplementedError

    def format_lines(self) -> list[str]:
        """Nothing to report: the file is read in one way only."""
        return []

    def unusable_rows(self, prompt_count: int) -> dict[str, list[str]]:
        """None: all composed sentences are usable."""
        return {}

    def iter_prompts(self, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompts start, start + 1, ... of this seed, without end."""
        maker = self.load()
        return (maker.prompt(seed, index) for index in count(start))


Model = TypeVar("Model", bound=Strict)


def load_model(path: Path, model: type[Model], option: str, hint: str) -> Model:
    """A YAML file as a model; raises `Refused` with the file's name and its first error."""
    content = read_yaml(path, f"{option}: {path}", hint)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        keys, problem = first_error(error, model, content)
        where = f"{'.'.join(map(str, keys))}: " if keys else ""
        raise Refused(f"{path}: {where}{problem}") from error


def import_extra(module: str, purpose: str) -> Any:
    """A module of the optional extra; raises `Refused` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise Refused(f"prompts: {purpose} needs the package {package} - pip install 'sollune[datasets]'") from error
