"""A run folder with a small cache with landings, and a student that was distilled from it a little."""

from pathlib import Path

import pytest

from stages import __main__ as cli
from tests.fast.runs import CONFIG, FEW_PROMPTS, GRID


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN with RUN/cache of four windows and RUN/distill."""
    run = tmp_path_factory.mktemp("fast") / "run"
    assert cli.main(["cache-teacher", *CONFIG, "--run", str(run), *FEW_PROMPTS]) == 0
    few = (
        "--david.fusion.formula",
        "static",
        "--train.max-samples",
        "8",
        "--train.batch-size",
        "4",
        "--validation.states",
        "0",
        *GRID,
    )
    assert cli.main(["distill", *CONFIG, "--run", str(run), *few]) == 0
    return run
