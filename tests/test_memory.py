"""Laws of how many processes a machine holds."""

from pathlib import Path

import pytest
import torch

from stages.system import memory
from stages.system.memory import available_bytes, refuse_too_many
from stages.system.refusal import Refused
from stages.train.setup import count_parameters

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, 10 GiB free, libraries of half a GiB."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(4)))
    monkeypatch.setattr(memory, "available_bytes", lambda: 10 * memory.GIB)
    monkeypatch.setattr(memory, "own_bytes", lambda: memory.GIB // 2)


def test_as_many_as_fit_are_allowed_and_one_more_is_refused_with_their_number(machine: None) -> None:
    refuse_too_many("processes", 6, memory.GIB, CPU)
    with pytest.raises(
        Refused, match=r"processes = 7: about 10\.5 GiB .*, 1\.5 each, and 10\.0 GiB are free - take 6 at"
    ):
        refuse_too_many("processes", 7, memory.GIB, CPU)


def test_more_than_two_for_each_core_are_refused_whatever_they_weigh(machine: None) -> None:
    refuse_too_many("workers", 8, 0, CPU)
    with pytest.raises(Refused, match=r"workers = 9: 4 cores .* take 4, or 8 at most"):
        refuse_too_many("workers", 9, 0, CPU)


def test_what_does_not_fit_once_is_no_matter_of_how_many(machine: None) -> None:
    with pytest.raises(Refused, match="take a larger machine"):
        refuse_too_many("processes", 2, 20 * memory.GIB, CPU)


@pytest.mark.parametrize("version", [2, 1])
def test_a_containers_limit_counts_without_the_files_that_it_has_read(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used, (stat, key) = memory.CONTAINERS[2 - version]
    for name, text in ((limit, "9000"), (used, "7000"), (stat, f"anon 4000\n{key} 3000\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert available_bytes() == 5000
    (tmp_path / limit).write_text("max")
    assert available_bytes() > 5000


def test_a_networks_size_follows_from_its_config_alone() -> None:
    assert 10**6 < count_parameters(Path("stages/tiny/model")) < 10**7
