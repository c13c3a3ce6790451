"""`sollune classes show FILE`: a class file as a table, with what it will cost."""

import sys
from collections import Counter

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.terminal import console
from stages.classes import ClassFile, Found, load_classes, search
from stages.evaluate.outlay import cost
from stages.evaluate.outlook import Config, Outlook, in_cache, outlook
from stages.pictures import hidden_lines
from stages.prompts import omission_lines

PIPE_WIDTH = 132


def show(config: Config) -> None:
    """Print the table and the cost; raises `Refused` for overlaps, empty classes and impossible quotas."""
    classes = load_classes(config.classes)
    found = outlook(classes, config)
    prompts = search(config.prompts, config.seed, "train", classes, found.pictures) if config.prompts else None
    cached = in_cache(classes, config.run / "cache") if config.run else None
    wide = wide_console()
    wide.print(table(classes, found, prompts, cached))
    wide.print("\n".join(cost(classes, config, found)), soft_wrap=True, highlight=False, markup=False)
    for name in [spec.name for spec in classes.classes if cached is not None and not (spec.tags or cached[spec.name])]:
        wide.print(f"new       class {name!r}: none of the records that the student learnt from is of it", markup=False)
    for spec in classes.classes:
        for line in hidden_lines(spec):
            wide.print(line, soft_wrap=True, highlight=False, markup=False)
    if prompts and config.prompts:
        for line in omission_lines(config.prompts.faults(prompts.looked_at)):
            wide.print(line, soft_wrap=True, highlight=False, markup=False)
        wide.print(f"prompts   the first {prompts.looked_at:,} of the source hold them all", highlight=False)


def wide_console() -> Console:
    """A console as wide as the terminal; what goes into a file or a pipe is not squeezed into 80."""
    return console(None if sys.stdout.isatty() else PIPE_WIDTH)


def table(classes: ClassFile, found: Outlook, prompts: Found | None, cached: Counter[str] | None) -> Table:
    """A row for each class."""
    shown = Table(box=SIMPLE, pad_edge=False)
    for head in ("class", "prompts"):
        shown.add_column(head, overflow="fold")
    heads = ["weight", "share %", "pictures", "draws", "epochs"]
    heads += ["photographs"] if any(found.photographs.values()) else []
    heads += ["distinct"] if prompts else []
    heads += ["in cache"] if cached is not None else []
    for head in heads:
        shown.add_column(head, justify="right", overflow="fold")
    for spec in classes.classes:
        name = spec.name
        cells = [f"{spec.priority} {classes.relative(spec):g}", f"{100 * classes.weight(spec):.1f}"]
        cells += [str(found.pictures[name]), f"{found.draws[name]:.1f}", f"{found.epochs[name]:.2f}"]
        cells += [str(found.photographs[name])] if any(found.photographs.values()) else []
        cells += [str(len({prompt.text for prompt in prompts.prompts[name]}))] if prompts else []
        cells += ["?" if spec.tags else str(cached[name])] if cached is not None else []
        shown.add_row(escape(name), escape(spec.rule), *cells)
    return shown
