"""The tables of `benchmarks.few_steps` in Markdown, from its results."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def print_tables(results: Mapping[str, Any]) -> None:
    """Print every table."""
    runs, scales = len(results["runs"]), results["guidance"]
    print(f"\n{runs} runs, {results['settings']['prompts']} sentences that no training saw; (95 % interval; runs)")
    names = list(dict.fromkeys(name for measured in scales.values() for name in measured["rows"]))
    for title, key, text in (("All right, %", "right", _percent), ("Paired error", "error", _error)):
        print(f"\n{title}, by guidance\n")
        _table(
            ["", *scales],
            ([name, *(_with_interval(_cell(one, name, key), text) for one in scales.values())] for name in names),
        )
    other = ", ".join(f"{one['error_other_noise']:.3f} at {w}" for w, one in scales.items())
    print(f"\nThe teacher from other noises: error {other}.")
    for title, key in (("Frechet distance, of the total variance,", "frechet"), ("KID", "kid")):
        print(f"\n{title} to the teacher at 25 steps from other noises, by guidance (runs within the floor)\n")
        floors = [
            f"{one['floors'][key]['mean']:.4f}, 95 %: {one['floors'][key]['limit']:.4f}" for one in scales.values()
        ]
        rows = ([name, *(_distance(_cell(one, name, key)) for one in scales.values())] for name in names)
        _table(["", *scales], [["floor", *floors], *rows])
    _print_diversity(results["diversity"])
    print("\nThe distilled student on shifted grids\n")
    _table(
        ["grid", "all right, %", "paired error"],
        (
            [grid, _with_interval(row["right"], _percent), _with_interval(row["error"], _error)]
            for grid, row in results["shifts"].items()
        ),
    )
    _print_seconds(results)
    print("\nMarks\n")
    _table(
        ["mark", "measured", ""],
        ([name, f"{one['value']:.4f}", "met" if one["met"] else "missed"] for name, one in results["marks"].items()),
    )


def _print_diversity(diversity: Mapping[str, Any]) -> None:
    for key, title in (("pooled", "of all answers together"), ("by_prompt", "of the answers to one sentence")):
        print(f"\nUnsaid attributes: total variation {title} against the teacher's (runs within the floor)\n")
        names = list(dict.fromkeys(name for one in diversity.values() for name in one["rows"]))
        floors = [
            f"{one['floors'][key]['mean']:.3f}, 95 %: {one['floors'][key]['limit']:.3f}" for one in diversity.values()
        ]
        rows = ([name, *(_distance(one["rows"][name][key], 3) for one in diversity.values())] for name in names)
        _table(["", *diversity], [["floor", *floors], *rows])
    print("\nUnsaid attributes, %: the share that differs most from the teacher's; same answers under the same noise\n")
    _table(
        ["", *diversity],
        ([name, *(_most_changed(one, name) for one in diversity.values())] for name in names),
    )


def _most_changed(attribute: Mapping[str, Any], name: str) -> str:
    row, teacher = attribute["rows"][name], attribute["teacher_shares"]
    word = max(teacher, key=lambda one: abs(row["shares"][one] - teacher[one]))
    return (
        f"{word} {_percent(teacher[word])} to {_percent(row['shares'][word])}; same {_percent(row['same_as_teacher'])}"
    )


def _print_seconds(results: Mapping[str, Any]) -> None:
    print(f"\nCalls and seconds of processor for a picture, {results['threads']} thread(s)\n")
    first = next(iter(results["seconds"].values()))["picture_seconds"]
    _table(
        ["", "calls", "sampling", "with decoding", "times as fast"],
        (
            [
                name,
                f"{one['calls']:g}",
                f"{one['sampling_seconds']:.4f}",
                f"{one['picture_seconds']:.4f}",
                f"{first / one['picture_seconds']:.1f}",
            ]
            for name, one in results["seconds"].items()
        ),
    )
    for run, seconds in zip(results["runs"], results["training_seconds"], strict=True):
        if seconds := {n: one for n, one in seconds.items() if one is not None}:
            parts = ", ".join(f"{n} windows {one:.0f} s" for n, one in seconds.items())
            print(f"\n{run}: training by the journal: {parts}")


def _cell(measured: Mapping[str, Any], name: str, key: str) -> Mapping[str, Any]:
    value: Mapping[str, Any] = measured["rows"][name][key]
    return value


def _with_interval(cell: Mapping[str, Any], text: Any) -> str:
    low, high = cell["interval"]
    runs = f"; {' / '.join(map(text, cell['runs']))}" if len(cell["runs"]) > 1 else ""
    return f"{text(cell['mean'])} ({text(low)} to {text(high)}{runs})"


def _distance(cell: Mapping[str, Any], digits: int = 4) -> str:
    return f"{cell['mean']:.{digits}f} ({cell['within']} of {len(cell['runs'])})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _error(value: float) -> str:
    return f"{value:.3f}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
