"""Sentences from one column of a table: CSV, JSON lines, parquet, or a Hugging Face dataset."""

import csv
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from configs.refusal import Refused, did_you_mean
from stages.prompts.rows import Row, RowSource
from stages.prompts.text_file import read_text

Cells = Mapping[str, Any]
COMMIT = re.compile(r"[0-9a-f]{40}")


class ColumnSource(RowSource):
    """What tables have in common: a column of sentences, and perhaps one of class names."""

    column: str = Field("text", description="column of the sentences")
    class_column: str | None = Field(None, description="column of the class names, if there is one")

    def cells(self) -> Iterator[tuple[str, Cells]]:
        """(place, the row's cells by column), for every row."""
        raise NotImplementedError

    def rows(self) -> Iterator[Row]:
        """Every row; a missing value is an empty sentence."""
        for place, cells in self.cells():
            yield Row(place, self._cell(place, cells, self.column), self._cell(place, cells, self.class_column))

    def _cell(self, place: str, cells: Cells, column: str | None) -> str:
        if column is None:
            return ""
        if column not in cells:
            raise Refused(f"{place}: no column {column!r} - {did_you_mean(column, list(cells))}")
        value = cells[column]
        if isinstance(value, bytes):
            value = value.decode("utf-8", errors="surrogateescape")
        if not isinstance(value, str | None):
            raise Refused(f"{place}: {column} = {value!r:.60}: should be text - name the column of the sentences")
        return (value or "").strip()


class TableSource(ColumnSource):
    """Sentences from a column of a .csv, .tsv, .jsonl or .parquet file; read round and round with fresh seeds."""

    source: Literal["table"] = Field("table", description="what kind of source")
    path: Path = Field(description=".csv, .tsv (with a head line), .jsonl or .parquet file")

    def cells(self) -> Iterator[tuple[str, Cells]]:
        """Every row of the file, read as its name's ending says."""
        readers = {".csv": self._csv, ".tsv": self._csv, ".jsonl": self._jsonl, ".parquet": self._parquet}
        reader = readers.get(self.path.suffix.lower())
        if reader is None:
            raise Refused(f"prompts.path: {self.path}: unknown kind of table - known here: {', '.join(readers)}")
        yield from reader()

    def identity(self) -> str:
        """What the prompts depend on."""
        digest = hashlib.sha256()
        for row in self.usable():
            digest.update(json.dumps([row.class_name, row.text]).encode())
        return digest.hexdigest()

    def _csv(self) -> Iterator[tuple[str, Cells]]:
        text = read_text(self.path, "a table")
        table = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if self.path.suffix == ".tsv" else ",")
        try:
            for cells in table:
                yield f"{self.path}:{table.line_num}", cells
        except csv.Error as error:
            raise Refused(f"{self.path}:{table.line_num}: not good CSV: {error}") from error

    def _jsonl(self) -> Iterator[tuple[str, Cells]]:
        for number, line in enumerate(read_text(self.path, "one JSON object a line").split("\n"), 1):
            if not line.strip():
                continue
            place = f"{self.path}:{number}"
            try:
                cells = json.loads(line)
            except json.JSONDecodeError as error:
                raise Refused(f"{place}: not good JSON: {error.msg} - one object a line") from error
            if not isinstance(cells, dict):
                raise Refused(f"{place}: {line[:60]}: should be a JSON object")
            yield place, cells

    def _parquet(self) -> Iterator[tuple[str, Cells]]:
        if not self.path.is_file():
            raise Refused(f"prompts.path: {self.path} does not exist - name a parquet file")
        parquet, arrow = _extra("pyarrow.parquet", "a parquet file"), _extra("pyarrow", "a parquet file")
        try:
            file = parquet.ParquetFile(self.path)
            names = [name for name in (self.column, self.class_column) if name in file.schema_arrow.names]
            number = 0
            # Without a column of ours the first row says which ones there are.
            for batch in file.iter_batches(columns=names if self.column in names else None):
                columns = {}
                for name, values in zip(batch.schema.names, batch.columns, strict=True):
                    text = arrow.types.is_string(values.type) or arrow.types.is_large_string(values.type)
                    columns[name] = (values.cast(arrow.large_binary()) if text else values).to_pylist()
                for i in range(batch.num_rows):
                    number += 1
                    yield f"{self.path}: row {number}", {name: values[i] for name, values in columns.items()}
        except arrow.ArrowInvalid as error:
            raise Refused(f"{self.path}: not a good parquet file: {str(error).splitlines()[0]}") from error

    def __str__(self) -> str:
        return f"{self.path} (column {self.column})"


class HubSource(ColumnSource):
    """Sentences from a column of a Hugging Face dataset, streamed; read round and round with fresh seeds."""

    source: Literal["hub"] = Field("hub", description="what kind of source")
    dataset: str = Field(description="hub id of a dataset, or a local folder of data files")
    subset: str | None = Field(None, description="configuration of the dataset, if it has several")
    part: str = Field("train", description="split of the dataset")
    revision: str | None = Field(None, description="commit or branch; none is the newest commit, named in the recipe")

    def cells(self) -> Iterator[tuple[str, Cells]]:
        """Every row of the stream."""
        datasets = _extra("datasets", "a Hugging Face dataset")
        revision = None if Path(self.dataset).exists() else self._commit()
        try:
            stream = datasets.load_dataset(
                self.dataset, self.subset, split=self.part, revision=revision, streaming=True
            )
            names = [name for name in (self.column, self.class_column) if name is not None]
            if stream.column_names and set(names) <= set(stream.column_names):
                stream = stream.select_columns(names)  # pictures beside the sentences are then never decoded
            for number, cells in enumerate(stream, 1):
                yield f"{self.dataset}/{self.part}: row {number}", cells
        except (OSError, ValueError) as error:
            raise Refused(f"prompts.dataset: {self.dataset}: cannot be read: {str(error).splitlines()[0]}") from error

    def identity(self) -> str:
        """What the prompts depend on: the dataset's commit, or the files of a local folder."""
        folder = Path(self.dataset)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        said = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
        said = said or [self.dataset, self._commit()]
        asked = [self.subset, self.part, self.column, self.class_column]
        return hashlib.sha256(json.dumps([said, asked]).encode()).hexdigest()

    def _commit(self) -> str:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        if self.revision and COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            # Of the folder that it returns, named by the commit, only the name is wanted: works from a local copy too.
            found = snapshot_download(
                self.dataset, repo_type="dataset", revision=self.revision, allow_patterns=["README.md"]
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise Refused(
                f"prompts.dataset: {self.dataset!r} is neither a folder nor a hub dataset that can be reached"
            ) from error
        return Path(found).name

    def __str__(self) -> str:
        return f"{self.dataset}/{self.part} (column {self.column})"


def _extra(module: str, what: str) -> Any:
    """A module of the optional extra; raises `Refused` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(
            f"prompts: {what} needs the package {module.partition('.')[0]} - pip install 'sollune[datasets]'"
        ) from error
