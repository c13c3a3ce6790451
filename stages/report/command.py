"""`sollune report RUN... --out report.html`: one page about runs, once or again and again while they train."""

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from configs.arguments import path_argument
from stages.nets.run_folder import is_run
from stages.report.page import MAX_RUNS, Page, make_environment, make_page
from stages.system.atomic import atomic_write, is_same_file
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Parser, Refused
from stages.system.terminal import console

DEFAULT_OUT = "report.html"
MIN_WATCH_SECONDS, MAX_WATCH_SECONDS = 1.0, 86400.0


def main(argv: Sequence[str]) -> None:
    """Write the page; with --watch go on until every run is finished."""
    arguments = _parse(argv)
    folders, out = [path_argument(text) for text in arguments.runs], path_argument(arguments.out)
    table = path_argument(arguments.table) if arguments.table else None
    if not folders and table is None:
        raise Refused("report: no run is named - name one or several, such as runs/tiny, or a --table")
    _refuse_out(out, table)
    watch = _watch_seconds(arguments.watch)
    if watch and not folders:
        raise Refused(
            f"--watch: {arguments.watch}: no run is named that it could wait for - name one, or leave --watch out"
        )
    make_environment()
    page = make_page(folders, table, watch)
    refuse_unwritable(out)
    _write(out, page)
    if page.left_out:
        _print(f"warning {_left_out_line(page.left_out)}")
    while watch and not page.complete:
        time.sleep(watch)
        try:
            page = make_page(folders, table, watch)
        except (Refused, OSError) as error:  # a run that is being written may be read again; its page stays as it is
            _print(f"warning {error}")
            continue
        _write(out, page, quiet=not page.complete)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="sollune report", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, or folders that hold some")
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="FILE.html", help="the page (default: %(default)s)")
    parser.add_argument("--table", metavar="FILE.parquet", help="table of `sollune ablate`, for its verdicts")
    parser.add_argument(
        "--watch", metavar="SECONDS", help="write the page again so often, and have it renew itself, until all finish"
    )
    return parser.parse_intermixed_args(argv)


def _watch_seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not MIN_WATCH_SECONDS <= seconds <= MAX_WATCH_SECONDS:
        raise Refused(f"--watch: {text}: should be seconds from {MIN_WATCH_SECONDS:g} to {MAX_WATCH_SECONDS:g}")
    return seconds


def _refuse_out(out: Path, table: Path | None) -> None:
    """Raise `Refused` for a name that no browser opens as a page, for a place inside a run, and for the table."""
    if out.suffix.lower() not in {".html", ".htm"}:
        raise Refused(f"--out: {out}: should end in .html - take a name such as {DEFAULT_OUT}")
    if table is not None and is_same_file(out, table):
        raise Refused(f"--out: {out}: is the table itself, which the page would replace - name another file")
    for folder in Path(os.path.realpath(out)).parents:
        if is_run(folder):
            raise Refused(f"--out: {out}: lies inside the run {folder} - put the page beside the run")
    if out.is_dir():
        raise Refused(f"--out: {out}: is a folder - name a file such as {DEFAULT_OUT}")


def _write(out: Path, page: Page, quiet: bool = False) -> None:
    atomic_write(out, page.text)
    if not quiet:
        size = len(page.text.encode()) / (1 << 20)
        _print(f"{out}: written, {size:.1f} MiB")


def _left_out_line(names: Sequence[str]) -> str:
    first, more = names[0], f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{MAX_RUNS + len(names)} runs, a page takes {MAX_RUNS}: {first}{more} left out - name them for another page"


def _print(line: str) -> None:
    console().print(line, markup=False, highlight=False, soft_wrap=True)
