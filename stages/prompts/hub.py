"""Sentences from a column of a Hugging Face dataset."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from configs.values import Location
from stages.prompts.prompt import import_extra
from stages.prompts.table import ColumnSource, TableRow
from stages.system.disk import file_sha256
from stages.system.refusal import Refused

READ_ERRORS = (OSError, ValueError, NotImplementedError, LookupError, TypeError)
"""What datasets and arrow raise for files of another format."""
COMMIT = re.compile(r"[0-9a-f]{40}")


class HubSource(ColumnSource):
    """Sentences from a column of a Hugging Face dataset, streamed; read round and round with fresh seeds."""

    source: Literal["hub"] = Field("hub", description="what kind of source")
    dataset: Location = Field(min_length=1, description="hub id of a dataset, or a local folder of data files")
    subset: str | None = Field(None, description="configuration of the dataset, if it has several")
    part: str = Field("train", description="split of the dataset")
    revision: str | None = Field(None, description="commit or branch; none is the newest commit, named in the recipe")

    def table_rows(self) -> Iterator[TableRow]:
        """Every row of the stream."""
        datasets = import_extra("datasets", "a Hugging Face dataset")
        revision = None if Path(self.dataset).exists() else self._commit()
        try:
            stream = datasets.load_dataset(
                self.dataset, self.subset, split=self.part, revision=revision, streaming=True
            )
            if stream.column_names and set(self.columns) <= set(stream.column_names):
                stream = stream.select_columns(self.columns)  # pictures beside the sentences are then never decoded
            for number, values in enumerate(stream, 1):
                yield TableRow(f"{self.dataset}/{self.part}: row {number}", values)
        except (*READ_ERRORS, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise Refused(
                f"prompts.dataset: {self.dataset}: cannot be read: {reason} - see prompts.subset and prompts.part"
            ) from error

    def identity(self) -> str:
        """A digest of all that the prompts depend on: the dataset's commit, or the files of a local folder."""
        folder = Path(self.dataset)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        content = [f"{path.relative_to(folder)} {file_sha256(path)}" for path in files] or [
            self.dataset,
            self._commit(),
        ]
        settings = [self.subset, self.part, self.column, self.class_column]
        return hashlib.sha256(json.dumps([content, settings]).encode()).hexdigest()

    def format_lines(self) -> list[str]:
        """How the dataset is read."""
        return [f"{self.dataset}/{self.part} read as a dataset, {self.column_text}"]

    def _commit(self) -> str:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        if self.revision and COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            # The folder that it returns is named by the commit, also in a local copy.
            folder = snapshot_download(
                self.dataset, repo_type="dataset", revision=self.revision, allow_patterns=["README.md"]
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise Refused(
                f"prompts.dataset: {self.dataset!r} is neither a folder nor a hub dataset that can be reached"
            ) from error
        return Path(folder).name

    def __str__(self) -> str:
        return f"{self.dataset}/{self.part} (column {self.column})"
