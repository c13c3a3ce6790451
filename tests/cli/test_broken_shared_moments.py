"""Moments that processes cannot share: refused in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

PACKED = ["--train.optimizer.kind", "adamw_8bit"]


@pytest.mark.parametrize("command", ["distill", "finetune-classes"])
@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--train.shard-moments", "true", *PACKED], ["shard_moments", "adamw_8bit", "take kind adamw"]),
        (["--train.shard-moments", "2"], ["train.shard_moments", "2"]),
        (["--train.shard-moments", "half"], ["train.shard_moments", "half"]),
    ],
)
def test_such_sharing_is_refused(
    refused: Callable[..., str], tmp_path: Path, command: str, processes: str, words: list[str], named: list[str]
) -> None:
    base = [command, "--config", "configs/tiny.yaml", "--run", str(tmp_path / "run"), "--processes", processes]
    refused([*base, *words], *named)
