"""What checkpoints survive: kills, flipped bits, cuts and full disks, for `benchmarks.faults --checkpoints`."""

import io
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from benchmarks import saving

WIDTH = 192
"""Of the state that is killed and damaged: 0.6 MB a checkpoint, so that a kill often lies in the middle of a file."""
DAMAGES_A_FILE = 40


def checkpoints(folder: Path, kills: int, rng: random.Random) -> int:
    """Kill and damage a process that saves checkpoints; returns how many times that went wrong."""
    life = folder / "life"
    found = [quietly(saving.killed_at, life, rng.uniform(0, 0.5), WIDTH) for _ in range(kills)]
    done = saving.done_in(life.with_suffix(".returned"))
    failed = told(f"{kills} kills, {done // saving.STEP} checkpoints were saved between them", found)

    met, slips = quietly(saving.killed_at_each_step, folder / "steps", 64, range(10**6))
    failed += told(f"killed before each of {met} steps on the disk", [slips])

    quietly(saving.save_on, life, folder / "more", done + 10 * saving.STEP, WIDTH)
    files = [path for path in saving.shown(life)[-1].iterdir() for _ in range(DAMAGES_A_FILE)]
    for kind, way in (("flipped bits", saving.flipped), ("cuts", saving.cut)):
        harms = [(path.name, way(rng.randrange(8 * path.stat().st_size))) for path in files]
        failed += told(f"{len(harms)} {kind}", [quietly(saving.damaged, life, *harm, WIDTH) for harm in harms])

    sizes = [rng.randrange(max(path.stat().st_size for path in files)) for _ in range(kills)]
    return failed + told(f"{kills} full disks", [quietly(saving.full_after, life, size, WIDTH) for size in sizes])


def told(kind: str, slips: list[list[str]]) -> int:
    """Print what went wrong and how often."""
    wrong = [slip for slip in slips if slip]
    print(*wrong, f"checkpoints: {kind}, {len(wrong)} times it went wrong", sep="\n", flush=True)
    return len(wrong)


def quietly(act, *words):  # type: ignore[no-untyped-def]
    """Do something whose words nobody needs."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return act(*words)
