"""How well landings are known: those of the cache's steps against those of twice as many, from the same noise.

`python -m benchmarks.landings [--teacher FOLDER] [--prompts N]` prints, for each time of a landing and for x0, mean and
median over prompts of |x - x'|^2 / |x'|^2, and what the landings take of a record's bytes.
"""

import argparse
from pathlib import Path

import torch

from shards.record import Record, tensors_of
from stages.cache.targets import StatesConfig, make_records
from stages.nets.components import load_components
from stages.nets.teacher import Teacher
from stages.prompts import GrammarSource, prompts
from stages.system.device import device_of, one_thread

BATCH = 25


def points_of(record: Record) -> torch.Tensor:
    """The landings of a record, and x0 behind them."""
    assert record.landings is not None
    return torch.cat([record.landings.x, record.x0[None]]).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="stages/tiny/model")
    parser.add_argument("--grammar", type=Path, default=Path("stages/tiny/grammar.yaml"))
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    teacher = Teacher(load_components(args.teacher, device_of("auto"), torch.float32), "hold")
    chosen = prompts(GrammarSource(grammar=args.grammar), 0, "train", args.prompts)
    few = StatesConfig.model_validate({"windows": args.windows})
    many = few.model_copy(update={"steps": 2 * few.steps})
    errors, record = [], None
    with one_thread():
        for first in range(0, len(chosen), BATCH):
            batch = chosen[first : first + BATCH]
            keys = [f"{first + i:09d}" for i in range(len(batch))]
            for record, other in zip(
                make_records(teacher, batch, keys, few), make_records(teacher, batch, keys, many), strict=True
            ):
                one, two = points_of(record).flatten(1), points_of(other).flatten(1)
                errors.append((one - two).square().sum(1) / two.square().sum(1))
    assert record is not None
    assert record.landings is not None
    measured = torch.cat(errors).view(len(chosen), -1)
    print(f"{len(chosen)} prompts, {few.steps} steps against {many.steps}: mean and median of the squared error")
    for time, of_time in zip([*record.landings.s.tolist(), 0.0], measured.T, strict=True):
        print(f"s = {time:.4f}  {of_time.mean():.5f}  {of_time.median():.5f}")
    sizes = {name: values.nbytes for name, values in tensors_of(record).items()}
    landings = sizes["landing_s"] + sizes["landing_x"]
    print(f"landings: {landings:,} bytes a prompt, {100 * landings / (sum(sizes.values()) - landings):.1f} % more")


if __name__ == "__main__":
    main()
