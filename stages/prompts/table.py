"""Sentences from a text file, or from a column of a table: CSV, JSON lines or parquet."""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from stages.prompts.prompt import import_extra
from stages.prompts.rows import Row, RowSource, fault_of_row
from stages.system.refusal import Refused, did_you_mean, format_value
from stages.system.text import encoding_of, parse_json, plain_file_bytes, read_text, split_lines

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


class TableRow(NamedTuple):
    """A row of a table; one with a `row_fault` is unusable as a whole and has no values."""

    place: str
    values: Mapping[str, Any]
    row_fault: str | None = None


class ColumnSource(RowSource):
    """What tables have in common: a column of sentences and an optional one of class names."""

    column: str = Field("text", description="column of the sentences")
    class_column: str | None = Field(None, description="column of the class names, if there is one")

    def table_rows(self) -> Iterator[TableRow]:
        """Every row, with its values by column."""
        raise NotImplementedError

    def rows(self) -> Iterator[Row]:
        """Every row; a missing value is an empty sentence."""
        for row in self.table_rows():
            if row.row_fault:
                yield Row(row.place, "", row_fault=row.row_fault)
                continue
            text, class_name = _cell(row, self.column), _cell(row, self.class_column)
            raw = text + class_name
            yield Row(row.place, text.strip(), class_name.strip(), fault_of_row(raw), raw)

    @property
    def columns(self) -> list[str]:
        """The names of the columns that are read."""
        return [name for name in (self.column, self.class_column) if name is not None]

    @property
    def column_text(self) -> str:
        """Which columns are read, for a report."""
        classes = f", classes from column {self.class_column!r}" if self.class_column else ""
        return f"sentences from column {self.column!r}{classes}"


class TableSource(ColumnSource):
    """Sentences from a column of a .csv, .tsv, .jsonl or .parquet file; read round and round with fresh seeds."""

    source: Literal["table"] = Field("table", description="what kind of source")
    path: Path = Field(description=".csv, .tsv (with a head line), .jsonl or .parquet file")

    def table_rows(self) -> Iterator[TableRow]:
        """Every row of the file, read by the suffix of its name."""
        readers = {".csv": self._csv, ".tsv": self._csv, ".jsonl": self._jsonl, ".parquet": self._parquet}
        reader = readers.get(self._kind)
        if reader is None:
            raise Refused(f"prompts.path: {self.path}: unknown kind of table - known here: {', '.join(readers)}")
        yield from reader()

    def identity(self) -> str:
        """A digest of all that the prompts depend on."""
        digest = hashlib.sha256()
        for row in self.usable_rows():
            digest.update(json.dumps([row.class_name, row.text]).encode())
        return digest.hexdigest()

    def format_lines(self) -> list[str]:
        """How the file is read."""
        kinds = {".jsonl": "one JSON object a line", ".parquet": "parquet"}
        kind = kinds.get(self._kind, f"rows of cells parted by {DELIMITERS[self._delimiter]}")
        encoding = "" if self._kind == ".parquet" else f" in {encoding_of(self.path)}"
        return [f"{self.path} read as {kind}{encoding}, {self.column_text}", *self._long_rows()]

    def _long_rows(self) -> list[str]:
        """A line about rows of a CSV over several lines: a quote that is closed too late joins rows."""
        rows = self._csv() if self._kind in (".csv", ".tsv") else iter(())
        places = [row.place for row in rows if any("\n" in value for value in row.values.values())]
        return [f"{len(places)} rows over several lines, kept (the first: {places[0]})"] if places else []

    @property
    def _kind(self) -> str:
        return self.path.suffix.lower()

    @property
    def _delimiter(self) -> str:
        return "\t" if self._kind == ".tsv" else ","

    def _lines(self, content: str) -> list[str]:
        return split_lines(read_text(self.path, f"prompts.path: {self.path}", f"name a file with {content}"))

    def _csv(self) -> Iterator[TableRow]:
        lines = self._lines("a table")
        table = csv.reader((f"{line}\n" for line in lines), delimiter=self._delimiter, strict=True)
        first_line = 1
        try:
            names = self._column_names(next(table, []), lines)
            first_line = table.line_num + 1
            for values in table:
                place, first_line = f"{self.path}:{first_line}", table.line_num + 1
                if values and len(values) != len(names):
                    more = "more" if len(values) > len(names) else "fewer"
                    yield TableRow(place, {}, f"with {more} cells than the head")
                elif values:
                    yield TableRow(place, dict(zip(names, values, strict=True)))
        except csv.Error as error:
            raise Refused(f"{self.path}:{first_line}: {_csv_problem(str(error))}") from error

    def _column_names(self, names: Sequence[str], lines: Sequence[str]) -> Sequence[str]:
        """The cells of the head; raises `Refused` unless they name each column that is read once."""
        place = f"{self.path}:1"
        if lines and lines[0].lower().startswith("sep="):
            raise Refused(f"{place}: {format_value(lines[0])} is a note of Excel's, not the head - remove this line")
        if not any(name.strip() for name in names):
            raise Refused(f"{place}: no head - name the columns in the first line")
        twice = [name for name in names if name.strip() and names.count(name) > 1]
        if twice:
            raise Refused(f"{place}: the column {format_value(twice[0])} stands twice in the head - rename one")
        missing = next((column for column in self.columns if column not in names), None)
        if missing is None:
            return names
        for delimiter, word in DELIMITERS.items():
            if delimiter != self._delimiter and missing in [name.strip(' "') for name in lines[0].split(delimiter)]:
                raise Refused(
                    f"{place}: no column {missing!r}: the cells are parted by {word}, {self._kind} is read "
                    f"with {DELIMITERS[self._delimiter]} - save it with these"
                )
        raise Refused(f"{place}: no column {missing!r} - {did_you_mean(missing, list(map(format_value, names)))}")

    def _jsonl(self) -> Iterator[TableRow]:
        for number, line in enumerate(self._lines("one JSON object a line"), 1):
            if not line.strip():
                continue
            place = f"{self.path}:{number}"
            try:
                values = parse_json(line)
            except ValueError as error:
                raise Refused(f"{place}: not good JSON: {error} - one object a line") from error
            if not isinstance(values, dict):
                raise Refused(f"{place}: {format_value(line)}: should be a JSON object")
            yield TableRow(place, values)

    def _parquet(self) -> Iterator[TableRow]:
        plain_file_bytes(self.path, f"prompts.path: {self.path}", "name a parquet file")
        parquet, arrow = import_extra("pyarrow.parquet", "a parquet file"), import_extra("pyarrow", "a parquet file")
        try:
            file = parquet.ParquetFile(self.path)
            names = file.schema_arrow.names
            for column in self.columns:
                if names.count(column) != 1:
                    amount = "no" if column not in names else "more than one"
                    raise Refused(f"{self.path}: {amount} column {column!r} - {did_you_mean(column, names)}")
            number = count(1)
            for batch in file.iter_batches(columns=self.columns):
                columns = [_text_as_bytes(arrow, values).to_pylist() for values in batch.columns]
                for values in zip(*columns, strict=True):
                    place = f"{self.path}: row {next(number)}"
                    yield TableRow(place, dict(zip(batch.schema.names, values, strict=True)))
        except (arrow.ArrowException, OSError, ValueError, NotImplementedError, LookupError, TypeError) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise Refused(f"{self.path}: not a good parquet file: {reason} - write it again") from error

    def __str__(self) -> str:
        return f"{self.path} (column {self.column})"


