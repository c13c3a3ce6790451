"""Every test runs offline and on one thread: two processes of one thread each fill two cores."""

import os
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

from tests.v_teachers import LABELS, make_teacher

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _stamps_of_this_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test verifies is not cached for the others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "stamps"))


@pytest.fixture(scope="session")
def teachers_by_prediction(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders of a teacher of each prediction type, rightly labelled; they are made once and not changed."""
    folder = tmp_path_factory.mktemp("teachers")
    return {name: make_teacher(folder / name.replace(", ", "-").replace(" ", "-"), name) for name in LABELS}
