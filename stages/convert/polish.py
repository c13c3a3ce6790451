"""The polish: a short training of the start on the fine-tune's own cache, with grids beside the start's pictures."""

from dataclasses import replace
from functools import partial

from configs.load import resolved_yaml
from stages.cached_training import CachedTraining, TrainingData
from stages.convert.conversion import Conversion
from stages.convert.gate import DueCheckpoints, Gate
from stages.convert.starts import Probe
from stages.evaluate.paired import teacher_reference
from stages.hub.uploader import Uploader
from stages.nets.run_folder import Origin
from stages.nets.student import Student
from stages.sampling.grids import grid_hook
from stages.system.atomic import atomic_write
from stages.train.loop import Hooks


def polish(conversion: Conversion, start: Student, probe: Probe, origin: Origin, uploader: Uploader) -> Student:
    """Train the start on RUN/cache up to the gate or `max_samples`, and return it with its averaged weights."""
    config, runtime, teacher, folder = conversion.config, conversion.runtime, conversion.teacher, conversion.folder
    data = TrainingData.open(
        config.out / "cache", config.train, runtime, conversion.native, x0=config.objective.needs_x0
    )
    identity = conversion.identity(probe.best)
    training = CachedTraining.prepare(data, config, folder, start, identity, runtime)
    validation = training.make_validation(teacher, runtime)
    sizes = origin.learnt_sizes(conversion.native)
    grid, steps = config.grid, config.grid.sampler.steps
    hooks = Hooks(
        on_start=partial(save_settings, conversion, origin),
        validate=validation,
        on_checkpoint=grid_hook(
            teacher,
            grid.prompts,
            grid.prompts,
            tuple(f"{title} {steps}" for title in ("teacher", probe.best, "polished")),
            grid.seed,
            (grid.sampler,),
            folder / "grids",
            grid.model_dump(mode="json"),
            sizes=sizes,
            baseline=start.eval(),
        ),
    )
    if config.gate is not None:
        due = DueCheckpoints(folder, data.reader.schedule, config.train.checkpoint_every_samples)
        size, sampler = conversion.main_size, config.probe.sampler
        measured = (teacher, conversion.probe_texts, conversion.probe_seed, sampler, size, (sampler.steps,))
        gate = Gate(config.gate, partial(teacher_reference, *measured), sampler.steps, validation, due, teacher)
        hooks = replace(hooks, validate=gate, stop_reason=gate.stop_reason)
    return training.train(teacher, hooks, uploader, runtime)


def save_settings(conversion: Conversion, origin: Origin) -> None:
    """Save in the run folder what it takes to repeat the conversion."""
    atomic_write(conversion.folder / "config.yaml", resolved_yaml(conversion.config, "convert"))
    origin.save(conversion.folder)