class FileSource(RowSource):
    """Sentences from a text file, one a line, or `class<TAB>sentence`; read round and round with fresh seeds."""

    source: Literal["file"] = Field("file", description="what kind of source")
    path: Path = Field(description="text file, one prompt a line, optionally class<TAB>prompt")

    def rows(self) -> Iterator[Row]:
        """Every line, with its number as the place."""
        text = read_text(self.path, f"prompts.path: {self.path}", "name a file with one prompt a line")
        for number, line in enumerate(split_lines(text), 1):
            yield _row_of_line(f"{self.path}:{number}", line)

    def identity(self) -> str:
        """A digest of all that the prompts depend on."""
        lines = [f"{row.class_name}\t{row.text}" if row.class_name else row.text for row in self.usable_rows()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def format_lines(self) -> list[str]:
        """How the file is read."""
        return [f"{self.path} read as {encoding_of(self.path)} text, a sentence a line, a class before a tab"]

    def __str__(self) -> str:
        return str(self.path)


def _cell(row: TableRow, column: str | None) -> str:
    if column is None:
        return ""
    if column not in row.values:
        raise Refused(f"{row.place}: no column {column!r} - {did_you_mean(column, list(row.values))}")
    value = row.values[column]
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="surrogateescape")
    if not isinstance(value, str | None):
        shown = format_value(value)
        raise Refused(f"{row.place}: {column} = {shown}: should be text - name the column of the sentences")
    return value or ""


def _text_as_bytes(arrow: Any, values: Any) -> Any:
    """A column of text as bytes, which may be no UTF-8; any other as it is."""
    if arrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    text = arrow.types.is_string(values.type) or arrow.types.is_large_string(values.type)
    return values.cast(arrow.large_binary()) if text else values


def _csv_problem(reason: str) -> str:
    """An error of the csv library in words of a user."""
    if reason == "unexpected end of data":
        return "a quote opens in this row and is never closed - close it, or double a quote inside of a cell"
    if reason.startswith("field larger"):
        return f"a cell of more than {csv.field_size_limit():,} characters in this row - is a quote not closed?"
    return f"not good CSV: {reason} - double a quote inside of a cell, and put the cell in quotes"


def _row_of_line(place: str, line: str) -> Row:
    """A line, with or without a class; white space around it does not count, but for a tab that ends a class."""
    content = line.strip()
    class_name, tab, text = content.rpartition("\t")
    fault = fault_of_row(line)
    if fault is None and "\t" in class_name:
        fault = "with two tabs"
    if fault is None and content and not tab and "\t" in line[len(line.rstrip()) :]:
        fault = "with a class and no sentence"
    return Row(place, text, class_name, fault, line)
