"""Runs that another table has already: made on another machine, or here, and their folders removed since."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stages.ablation.jobs import SHOWN_CHARACTERS, Job
from stages.ablation.table import Row, read_inputs, read_table
from stages.system.refusal import Refused


@dataclass(frozen=True)
class KnownRows:
    """What a table has of some jobs."""

    rows: Mapping[str, list[Row]] = field(default_factory=dict)
    """label of a job -> its rows"""
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """study -> what those runs read -> the hash of it; empty where the table does not say"""


def known_rows(jobs: Sequence[Job], table: Path, metrics: Mapping[str, Sequence[str]]) -> KnownRows:
    """The rows that `table` has of these jobs, where they are of their settings and have all `metrics` of the study.

    Raises `Refused` where they come from another cache, another student or other prompts than these jobs read. What
    is not known of either, in tables of before and while there is no cache, is not compared.
    """
    found = defaultdict[tuple[str, str, str, int], list[Row]](list)
    for row in read_table(table):
        found[row.study, row.regime, row.arm, row.seed].append(row)
    inputs, kept = read_inputs(table), dict[str, list[Row]]()
    for job in jobs:
        rows = found.get((job.study, job.regime, job.arm, job.seed), [])
        last = max((row.samples for row in rows), default=0)
        at_the_end = {row.metric for row in rows if row.samples == last >= job.samples}
        if (
            not rows
            or {row.settings for row in rows} != {job.settings_hash()}
            or not at_the_end >= {*metrics[job.study]}
        ):
            continue
        kept[job.label] = rows
        theirs = inputs.get(job.study, {})
        for name, now in job.read.items():
            if theirs.get(name, now) != now:
                raise Refused(
                    f"{table}: its runs of {job.study} are of another {name} ({theirs[name][:SHOWN_CHARACTERS]}, now "
                    f"{now[:SHOWN_CHARACTERS]}) - give the --run that they were made on, or leave that table out"
                )
    studies = {job.study for job in jobs if job.label in kept}
    return KnownRows(kept, {study: inputs.get(study, {}) for study in studies})


def inputs_of(jobs: Sequence[Job], *tables: KnownRows) -> dict[str, Mapping[str, str]]:
    """By study: what all of its runs read, those of the tables too; nothing where one of these does not say it."""
    stated = {job.study: job.read for job in jobs}
    for table in tables:
        for study, theirs in table.inputs.items():
            now = stated[study]
            stated[study] = {name: theirs[name] for name in theirs if now.get(name, theirs[name]) == theirs[name]}
    return {study: read for study, read in stated.items() if read}
