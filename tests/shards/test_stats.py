"""The numbers stay readable, however many classes there are."""

from collections import Counter

from shards.reader import Reader
from shards.stats import MAX_BAR_CHARACTERS, collect_stats, stats_lines


def test_thousands_of_classes_take_few_lines_and_none_is_lost(cache):
    reader = Reader(cache)
    stats = collect_stats(reader)
    stats.classes = Counter({f"class/{i:04d}": 1 + i % 3000 for i in range(5000)})
    lines = list(stats_lines(reader, stats))
    assert len(lines) < 70
    assert max(map(len, lines)) < 100
    largest = next(line.split() for line in lines if line.startswith("class/2999"))
    assert largest == ["class/2999", "3000", "#" * MAX_BAR_CHARACTERS]
    first = next(i for i, line in enumerate(lines) if line.startswith("and 4,980 more classes"))
    last = next(i for i, line in enumerate(lines) if line.startswith("\npart"))
    rest = [line.split("record")[1].lstrip("s").split()[0] for line in lines[first + 1 : last]]
    assert sum(map(int, rest)) == 4980


def test_a_bar_is_as_long_as_its_share_and_never_nothing_for_something(cache):
    reader = Reader(cache)
    stats = collect_stats(reader)
    stats.classes = Counter({"half": 500, "whole": 1000, "one": 1})
    bars = {
        line.split()[0]: line.count("#")
        for line in stats_lines(reader, stats)
        if line.startswith(("half", "who", "one"))
    }
    assert bars == {"half": MAX_BAR_CHARACTERS // 2, "whole": MAX_BAR_CHARACTERS, "one": 1}
