"""What nobody foresaw: written whole to a file, and shown in one line with where it is and what to try."""

import os
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from configs.refusal import in_one_line

PREFIX = "sollune-error-"
SECRET = re.compile(r"token|key|secret|passw|credential|auth", re.IGNORECASE)
"""In the name of an option or of a variable of the environment whose value is nobody's business."""
TOKEN = re.compile(r"\b(?:hf_|api_|sk-|ghp_|gho_|github_pat_|glpat-|xox[a-z]-)[\w-]{6,}|(?<=://)[^\s/@]+:[^\s/@]+(?=@)")
"""Words that are secrets by their form: tokens of the hub and their like, and name and password before a host."""
LEAST_SECRET = 6
"""Letters: a shorter value of a variable would be struck out of ordinary words."""
HIDDEN = "***"
TELLING = ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE")
"""Variables of the environment that change how a run ends."""
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "zarr")
MEMORY = re.compile(r"out of memory|can't allocate memory|alloc_failed", re.IGNORECASE)
LESS_MEMORY = {
    "cache-teacher": "lower render.batch_size",
    "distill": "raise train.accumulate, which leaves the batch as it is, or lower train.batch_size",
    "finetune-classes": "raise train.accumulate, which leaves the batch as it is, or lower render.batch_size",
    "evaluate": "lower fidelity.prompts and paired.prompts",
}
"""Command -> what makes it take less memory."""


def account(error: BaseException, words: Sequence[str], folder: Path | None) -> str | None:
    """Write down all that is known of an error and return the line for the terminal.

    The file goes into `folder`, the run's, or else into the temporary one; where neither takes it, standard error does.
    Of several processes that share a run the first one speaks, the others add to its file: None.
    """
    text = scrubbed(_report(error, words))
    shared = os.environ.get("TORCHELASTIC_RUN_ID")
    own = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{os.getpid()}"
    for place in [*([folder] if folder else []), Path(tempfile.gettempdir())]:
        file = place / f"{PREFIX}{shared or own}.txt"
        try:
            with open(file, "x", encoding="utf-8", errors="backslashreplace") as new:
                new.write(text)
            return line(error, words, f"{file} holds all of it")
        except FileExistsError:  # only a shared name is there already
            with open(file, "a", encoding="utf-8", errors="backslashreplace") as others:
                others.write(f"\n{text}")
            return None
        except OSError:
            continue
    print(text, file=sys.stderr)
    return line(error, words, "all of it stands above, no file could be written")


def line(error: BaseException, words: Sequence[str], where: str) -> str:
    """One line: what happened, where all of it is, and what to try."""
    said = scrubbed(in_one_line(error))
    kind = type(error).__name__
    what = kind if said == kind else f"{kind}: {said}"
    if is_for_memory(error):
        less = LESS_MEMORY.get(next(iter(words), ""), "ask for less at once")
        return f"out of memory ({what}) - {less}, or end other programs; {where}"
    return f"{what} - not foreseen: try the same command again, and report it with the file if it comes again; {where}"


def is_for_memory(error: BaseException) -> bool:
    """Whether memory ran out, of this machine or of a GPU."""
    is_torch = isinstance(error, RuntimeError) and bool(MEMORY.search(str(error)))
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or is_torch


def scrubbed(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text without what looks like a secret, or is the value of a variable whose name says so."""
    for name, value in environment.items():
        if SECRET.search(name) and len(value) >= LEAST_SECRET:
            text = text.replace(value, HIDDEN)
    return TOKEN.sub(HIDDEN, text)


def discreet(words: Sequence[str]) -> list[str]:
    """The words of a command without the values of options that name a secret."""
    shown, hides = list[str](), False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = word.startswith("-") and bool(SECRET.search(name))
        shown.append(
            HIDDEN if hides and not word.startswith("-") else f"{name}={HIDDEN}" if secret and equals else word
        )
        hides = secret and not equals
    return shown


def _report(error: BaseException, words: Sequence[str]) -> str:
    libraries = [f"{name} {_version(name)}" for name in LIBRARIES if name in sys.modules]
    environment = [f"{name}={os.environ[name]}" for name in TELLING if name in os.environ]
    facts = {
        "command": " ".join(["sollune", *map(repr, discreet(words))]),
        "version": f"sollune {_version('sollune')}",
        "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "platform": f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores",
        "libraries": ", ".join(libraries) or "none imported",
        "environment": ", ".join(environment) or "nothing that matters",
        "folder": os.path.realpath(os.curdir),
    }
    text = "".join(f"{name:<12} {value}\n" for name, value in facts.items())
    return f"{text}\n{''.join(traceback.format_exception(error))}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
