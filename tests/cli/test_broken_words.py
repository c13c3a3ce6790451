"""Broken words of the command line, each refused in one line with nothing changed on the disk."""

import pytest

TABLE = {
    "unknown command": (["destill"], ["destill", "distill"]),
    "unknown option": (["distill", "--batch-sise", "3"], ["--batch-sise"]),
    "missing configuration": (["distill", "--config", "absent.yaml"], ["absent.yaml"]),
    "value of another type": (
        ["distill", "--config", "configs/tiny.yaml", "--train.batch-size", "many"],
        ["train.batch_size", "many"],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_broken_words_are_refused(name, refused):
    words, named = TABLE[name]
    refused(words, *named)
