"""Sentences from a text file."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from configs.text import encoding_of, lines_of, read_text
from stages.prompts.rows import Row, RowSource, fault_of_row


class FileSource(RowSource):
    """Sentences from a text file, one a line, or `class<TAB>sentence`; read round and round with fresh seeds."""

    source: Literal["file"] = Field("file", description="what kind of source")
    path: Path = Field(description="text file, one prompt a line, optionally class<TAB>prompt")

    def rows(self) -> Iterator[Row]:
        """Every line, with its number as the place."""
        text = read_text(self.path, f"prompts.path: {self.path}", "name a file with one prompt a line")
        for number, line in enumerate(lines_of(text), 1):
            yield _row(f"{self.path}:{number}", line)

    def lines(self) -> list[str]:
        """The file's usable lines; raises `Refused` when there are none."""
        return [f"{row.class_name}\t{row.text}" if row.class_name else row.text for row in self.usable()]

    def identity(self) -> str:
        """What the prompts depend on."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()

    def reading(self) -> list[str]:
        """How the file is read."""
        return [f"{self.path} read as {encoding_of(self.path)} text, a sentence a line, a class before a tab"]

    def __str__(self) -> str:
        return str(self.path)


def _row(place: str, line: str) -> Row:
    """A line, with or without a class; white space around it says nothing, but for a tab that ends a class."""
    content = line.strip()
    class_name, tab, text = content.rpartition("\t")
    fault = fault_of_row(line)
    if fault is None and "\t" in class_name:
        fault = "with two tabs"
    if fault is None and content and not tab and "\t" in line[len(line.rstrip()) :]:
        fault = "with a class and no sentence"
    return Row(place, text, class_name, fault, line)
