import re
import subprocess
import sys
from pathlib import Path

import pytest

from shards.__main__ import main
from shards.manifest import Manifest
from stages.system.refusal import escape_unprintable

ROOT = Path(__file__).parents[2]


def flip_bit(file, bit):
    """Turn one bit of a file."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.parametrize("inner", [True, False])
def test_verify_prints_a_line_for_each_split_and_ok(cache, capsys, inner):
    assert main(["verify", str(cache if inner else cache.parent)]) == 0
    train, validation, ok = capsys.readouterr().out.splitlines()
    assert train.startswith("train: 2 shards, 7 records, 14 states, ")
    assert validation.startswith("validation: 1 shards, 2 records, 4 states, ")
    assert ok == "ok"


def test_verify_names_the_first_bad_record_and_exits_with_1(cache, capsys):
    place = Manifest.open(cache).shards[1].offsets[2]
    flip_bit(cache / "data/train-000001.tar", 8 * (place.st_offset + place.st_size - 1))
    assert main(["verify", str(cache)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(r"train-000001\.tar: sha256 .*, first in record 000000006 at byte \d+", shown.err)
    assert len(shown.err.splitlines()) == 1


def test_show_prints_the_requested_record(cache, capsys):
    main(["show", str(cache), "000000101", "--split", "validation"])
    shown = capsys.readouterr().out
    assert "a star, number 101" in shown
    assert "[2, 3, 4, 5]" in shown
    assert "features.mid" in shown
    assert shown.count("state ") == 2


def test_untrusted_text_reaches_no_terminal_as_escapes():
    assert escape_unprintable("a \x1b[31mred\x07 stär\n") == "a \\x1b[31mred\\x07 stär\\n"


def test_stats_adds_up(cache, capsys):
    main(["stats", str(cache)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    bins = [line for line in lines if line[1:2] == ["to"]]
    assert (len(bins), sum(int(line[3]) for line in bins)) == (10, 18)
    assert ["shape/star", "3", "#" * 40] in lines
    assert ["v_cond", f"{9 * 2 * 3 * 4 * 5 * 2:,}"] in [line[:2] for line in lines]
    split_bytes = sum(int(line[4].replace(",", "")) for line in lines if line[0] in ("train", "validation"))
    first_part = lines.index(["part", "bytes"]) + 1
    assert sum(int(line[-2].replace(",", "")) for line in lines[first_part:]) == split_bytes


def test_the_module_prints_a_refusal_in_one_line_and_exits_with_2(tmp_path):
    words = [sys.executable, "-m", "shards", "verify", str(tmp_path)]
    shown = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("sollune: ")
    assert "manifest.json: not there" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1
