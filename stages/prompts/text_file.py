"""Sentences from a text file."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from configs.refusal import Refused
from stages.prompts.rows import Row, RowSource


class FileSource(RowSource):
    """Sentences from a text file, one a line, or `class<TAB>sentence`; read round and round with fresh seeds."""

    source: Literal["file"] = Field("file", description="what kind of source")
    path: Path = Field(description="text file, one prompt a line, optionally class<TAB>prompt")

    def rows(self) -> Iterator[Row]:
        """Every line, with its number as the place."""
        for number, line in enumerate(read_text(self.path, "one prompt a line").splitlines(), 1):
            class_name, _, text = line.strip().rpartition("\t")
            yield Row(f"{self.path}:{number}", text, class_name)

    def lines(self) -> list[str]:
        """The file's usable lines; raises `Refused` when there are none."""
        return [f"{row.class_name}\t{row.text}" if row.class_name else row.text for row in self.usable()]

    def identity(self) -> str:
        """What the prompts depend on."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()

    def __str__(self) -> str:
        return str(self.path)


def read_text(path: Path, holding: str) -> str:
    """A file's text, bytes that are not UTF-8 kept as lone surrogates; raises `Refused` when there is no such file."""
    if not path.is_file():
        raise Refused(f"prompts.path: {path} does not exist - name a file with {holding}")
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape")
