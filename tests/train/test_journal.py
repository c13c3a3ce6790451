import errno
import json
import math
from dataclasses import replace

import pytest
import torch

from configs.values import PictureSize
from stages.system.refusal import Refused
from stages.train.journal import Journal, Window, memory_gib, read_step_lines, truncate_after
from stages.train.losses import Losses, StepResult
from stages.train.runtime import Runtime
from stages.train.trackers import TrackingConfig, flatten

BLOCKS = ("mid", "up_3")
QUIET = TrackingConfig(to=())
CPU = torch.device("cpu")
ALONE = Runtime(CPU)


def step(
    flow_errors: list[float], s: list[float], learning_rate: float = 0.1, importance_weight: list[float] | None = None
) -> StepResult:
    errors = torch.tensor(flow_errors)
    by_block = torch.stack([torch.ones_like(errors), 3 * torch.ones_like(errors)])
    losses = Losses(
        total=errors.mean() * 2,
        rest=errors.mean(),
        flow=errors.mean(),
        guidance=torch.tensor(0.5),
        blocks=by_block.mean(dim=1),
        flow_errors=errors,
        guidance_errors=10 * errors,
        block_errors=by_block,
        importance_weight=torch.ones_like(errors) if importance_weight is None else torch.tensor(importance_weight),
    )
    return StepResult(losses, torch.tensor([1.0, 0.5]), 0.05, torch.tensor(s), torch.tensor(2.0), learning_rate, 0.25)


def test_a_line_holds_the_means_of_its_window():
    window = Window()
    window.add(step([1.0, 3.0], [0.05, 0.95]))
    window.add(step([5.0, 7.0], [0.96, 0.55], learning_rate=0.2))
    line = window.journal_line(4, BLOCKS, window.sums())
    assert (line["samples"], line["flow"], line["loss"], line["learning_rate"]) == (4, 4.0, 8.0, 0.2)
    assert line["blocks"] == {"mid": 1.0, "up_3": 3.0}
    assert line["lambdas"] == {"mid": 1.0, "up_3": 0.5}
    assert line["block_term"] == 2.5
    assert line["data_wait_seconds"] == pytest.approx(0.5)


def test_every_part_of_the_loss_falls_into_the_bin_of_its_time():
    window = Window()
    window.add(step([1.0, 3.0], [0.05, 0.95]))
    window.add(step([5.0, 7.0], [0.96, 0.55]))
    line = window.journal_line(4, BLOCKS, window.sums())
    flow = [1.0, None, None, None, None, 7.0, None, None, None, 4.0]
    assert line["flow_by_s"] == flow
    assert line["guidance_by_s"] == [None if error is None else 10 * error for error in flow]
    assert line["blocks_by_s"] == [None if error is None else 2.5 for error in flow]


def test_the_effective_size_is_one_for_equal_weights_and_less_for_others():
    window = Window()
    window.add(step([1.0, 1.0, 1.0, 1.0], [0.05, 0.05, 0.95, 0.95], importance_weight=[1.0, 3.0, 2.0, 2.0]))
    line = window.journal_line(4, BLOCKS, window.sums())
    assert line["effective_size"] == pytest.approx(8**2 / (4 * 18))
    assert line["effective_size_by_s"][0] == pytest.approx(16 / (2 * 10))
    assert line["effective_size_by_s"][9] == 1
    assert line["effective_size_by_s"][5] is None


def test_the_sums_of_two_processes_make_the_line_of_a_single_process():
    whole, one, two = Window(), Window(), Window()
    halves = (step([1.0, 3.0], [0.05, 0.95]), step([5.0, 7.0], [0.96, 0.55]))
    for half, window in zip(halves, (one, two), strict=True):
        whole.add(half)
        window.add(half)
    sums = {name: value + two.sums()[name] for name, value in one.sums().items()}
    apart, together = one.journal_line(4, BLOCKS, sums), whole.journal_line(4, BLOCKS, whole.sums())
    varying = {"samples_per_second", "window_seconds", "data_wait_seconds"}
    assert {k: v for k, v in apart.items() if k not in varying} == {
        k: v for k, v in together.items() if k not in varying
    }
    assert apart["data_wait_seconds"] == 0.25  # of one process, on the average


class Twin:
    """One of two processes with the same data."""

    device, world = CPU, 2

    def __init__(self, is_main: bool) -> None:
        self.is_main, self.tensor_count = is_main, 0

    def all_reduce_sum(self, tensors):
        self.tensor_count = len(tensors)
        return [2 * tensor for tensor in tensors]


def test_only_the_main_process_writes_and_both_add_up(tmp_path, capsys):
    twins = [Twin(is_main=False), Twin(is_main=True)]
    for twin in twins:
        with Journal(tmp_path, 0, 8, BLOCKS, twin, QUIET) as journal:
            journal.add(step([1.0, 3.0], [0.05, 0.95]), 4)
            journal.write(4)
            journal.write_event(4, "validation", {"held_out": 0.5})
            journal.show_warning("nothing")
            journal.exclude_pause()
    assert twins[0].tensor_count == twins[1].tensor_count > 0
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line.get("kind") for line in lines] == [None, "validation"]
    assert lines[0]["flow"] == 2.0
    lines_printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines_printed] == [
        [word, "samples=4"] for word in ("train", "validation", "warning")
    ]


