"""Runs that another table has already: made on another machine, or here, and their folders removed since."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from stages.ablation.jobs import SHOWN_CHARACTERS, Job
from stages.ablation.table import Row, read_inputs, read_table
from stages.system.refusal import Refused


def known_rows(jobs: Sequence[Job], table: Path) -> dict[str, list[Row]]:
    """Label -> the rows that `table` has of that job, where they are of its settings.

    Raises `Refused` where they come from another cache, another student or other prompts than these jobs read. What
    is not known of either, in tables of before and while there is no cache, is not compared.
    """
    found = defaultdict[tuple[str, str, str, int], list[Row]](list)
    for row in read_table(table):
        found[row.study, row.regime, row.arm, row.seed].append(row)
    inputs = read_inputs(table)
    for job in jobs:
        theirs = inputs.get(job.study, {})
        for name, now in job.read.items():
            if theirs.get(name, now) != now:
                raise Refused(
                    f"--known: {table}: its runs of {job.study} are of another {name} "
                    f"({theirs[name][:SHOWN_CHARACTERS]}, now {now[:SHOWN_CHARACTERS]}) - leave --known out, or give "
                    "the --run that they were made on"
                )
    places = {job.label: found.get((job.study, job.regime, job.arm, job.seed), []) for job in jobs}
    hashes = {job.label: job.settings_hash() for job in jobs}
    return {label: rows for label, rows in places.items() if rows and {row.settings for row in rows} == {hashes[label]}}
