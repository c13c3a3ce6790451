"""Time, distinctness and a sample of 200,000 symbolic prompts: `python -m benchmarks.prompts`."""

import time
from itertools import islice

from stages.prompts import Prompt, SymbolicSource

SEED, COUNT, SHOWN, LIMIT_SECONDS = 42, 200_000, 40, 60


def main() -> int:
    """0 when all prompts are distinct and came in time."""
    began = time.perf_counter()
    source = SymbolicSource()
    prompts: list[Prompt] = list(islice(source.iter_prompts(SEED), COUNT))
    seconds = time.perf_counter() - began
    distinct = len({prompt.text for prompt in prompts})
    print(f"{COUNT} prompts at seed {SEED} in {seconds:.1f} s (limit {LIMIT_SECONDS} s), {distinct} distinct")
    print(f"{source.load().size} distinct sentences in all, {len({prompt.class_name for prompt in prompts})} classes\n")
    for prompt in prompts[:: COUNT // SHOWN]:
        print(f"{prompt.text}  [{prompt.class_name}]")
    return 0 if distinct == COUNT and seconds < LIMIT_SECONDS else 1


if __name__ == "__main__":
    raise SystemExit(main())
