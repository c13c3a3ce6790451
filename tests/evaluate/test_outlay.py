"""Laws of what is told of the cost of a class file."""

import json

from stages.classes.plan import training_time_text


def test_the_time_to_train_follows_from_the_lines_about_training_alone(tmp_path):
    (tmp_path / "distill").mkdir()
    told = [
        {"samples": 640, "samples_per_second": 10.0},
        {"samples": 640, "kind": "validation", "held_out": 0.1},
        {"samples": 1280, "samples_per_second": 30.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in told) + '{"samp'
    (tmp_path / "distill" / "journal.jsonl").write_text(text)
    assert training_time_text(tmp_path, 1200).startswith("1.0 minutes to train at the 20 samples/s")
    assert "not told" in training_time_text(None, 1200)
