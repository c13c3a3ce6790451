"""`sollune convert`: start from the base's student, polish on the fine-tune's own predictions, measure, export."""

from collections.abc import Sequence

from configs.load import config_from_arguments, name_first_argument
from stages.cache_teacher import make_cache
from stages.convert.config import Config
from stages.convert.conversion import Conversion, open_conversion
from stages.convert.plan import print_plan
from stages.convert.polish import polish
from stages.convert.results import is_complete
from stages.convert.starts import Models, Probe, make_start, probe_starts
from stages.convert.verdict import Verdict, measure_verdict
from stages.evaluate.recorded_prompts import distinct_texts
from stages.evaluate.report import paired_table
from stages.export import export_all
from stages.hub.uploader import make_uploader
from stages.nets.run_folder import open_run
from stages.nets.student import Student
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.system.terminal import console
from stages.train.runtime import Runtime
from stages.train.setup import claim_on_main

USAGE = "usage: sollune convert MODEL --base RUN --out RUN2 [--config configs/tiny.yaml] [options], or --help"


def main(argv: Sequence[str]) -> int:
    """`sollune convert MODEL --base RUN --out RUN2 ...`."""
    argv = name_first_argument(argv, "teacher", f"convert: which model? - {USAGE}")
    config = config_from_arguments(Config, "convert", argv)
    if config is not None:
        run(config)
    return 0


def run(config: Config) -> None:
    """Convert, from where an earlier call ended; finished work is not repeated."""
    runtime = Runtime(device_of(config.device), config.train.precision)
    conversion = open_conversion(config, runtime)
    if is_complete(conversion.folder):
        print(f"{config.out} is complete: nothing to do")
    elif config.plan:
        print_plan(conversion)
    else:
        convert(conversion)
    runtime.close()


def convert(conversion: Conversion) -> None:
    """Probe, cache, polish, verdict and export; each part is kept when it is done."""
    config, runtime, folder = conversion.config, conversion.runtime, conversion.folder
    with make_uploader(config.hub, folder) as uploader, claim_on_main(folder, runtime):
        probe, start = find_start(conversion)
        make_cache(conversion.job)
        origin = conversion.origin(probe)
        student = polish(conversion, start, probe, origin, uploader)
        samples = open_run(folder).samples
        show_verdict(find_verdict(conversion, student, samples))
        facts = origin.export_facts(conversion.teacher.components, samples)
        exported = export_all(student, conversion.teacher.components.present_folder(), folder / "export", facts)
        atomic_write(folder / "COMPLETE", f"{samples}\n")
        print(f"{', '.join(map(str, exported))}: written and verified; pictures in {folder / 'grids'}")
        uploader.send_export(folder / "export")


def find_start(conversion: Conversion) -> tuple[Probe, Student]:
    """The probe, measured unless its file is there, and the start that it chose; the base's teacher is released."""
    config, models = conversion.config, conversion.load_models()
    probe = conversion.start_file.read()
    if probe is None:
        sampler = config.probe.sampler
        probe = probe_starts(models, conversion.probe_texts, conversion.probe_seed, sampler, config.start_names)
        conversion.start_file.write(probe)
    show_probe(probe)
    return probe, make_start(probe.best, models)


def show_probe(probe: Probe) -> None:
    """Print the probe's table and the start."""
    if probe.note:
        print(probe.note)
    rows = {name: (error,) for name, error in probe.errors.items()}
    console().print(paired_table(rows, f", before the polish; distance from the base's teacher {probe.distance:.3f}"))
    print(f"start: {probe.best}")


def find_verdict(conversion: Conversion, student: Student, samples: int) -> Verdict:
    """The verdict, measured unless its file is there."""
    verdict = conversion.verdict_file.read()
    if verdict is None:
        settings, seed = conversion.config.verdict, conversion.config.seed
        texts = distinct_texts(conversion.prompts, seed, settings.prompts)
        models: Models = conversion.load_models()
        verdict = measure_verdict(models, student, texts, seed, settings.sampler, None, settings.steps)
        conversion.verdict_file.write(verdict, samples=samples)
    return verdict


def show_verdict(verdict: Verdict) -> None:
    """Print the verdict's tables."""
    for table in verdict.tables():
        console().print(table)
