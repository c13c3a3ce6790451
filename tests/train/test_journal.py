import json

import pytest
import torch

from stages.train.journal import Step, Window, flat, forget_after
from stages.train.objective import Losses


def step(flow_errors: list[float], s: list[float], learning_rate: float = 0.1) -> Step:
    errors = torch.tensor(flow_errors)
    losses = Losses(
        errors.mean() * 2, errors.mean(), errors.mean(), torch.tensor(0.5), torch.tensor([1.0, 3.0]), errors
    )
    return Step(losses, torch.tensor([1.0, 0.0]), 0.05, torch.tensor(s), torch.tensor(2.0), learning_rate, 0.25)


def test_a_line_holds_the_means_of_its_window():
    window = Window()
    window.add(step([1.0, 3.0], [0.05, 0.95]))
    window.add(step([5.0, 7.0], [0.96, 0.55], learning_rate=0.2))
    line = window.line(4, ("mid", "up_3"))
    assert (line["samples"], line["flow"], line["loss"], line["learning_rate"]) == (4, 4.0, 8.0, 0.2)
    assert line["blocks"] == {"mid": 1.0, "up_3": 3.0}
    assert line["lambdas"] == {"mid": 1.0, "up_3": 0.0}
    assert line["flow_by_s"] == [1.0, None, None, None, None, 7.0, None, None, None, 4.0]
    assert line["data_wait_seconds"] == pytest.approx(0.5)


def test_tensorboard_gets_every_number_by_name():
    named = dict(flat({"samples": 4, "flow": 1.0, "blocks": {"mid": 2.0}, "flow_by_s": [None, 3.0]}))
    assert named == {"flow": 1.0, "blocks/mid": 2.0, "flow_by_s/1": 3.0}


def test_lines_beyond_the_resumed_sample_and_a_cut_off_line_are_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(json.dumps({"samples": n}) + "\n" for n in (4, 8, 12)) + '{"samp')
    forget_after(path, 8)
    assert [json.loads(line)["samples"] for line in path.read_text().splitlines()] == [4, 8]
