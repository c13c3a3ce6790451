"""Pictures from velocity fields: the solver and its settings, and the command `sollune sample`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from pydantic import Field as Knob
from torch import Tensor

from configs.load import load, request, resolved_yaml
from configs.refusal import Refused
from configs.strict import Strict
from stages.evaluate.fields import Field, student_field, teacher_field
from stages.evaluate.grid import fixed_noises, save_sheet, sheet
from stages.evaluate.painter import open_painter
from stages.flow import solver
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import FileSource

Solve: TypeAlias = Callable[[solver.Velocity, Tensor, Tensor], Tensor]
SOLVERS: Mapping[str, Solve] = {"euler": solver.euler, "heun": solver.heun}


class Sampler(Strict):
    """How latents are drawn from a field: the settings of the ODE solver."""

    solver: Literal["euler", "heun"] = Knob("euler", description="euler: one call a step; heun: two, of order 2")
    steps: int = Knob(25, ge=1, description="steps from noise to data")
    guidance: float = Knob(5.0, ge=0, description="guidance scale w; 1 is the conditional branch alone")
    shift: float = Knob(1.0, gt=0, description="shift S of the time grid, a pure number; above 1 leans to noise")
    batch_size: int = Knob(64, ge=1, description="pictures that are sampled together")

    @torch.inference_mode()
    def draw(
        self,
        field: Field,
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
        noise: Float[Tensor, "b c h w"],
    ) -> Float[Tensor, "b c h w"]:
        """The field's answer to each row of noise: latents at s = 0, in fp32."""
        grid = field.snap(solver.uniform_grid(self.steps, self.shift))
        drawn = []
        for rows in torch.arange(len(noise)).split(self.batch_size):
            velocity = _guided(field, cond[rows], uncond, self.guidance)
            drawn.append(SOLVERS[self.solver](velocity, noise[rows].float(), grid))
        return torch.cat(drawn)


def _guided(field: Field, cond: Tensor, uncond: Tensor, guidance: float) -> solver.Velocity:
    def velocity(x: Tensor, s: Tensor) -> Tensor:
        return solver.guided(*field.branches(x, s, cond, uncond), guidance)

    return velocity


def sample_student(
    student: Student,
    cond: Float[Tensor, "b l d"],
    uncond: Float[Tensor, "1 l d"],
    noise: Float[Tensor, "b c h w"],
    sampler: Sampler,
) -> Float[Tensor, "b c h w"]:
    """The student's latents for each row of noise."""
    return sampler.draw(student_field(student), cond, uncond, noise)


def sample_teacher(
    teacher: Teacher,
    cond: Float[Tensor, "b l d"],
    uncond: Float[Tensor, "1 l d"],
    noise: Float[Tensor, "b c h w"],
    sampler: Sampler,
) -> Float[Tensor, "b c h w"]:
    """The teacher's latents for each row of noise, by Euler's method at its own states, whatever solver is asked."""
    return sampler.model_copy(update={"solver": "euler"}).draw(teacher_field(teacher), cond, uncond, noise)


class Config(Strict):
    """Make a sheet of pictures: `sollune sample RUN|FOLDER "a sentence" ...`."""

    run: str = Knob(description="run folder, exported folder, or folder or hub id of an SD-1.x model")
    checkpoint: int | None = Knob(
        None, ge=0, description="checkpoint of the run, in samples seen; none takes the newest"
    )
    prompts: Path | None = Knob(None, description="text file with more sentences, one a line")
    negative: str = Knob("", description="sentence to keep away from")
    count: int = Knob(4, ge=1, description="pictures for each sentence")
    seed: int = Knob(0, description="seed of the noises; noise i is the same for every sentence and count")
    solver: Literal["euler", "heun"] = Knob("euler", description="euler, or heun with two calls a step (no teachers)")
    steps: int = Knob(25, ge=1, description="steps from noise to data")
    guidance: float = Knob(5.0, ge=0, description="guidance scale w; 1 is the conditional branch alone")
    shift: float | None = Knob(None, gt=0, description="shift S of the time grid; none takes the model's own")
    out: Path = Knob(Path("sample.png"), description="PNG file to write; its metadata hold these settings")
    device: str = Knob("auto", description="torch device; auto takes a GPU where there is one")


def run(config: Config, texts: Sequence[str]) -> Path:
    """Write the sheet: a row for each sentence, a column for each noise."""
    asked = [*texts, *(FileSource(path=config.prompts).lines() if config.prompts else ())]
    if not asked:
        raise Refused('sample: no sentence - write one after the folder, as in sollune sample RUN "a sentence"')
    painter = open_painter(config.run, config.device, config.checkpoint)
    if painter.only_euler and config.solver != "euler":
        raise Refused(f"sample: --solver {config.solver}: {config.run} answers at its own steps only - use euler")
    shift = painter.shift if config.shift is None else config.shift
    sampler = Sampler(solver=config.solver, steps=config.steps, guidance=config.guidance, shift=shift)
    cond = painter.encode(asked).repeat_interleave(config.count, dim=0)
    noise = fixed_noises(config.seed, config.count, painter.latent_shape).repeat(len(asked), 1, 1, 1)
    latents = sampler.draw(painter.field, cond, painter.encode([config.negative]), noise.to(cond.device))
    pictures = torch.cat([painter.decode(rows) for rows in latents.split(sampler.batch_size)])
    columns = [pictures[i :: config.count] for i in range(config.count)]
    settings = {**config.model_dump(mode="json", exclude={"out", "device"}), "shift": shift, "texts": asked}
    save_sheet(sheet(asked, [f"noise {i}" for i in range(config.count)], columns), config.out, settings)
    return config.out


def main(argv: Sequence[str]) -> int:
    """`sollune sample RUN|FOLDER "a sentence" ... [options]`."""
    plain = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    named, texts, rest = argv[: min(plain, 1)], argv[1:plain], argv[plain:]
    if not argv:
        raise Refused('sample: which model? - usage: sollune sample RUN|FOLDER "a sentence" ... [options], or --help')
    asked = request([*(["--run", *named] if named else []), *rest])
    config = load(Config, "sample", asked.files, asked.options)
    if asked.print_config:
        print(resolved_yaml(config, "sample"), end="")
    else:
        print(f"{run(config, texts)}: written")
    return 0
