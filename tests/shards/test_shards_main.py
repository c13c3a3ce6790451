import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.refusal import Refused
from shards.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("inner", [True, False])
def test_verify_prints_a_line_for_each_split_and_ok(cache, capsys, inner):
    assert main(["verify", str(cache if inner else cache.parent)]) == 0
    train, validation, ok = capsys.readouterr().out.splitlines()
    assert train.startswith("train: 2 shards, 7 records, 14 draws, ")
    assert validation.startswith("validation: 1 shards, 2 records, 4 draws, ")
    assert ok == "ok"


def test_verify_refuses_a_cut_shard(cache):
    os.truncate(cache / "data/train-000000.tar", 5000)
    with pytest.raises(Refused, match=r"train-000000\.tar: \d records, manifest says 4"):
        main(["verify", str(cache)])


def test_show_prints_the_record_that_was_asked_for(cache, capsys):
    main(["show", str(cache), "--key", "000000101", "--split", "validation"])
    told = capsys.readouterr().out
    assert "a star, number 101" in told
    assert "[2, 3, 4, 5]" in told
    assert "features.mid" in told
    assert told.count("draw ") == 2


def test_stats_adds_up(cache, capsys):
    main(["stats", str(cache)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    bins = [line for line in lines if line[1:2] == ["to"]]
    assert (len(bins), sum(int(line[3]) for line in bins)) == (10, 18)
    assert ["shape/star", "3"] in lines
    assert ["v_cond", f"{9 * 2 * 3 * 4 * 5 * 2:,}"] in lines
    split_bytes = sum(int(line[4].replace(",", "")) for line in lines if line[0] in ("train", "validation"))
    first_part = lines.index(["part", "bytes"]) + 1
    assert sum(int(line[-1].replace(",", "")) for line in lines[first_part:]) == split_bytes


def test_the_module_tells_a_refusal_in_one_line_and_exits_with_2(tmp_path):
    words = [sys.executable, "-m", "shards", "verify", str(tmp_path)]
    told = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("sollune: ")
    assert "manifest.json: not there" in told.stderr
    assert len(told.stderr.splitlines()) == 1
