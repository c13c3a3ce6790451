"""`sollune ablate [STUDY.yaml ...] --out FOLDER [--quick]`: run studies, keep one table, write the page of verdicts."""

import re
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.arguments import path_argument
from shards.verify import COMPLETE_FILE
from stages.ablation.block import END, START, block_of, render_block, renew_block
from stages.ablation.page import render_page
from stages.ablation.quick import shortened
from stages.ablation.study import Study, load_study
from stages.ablation.table import Row, pyarrow_or_refuse, read_inputs, read_studies, read_table, write_table
from stages.system.atomic import atomic_write, is_same_file
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Parser, Refused

DEFAULT_STUDIES = tuple(
    Path("configs/ablation", f"{name}.yaml")
    for name in ("david", "first_failure", "flow_without_conversion", "classes")
)
QUICK_STUDIES = DEFAULT_STUDIES[:1]
TABLE_FILE, PAGE_FILE = "ablation.parquet", "ablation.md"


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 when every run of every study is there."""
    parser = _parser()
    args = parser.parse_args(list(argv))
    pyarrow_or_refuse()
    if args.table is not None:
        refuse_options_of_runs(parser, args)
        write_page(args.table, args.page or args.table.with_suffix(".md"), args.block)
        return 0
    if args.block is not None:
        raise Refused(f"--block: {args.block}: is renewed from a finished table - give --table FILE.parquet too")
    files = args.studies or (QUICK_STUDIES if args.quick else DEFAULT_STUDIES)
    studies = {file: shortened(load_study(file)) if args.quick else load_study(file) for file in files}
    names = [study.name for study in studies.values()]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise Refused(f"{repeated}: two studies have this name - give one of the files another name")
    if args.page is not None:
        refuse_lossy_page(args.page, "the table itself", args.out / TABLE_FILE)
        refuse_lossy_page(args.page, "the table of --known", *filter(None, [args.known]))
        refuse_lossy_page(args.page, "a study", *files)
        refuse_unwritable(args.page)
    if args.processes < 1:
        raise Refused(f"--processes: {args.processes} should be 1 or more")
    places = Places(args.run or args.out, args.out, args.page, args.known)
    run_studies(studies, places, args.processes, args.device, args.cluster, args.plan)
    return 0


@dataclass(frozen=True)
class Places:
    """The files and folders of a call."""

    run: Path
    """holds the cache"""
    out: Path
    """of the runs, and of their table"""
    page: Path | None = None
    known: Path | None = None
    """a table whose runs are not made again"""

    @property
    def table(self) -> Path:
        """Of all runs."""
        return self.out / TABLE_FILE


def run_studies(
    studies: Mapping[Path, Study], places: Places, processes: int, device: str, cluster: str, only_plan: bool
) -> None:
    """Run what is not there yet; the table is written whole after each run, the page at the end."""
    # What follows loads networks, which takes seconds: an unreadable study is refused before.
    from stages import cache_teacher, distill
    from stages.ablation import scheduler
    from stages.ablation.inputs import jobs_of, refuse_unlike_plans
    from stages.ablation.jobs import Job
    from stages.ablation.known import KnownRows, inputs_of, known_rows
    from stages.ablation.measuring import read_rows
    from stages.ablation.on_ray import ray_starter
    from stages.ablation.plan import make_plan
    from stages.cache.engines import CLUSTER_PATTERN, HERE
    from stages.nets.run_folder import COMPLETE_MARK
    from stages.system.ownership import refuse_claimed
    from stages.system.storage.remote_claim import claim_place

    if not re.fullmatch(CLUSTER_PATTERN, cluster):
        raise Refused(f"--cluster: {cluster} - give here, ray, or ray:ADDRESS of a running cluster")
    run, out, table = places.run, places.out, places.table
    plans = [make_plan(study, file, run, out, device) for file, study in studies.items()]
    cache_is_there = (run / "cache" / COMPLETE_FILE).is_file()
    base = next((plan.base for plan in plans if plan.base is not None), None)
    base_is_there = base is None or (run / "distill" / COMPLETE_MARK).is_file()
    refuse_unlike_plans(plans, cache_is_there, base_is_there)
    jobs = jobs_of(plans, run if cache_is_there and base_is_there else None)
    named = {study.name: study for study in studies.values()}
    earlier = EarlierTable.read(table, named)
    refuse_claimed(out, "ablate in")
    metrics = {study.name: study.metrics for study in named.values()}
    known = known_rows(jobs, places.known, metrics) if places.known is not None else KnownRows()
    made = {job.label: found for job in jobs if (found := read_rows(job)) is not None}
    # What the table here has of runs that are to be made again stays in it until they are.
    before = known_rows(jobs, table, metrics) if table.exists() else KnownRows()
    rows: dict[str, list[Row]] = {**before.rows, **known.rows, **made}
    missing = [job for job in jobs if job.label not in known.rows and job.label not in made]
    done = len(jobs) - len(missing)
    from_known = f" ({done - len(made)} of them in {places.known})" if places.known is not None else ""
    print(f"{', '.join(named)}: {len(jobs)} runs, {done} are done{from_known}, {len(missing)} to do", flush=True)
    if only_plan:
        for job in missing:
            print(f"{job.label}: {job.samples} samples" if job.trains else f"{job.label}: measured")
        return

    def save() -> None:
        inputs = {**earlier.inputs, **inputs_of(jobs, known, before)}
        write_table(
            table,
            [*earlier.rows, *(row for found in rows.values() for row in found)],
            {**earlier.studies, **named},
            inputs,
        )

    def on_finished(job: Job) -> None:
        if (found := read_rows(job)) is None:
            raise Refused(f"{job.home}: its figures are not there - start again: it goes on")
        rows[job.label] = found
        save()

    with claim_place(out, "ablate in"):
        if missing:
            start = None if cluster == HERE else ray_starter(cluster)
            if not cache_is_there:
                cache_teacher.run(plans[0].cache.model_copy(update={"workers": processes, "cluster": cluster}))
            if base is not None and not base_is_there:
                distill.run(base)
            if not (cache_is_there and base_is_there):
                jobs = jobs_of(plans, run)
                for file in filter(None, [places.known, table if before.rows else None]):
                    known_rows(jobs, file, metrics)  # what they read is known only now
                of_label = {job.label: job for job in jobs}
                missing = [of_label[job.label] for job in missing]
            scheduler.run_jobs(missing, run, processes, on_finished, start)
        save()
    write_page(table, places.page or out / PAGE_FILE)


@dataclass(frozen=True)
class EarlierTable:
    """What the table in `out` holds of studies that are not run now: it stays."""

    rows: Sequence[Row] = ()
    studies: Mapping[str, Study] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, table: Path, named: Collection[str]) -> "EarlierTable":
        """The content of a table, if it is there, without the studies of these names."""
        if not table.exists():
            return cls()
        return cls(
            [row for row in read_table(table) if row.study not in named],
            {name: study for name, study in read_studies(table).items() if name not in named},
            {name: one for name, one in read_inputs(table).items() if name not in named},
        )


def write_page(table: Path, page: Path, block: Path | None = None) -> None:
    """Write the page of a table, and its verdicts on David between the comments of the file `block`.

    Raises `Refused`, with nothing written, where the page would replace either.
    """
    refuse_lossy_page(page, "the file of --block", *filter(None, [block]))
    refuse_lossy_page(page, "the table itself", table)
    refuse_unwritable(page)
    rows, studies = read_table(table), read_studies(table)
    text = render_page(rows, studies)
    if block is not None:
        verdicts = render_block(rows, studies)
        # Whatever is wrong with it is refused before the page is written.
        block_of(block)
        refuse_unwritable(block)
    atomic_write(page, text)
    if block is not None:
        renew_block(block, verdicts)
    print(f"{table}: read; {page}: written" + (f"; {block}: renewed" if block is not None else ""))


def refuse_lossy_page(page: Path, what: str, *files: Path) -> None:
    """Raise `Refused` where the page would replace a file that is read, or that is written beside it."""
    for file in files:
        if is_same_file(page, file):
            raise Refused(f"--page: {page}: is {what} ({file}), which the page would replace - name another")


def refuse_options_of_runs(parser: Parser, args: Namespace) -> None:
    """Raise `Refused` where an option that is for runs stands beside --table, which makes none."""
    for name, value in vars(args).items():
        if name not in ("table", "page", "block") and value not in (parser.get_default(name), []):
            option = f"{value[0]}" if name == "studies" else f"--{name.replace('_', '-')}"
            raise Refused(f"{option}: is for runs, and --table {args.table} makes none - leave one of the two out")


def _parser() -> Parser:
    parser = Parser(prog="sollune ablate", description=__doc__)
    parser.add_argument(
        "studies", type=path_argument, nargs="*", metavar="STUDY.yaml", help="default: those of configs/ablation"
    )
    parser.add_argument(
        "--out", type=path_argument, default=Path("runs/ablation"), help="folder of all runs and of the table"
    )
    parser.add_argument(
        "--run", type=path_argument, help="run folder whose cache is used, and made if it is missing; default: --out"
    )
    parser.add_argument(
        "--known",
        type=path_argument,
        metavar="FILE.parquet",
        help="a table of the same studies: runs that it has, with the same settings, are taken from it and not made",
    )
    parser.add_argument("--quick", action="store_true", help="the small version: few arms, seeds and samples")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="runs at once, one thread each (2)")
    parser.add_argument(
        "--cluster",
        default="here",
        metavar="here|ray[:ADDRESS]",
        help="where runs are made: on this machine, or on a Ray cluster that sees --run and --out",
    )
    parser.add_argument("--device", default="auto", help="torch device; auto takes a GPU where there is one")
    parser.add_argument("--plan", action="store_true", help="print what there is to do, and do nothing")
    parser.add_argument(
        "--table", type=path_argument, metavar="FILE.parquet", help="run nothing: write the page of this table"
    )
    parser.add_argument(
        "--block",
        type=path_argument,
        metavar="README.md",
        help=f"with --table: renew the verdicts on David between {START} and {END} of this file",
    )
    parser.add_argument("--page", type=path_argument, metavar="FILE.md", help="where the page goes (OUT/ablation.md)")
    return parser
