"""On what the studies of a table were run, and whether that is what the runs of a page were trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.report.records import RunRecord
from stages.report.tables import PageTable
from stages.system.storage.locations import location_of, show_locations

CACHE = "cache"
"""What a study read of it: the hash of the cache's recipe, which the origin of a run has too."""
SHOWN_NAMES = 3


def shown_path(path: Path) -> str:
    """A path as it was given, of a store its location, of an absolute one the last two parts."""
    if location_of(path) is not None:
        return str(show_locations(str(path)))
    return "/".join(path.parts[-2:]).replace("//", "/") if path.is_absolute() else str(path)


def basis_table(files: Sequence[Path], read: Mapping[str, str]) -> PageTable:
    """The files of a study, and the hash of everything that its runs read, as far as the table has it."""
    rows = [
        ["configuration", ", ".join(map(shown_path, files))],
        ["cache: recipe", read.get(CACHE, "not in the table")],
        *([name, digest] for name, digest in sorted(read.items()) if name != CACHE),
    ]
    return PageTable("What it was run on", ["part", "sha256 or value"], rows, is_code=True)


def doubts(cache: str | None, runs: Sequence[RunRecord]) -> list[str]:
    """A sentence on the runs of another cache than the study's, and one on those of which that is not known."""
    unknown = [run for run in runs if not cache or not run.origin.recipe_sha256]
    others = [run for run in runs if cache and run.origin.recipe_sha256 not in ("", cache)]
    sentences = list[str]()
    if others:
        named, pronoun = _named(others, runs)
        sentences.append(
            f"These comparisons were made with another teacher, or from other data, than {named}, and say nothing "
            f"certain about {pronoun}."
        )
    if unknown:
        named, pronoun = _named(unknown, runs)
        sentences.append(
            f"It is not known whether these comparisons were made with the teacher and the data of {named}, so they "
            f"say nothing certain about {pronoun}."
        )
    return sentences


def _named(some: Sequence[RunRecord], runs: Sequence[RunRecord]) -> tuple[str, str]:
    """Some runs of the page in words, and their pronoun."""
    pronoun = "it" if len(some) == 1 else "them"
    if len(some) == len(runs):
        return "the run above" if len(runs) == 1 else "the runs above", pronoun
    names, more = [run.name for run in some[:SHOWN_NAMES]], len(some) - SHOWN_NAMES
    parts = [*names, f"{more} more"] if more > 0 else names
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])), pronoun
