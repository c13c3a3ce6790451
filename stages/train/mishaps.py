"""What went wrong on the way: steps that were skipped, and losses far above the run of the others."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.disk import writing
from stages.train.journal import forget_after

MEMORY = 64
"""Steps after which a loss counts half in the running mean and variance."""
NEEDED = 32
"""Steps before anything is called a spike."""


class Mishaps:
    """`mishaps.jsonl` of a run folder, and the counters and running means behind it, kept in the checkpoint.

    A spike is a loss whose logarithm lies more than `spike_sigmas` deviations above an exponential running mean of
    those before it. What a spike adds to mean and variance is cut off at that height, so that a single one does not
    hide the next, and a lasting rise becomes the rule.
    """

    def __init__(self, path: Path | None = None, spike_sigmas: float = math.inf) -> None:
        """Nothing is written without a path, as on all processes but the main one."""
        self.path, self.spike_sigmas = path, spike_sigmas
        self.skipped, self.in_a_row, self.spikes = 0, 0, 0
        self._steps, self._mean, self._variance = 0, 0.0, 0.0

    def skip(self, counts: bool) -> int:
        """Count a step without a finite gradient; how many of those that count there now were in a row."""
        self.skipped += 1
        self.in_a_row += counts
        return self.in_a_row

    def see(self, loss: float) -> float | None:
        """Count the loss of a step that was made; the usual loss, if this one is a spike."""
        self.in_a_row = 0
        usual, height = None, math.log(max(loss, 1e-30))
        limit = self._mean + self.spike_sigmas * math.sqrt(self._variance)
        if self._steps >= NEEDED and height > limit:
            self.spikes += 1
            usual, height = math.exp(self._mean), limit
        # Until as many steps were seen as the memory is long, all of them count alike.
        self._steps += 1
        share = max(1 / self._steps, 1 - 0.5 ** (1 / MEMORY))
        off = height - self._mean
        self._mean += share * off
        self._variance = (1 - share) * (self._variance + share * off * off)
        return usual

    def note(self, samples: int, kind: str, keys: Sequence[str], **facts: float) -> None:
        """Write down what happened at the step that ended at this sample."""
        if self.path is None:
            return
        line = {"samples": samples, "kind": kind, "keys": list(keys), **facts}
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def told(self) -> Mapping[str, Any]:
        """The counts, for the journal."""
        return {"skipped": self.skipped, "spikes": self.spikes}

    def forget_after(self, samples: int) -> None:
        """Drop the lines of a life that went on beyond `samples`."""
        if self.path is not None:
            forget_after(self.path, samples)

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        loss = {"steps": self._steps, "mean": self._mean, "variance": self._variance}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes, "loss": loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        self.skipped, self.in_a_row, self.spikes = (int(state[name]) for name in ("skipped", "in_a_row", "spikes"))
        loss = state["loss"]
        self._steps, self._mean, self._variance = int(loss["steps"]), float(loss["mean"]), float(loss["variance"])