def test_a_skipped_step_is_shown_and_not_counted(tmp_path, capsys):
    with Journal(tmp_path, 0, 8, BLOCKS, ALONE, QUIET) as journal:
        journal.add(None, 2)
        journal.write(2)
    assert not (tmp_path / "journal.jsonl").exists()
    assert "warning samples=2 step skipped" in capsys.readouterr().out


def test_a_line_of_another_kind_is_no_line_of_training(tmp_path):
    with Journal(tmp_path, 0, 8, BLOCKS, ALONE, QUIET) as journal:
        journal.add(step([1.0, 3.0], [0.05, 0.95]), 2)
        journal.write(2)
        journal.write_event(2, "validation", {"held_out": 0.5})
    assert [line["samples"] for line in read_step_lines(tmp_path)] == [2]


def test_a_pause_between_two_windows_is_recorded_and_left_out_of_the_rate(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with Journal(tmp_path, 0, 8, BLOCKS, ALONE, QUIET) as journal:
        journal.add(step([1.0, 3.0], [0.05, 0.95]), 2)
        now[0] = 2.0
        journal.write(2)
        now[0] = 102.0
        journal.exclude_pause()
        with journal.bookkeeping():
            now[0] = 103.0
        now[0] = 106.0
        journal.add(step([1.0, 3.0], [0.05, 0.95]), 2)
        journal.write(4)
    first, second = read_step_lines(tmp_path)
    assert (first["samples_per_second"], first["paused_seconds"]) == (1.0, 0.0)
    assert (second["samples_per_second"], second["paused_seconds"]) == (0.5, 100.0)
    assert second["bookkeeping_seconds"] == 1.0


def test_memory_is_that_of_the_process_on_a_cpu():
    assert 0.05 < memory_gib(CPU) < 100


def test_trackers_get_every_number_by_name():
    line = {"samples": 4, "kind": "x", "flow": 1.0, "blocks": {"mid": 2.0}, "flow_by_s": [None, 3.0]}
    assert flatten(line) == {"flow": 1.0, "blocks/mid": 2.0, "flow_by_s/1": 3.0}


def test_a_journal_line_is_made_of_plain_numbers(tmp_path):
    with Journal(tmp_path, 0, 8, BLOCKS, ALONE, QUIET) as journal:
        journal.add(step([1.0, 3.0], [0.05, 0.95]), 2)
        journal.write(2, {"uploads": 1})
    line = read_step_lines(tmp_path)[0]
    assert line["uploads"] == 1
    assert all(math.isfinite(value) for value in flatten(line).values())


def test_lines_beyond_the_resumed_sample_and_a_cut_off_line_are_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = [{"samples": 4}, {"samples": 8}, {"samples": 8, "kind": "validation"}, {"samples": 12}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"samp')
    truncate_after(path, 8)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3]


def test_groups_have_their_own_mean_flow_error_and_one_without_samples_none():
    window = Window(("stars", "rings", "(prior)"))
    window.add(replace(step([1.0, 3.0], [0.05, 0.95]), group=torch.tensor([0, 2])))
    window.add(replace(step([5.0, 7.0], [0.96, 0.55]), group=torch.tensor([2, 2])))
    assert window.journal_line(4, BLOCKS, window.sums())["flow_by_class"] == {
        "stars": 1.0,
        "rings": None,
        "(prior)": 5.0,
    }
    assert window.sums()["by_group"].tolist() == [[1, 0, 3], [1, 0, 15]]


BROKEN = (
    b'{"samples": 8, "lo\n',
    b'{"samples": true}\n',
    b"\xe9\n",
    b"[]\n",
    b"{}\n",
    b"\n",
    b"\0\0\n",
    b"[" * 9999 + b"\n",
)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_row_that_is_none_is_refused_by_its_line_and_nothing_is_lost(tmp_path, broken):
    path, good = tmp_path / "journal.jsonl", b'{"samples": 4}\n'
    path.write_bytes(good + broken + good)
    for read in (lambda: truncate_after(path, 4), lambda: read_step_lines(tmp_path)):
        with pytest.raises(Refused, match=r"journal\.jsonl:2: no line of a journal .* - remove it"):
            read()
    assert path.read_bytes() == good + broken + good


def test_a_journal_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(Refused, match=r"journal\.jsonl: cannot be written \(Is a directory\)"):
        Journal(tmp_path, 0, 10, BLOCKS, ALONE, QUIET)


def test_a_disk_that_fills_up_under_a_journal_is_refused_with_its_name(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(tmp_path, 0, 10, BLOCKS, ALONE, QUIET) as journal:
        monkeypatch.setattr("builtins.open", full)
        with pytest.raises(Refused, match=r"journal\.jsonl: cannot be written \(No space left on device\)"):
            journal.write_event(4, "validation", {"held_out": 1.0})
        monkeypatch.undo()


def test_each_size_has_its_own_mean_flow_error_where_there_are_several():
    tall, wide, other = PictureSize(64, 96), PictureSize(96, 64), PictureSize(64, 64)
    window = Window(sizes=(tall, wide, other))
    for errors, size in (([1.0, 3.0], tall), ([5.0, 7.0], wide), ([3.0, 5.0, 7.0], tall)):
        window.add(replace(step(errors, [0.5] * len(errors)), size=size))
    line = window.journal_line(7, BLOCKS, window.sums())
    assert line["flow_by_size"] == {"64x96": pytest.approx(3.8), "96x64": pytest.approx(6.0), "64x64": None}
    plain = Window()
    plain.add(step([1.0, 3.0], [0.5, 0.5]))
    assert "flow_by_size" not in plain.journal_line(2, BLOCKS, plain.sums())
