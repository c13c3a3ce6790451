"""The tidy table of a study's results, one parquet file: a row for each figure of each run at a number of samples."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from stages.ablation.study import Study
from stages.system.atomic import atomic_path
from stages.system.refusal import Refused, in_one_line

if TYPE_CHECKING:
    import pyarrow

STUDIES_KEY = b"sollune studies"
"""In the metadata of the file: the studies, as JSON by name, so that the table can be judged without its YAML files."""
INPUTS_KEY = b"sollune inputs"
"""Likewise: by the study's name, what its runs read -> the hash of it; tables of before have none."""
COLUMN_TYPES = {str: "string", int: "int64", float: "float64"}


@dataclass(frozen=True, order=True)
class Row:
    """One figure of one run."""

    study: str
    regime: str
    arm: str
    seed: int
    samples: int
    """training samples seen; 0 of a model that was not trained"""
    metric: str
    value: float
    settings: str
    """hash of all settings that the runs of an arm share"""
    weights: str
    """hash of the averaged weights at the end of the run"""


def pyarrow_or_refuse() -> Any:
    """The library; raises `Refused` where it is missing."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise Refused("pyarrow: not installed, and tables are parquet files - pip install 'sollune[report]'") from error
    return pyarrow


def write_table(
    path: Path,
    rows: Iterable[Row],
    studies: Mapping[str, Study] | None = None,
    inputs: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write all rows, sorted, with the studies that they belong to and what those read, whole or not at all."""
    arrow = pyarrow_or_refuse()
    columns = zip(*map(astuple, sorted(rows)), strict=True)
    names = [field.name for field in fields(Row)]
    types = [getattr(arrow, COLUMN_TYPES[Row.__annotations__[name]])() for name in names]
    content = {name: study.model_dump(mode="json") for name, study in sorted((studies or {}).items())}
    metadata = {STUDIES_KEY: json.dumps(content).encode()}
    if inputs:
        metadata[INPUTS_KEY] = json.dumps(inputs, sort_keys=True).encode()
    schema = arrow.schema(list(zip(names, types, strict=True)), metadata=metadata)
    arrays = [list(column) for column in columns] or [[] for _ in names]
    table = arrow.Table.from_arrays(
        [arrow.array(column, type=kind) for column, kind in zip(arrays, types, strict=True)], schema=schema
    )
    with atomic_path(path) as temporary:
        arrow.parquet.write_table(table, temporary)


def read_table(path: Path) -> list[Row]:
    """The rows of a table; raises `Refused` for a file that is none."""
    table = _open_table(path)
    if missing := [field.name for field in fields(Row) if field.name not in table.column_names]:
        raise Refused(f"{path}: no table of an ablation (column {missing[0]} is missing) - name an ablation.parquet")
    names = [field.name for field in fields(Row)]
    try:
        columns = [_column_values(table, name) for name in names]
        rows = [Row(*values) for values in zip(*columns, strict=True)]
    except (TypeError, ValueError) as error:
        raise Refused(f"{path}: no table of an ablation ({in_one_line(error)}) - make it again") from error
    figures = Counter((row.study, row.regime, row.arm, row.seed, row.samples, row.metric) for row in rows)
    if repeated := [figure for figure, count in figures.items() if count > 1]:
        raise Refused(
            f"{path}: no table of an ablation ({len(repeated)} figures stand there more than once, the first of "
            f"{'/'.join(repeated[0][:3])} seed {repeated[0][3]}) - make it again"
        )
    return rows


def _column_values(table: "pyarrow.Table", name: str) -> list[Any]:
    """The values of a column; raises `ValueError` for one of another type, or with gaps."""
    column, kind = table.column(name), COLUMN_TYPES[Row.__annotations__[name]]
    if str(column.type).removeprefix("large_") != kind.replace("float64", "double"):
        raise ValueError(f"column {name} is {column.type}, not {kind}")
    if column.null_count:
        raise ValueError(f"column {name} has {column.null_count} gaps")
    values = column.to_pylist()
    if kind == "int64" and min(values, default=0) < 0:
        raise ValueError(f"column {name} holds {min(values)}")
    return list(values)


def read_studies(path: Path) -> dict[str, Study]:
    """The studies of a table, by name; raises `Refused` where they are not those of this version."""
    metadata = _open_table(path).schema.metadata or {}
    try:
        content = json.loads(metadata.get(STUDIES_KEY, b"{}"))
        return {str(name): Study.model_validate(study) for name, study in content.items()}
    except (ValueError, AttributeError, ValidationError) as error:
        raise Refused(f"{path}: its studies cannot be read ({in_one_line(error)}) - make the table again") from error


def read_inputs(path: Path) -> dict[str, dict[str, str]]:
    """By study: what its runs read -> the hash of it; raises `Refused` where that is no mapping."""
    content = (_open_table(path).schema.metadata or {}).get(INPUTS_KEY, b"{}")
    try:
        return TypeAdapter(dict[str, dict[str, str]]).validate_json(content)
    except ValidationError as error:
        raise Refused(f"{path}: what its runs read cannot be read ({in_one_line(error)}) - make it again") from error


def _open_table(path: Path) -> "pyarrow.Table":
    arrow = pyarrow_or_refuse()
    if path.is_dir():
        raise Refused(f"{path}: is a folder, not a table - name an ablation.parquet")
    try:
        return arrow.parquet.read_table(path)
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise Refused(f"{path}: cannot be read as a table ({in_one_line(error)}) - name an ablation.parquet") from error
