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
    errors = [call_silently(saving.kill_and_check, life, rng.uniform(0, 0.5), WIDTH) for _ in range(kills)]
    done = saving.last_completed(life.with_suffix(".returned"))
    failed = print_failures(f"{kills} kills, {done // saving.STEP} checkpoints were saved between them", errors)

    met, slips = call_silently(saving.kill_at_each_step, folder / "steps", 64, range(10**6))
    failed += print_failures(f"killed before each of {met} steps on the disk", [slips])

    call_silently(saving.save_repeatedly, life, folder / "more", done + 10 * saving.STEP, WIDTH)
    files = [path for path in saving.list_checkpoints(life)[-1].iterdir() for _ in range(DAMAGES_A_FILE)]
    for kind, way in (("flipped bits", saving.flip_bit), ("cuts", saving.truncate_before_bit)):
        harms = [(path.name, way(rng.randrange(8 * path.stat().st_size))) for path in files]
        failed += print_failures(
            f"{len(harms)} {kind}", [call_silently(saving.damage_and_check, life, *harm, WIDTH) for harm in harms]
        )

    sizes = [rng.randrange(max(path.stat().st_size for path in files)) for _ in range(kills)]
    return failed + print_failures(
        f"{kills} full disks", [call_silently(saving.fill_disk_and_check, life, size, WIDTH) for size in sizes]
    )


def print_failures(kind: str, errors: list[list[str]]) -> int:
    """Print what went wrong and how often."""
    wrong = [slip for slip in errors if slip]
    print(*wrong, f"checkpoints: {kind}, {len(wrong)} times it went wrong", sep="\n", flush=True)
    return len(wrong)


def call_silently(act, *words):  # type: ignore[no-untyped-def]
    """Do something whose output is not needed."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return act(*words)
