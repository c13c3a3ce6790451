"""What was measured of a LoRA, as tables and as JSON."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from stages.evaluate.lora import FACTORS, LoraMeasurement, LoraStrength, ScaleCorrection
from stages.evaluate.lora_effect import BIN_EDGES, Effect
from stages.evaluate.lora_file import ScaledLora
from stages.evaluate.lora_weights import STOCK_TOLERANCE, StockComparison
from stages.evaluate.paired import PairedError
from stages.evaluate.report import make_table, replace_non_finite
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Refused, format_value

REPORT_FOLDER = "loras"
"""Of a run, with `<name of the file>.json` for each LoRA."""
EFFECT_ROWS: Mapping[str, Callable[[Effect], float | None]] = {
    "norm": lambda effect: effect.ratio,
    "slope": lambda effect: effect.slope,
    "cosine": lambda effect: effect.cosine,
}
PAIRED_COLUMNS = ["", "scale", "error", "floor", "ceiling", "score", "95 %"]


def report_paths(run_folder: Path, loras: Sequence[ScaledLora]) -> list[Path]:
    """The file of each measurement; raises `Refused` for two of one name, and where none can be written."""
    paths = [run_folder / REPORT_FOLDER / f"{lora.name}.json" for lora in loras]
    for path in paths:
        if paths.count(path) > 1:
            raise Refused(
                f"lora: {format_value(path.stem)}: two measurements of that name, under which they are stored - "
                "measure them one after the other, or rename a file"
            )
        refuse_unwritable(path)
    return paths


def lora_json(measurement: LoraMeasurement, samples: int) -> str:
    """The measurement for programs, with the checkpoint that was measured; a number that is not finite is null."""
    content = {"samples": samples, "bin_edges": BIN_EDGES, **asdict(measurement)}
    if measurement.correction:
        content["correction"]["helps"] = measurement.correction.helps
    content["stock"]["is_equal"] = measurement.stock.is_equal
    return json.dumps(replace_non_finite(content), indent=1, allow_nan=False) + "\n"


def print_lora_report(measurement: LoraMeasurement, samples: int, console: Console) -> None:
    """Print the tables of one LoRA, and a line each on the best scale and on stock diffusers."""
    parts = " and ".join(part.replace("_", " ") for part in measurement.components)
    console.print(
        f"{measurement.name}, scale {measurement.scale:g}, changes {parts}; student at {samples} samples, "
        f"{measurement.prompts} prompts of {measurement.size}, guidance {measurement.guidance:g}"
    )
    steps = measurement.strengths[0].student.steps
    rows = [row for strength in measurement.strengths for row in _paired_rows(strength)]
    console.print(make_table(f"paired-noise error at {steps} steps against teacher + LoRA", PAIRED_COLUMNS, rows))
    bins = [f"{low:g}-{high:g}" for low, high in pairwise(BIN_EDGES)]
    effects = [row for strength in measurement.strengths for row in _effect_rows(strength)]
    title = "effect of the LoRA on the velocity, student against teacher, in all and by s"
    console.print(make_table(title, ["", "scale", "all", *bins], effects))
    console.print(correction_text(measurement.correction, measurement.scale))
    console.print(stock_text(measurement.stock))


def correction_text(correction: ScaleCorrection | None, scale: float) -> str:
    """The best scale, in one sentence."""
    if correction is None:
        return "it changes the text encoder alone, which is the teacher's own in the student: no scale to correct"
    factor, low, high = correction.factor, *correction.gain.ratio_interval
    gain = (
        f"{_scores(correction.corrected, correction.own)}, {correction.gain.ratio:.2f} of the error "
        f"({low:.2f} to {high:.2f}), on prompts other than those of the search"
    )
    if correction.helps:
        edge = ", the end of what was tried" if factor in (FACTORS[0], FACTORS[-1]) else ""
        return f"use it at {factor:g} times its scale ({factor * scale:g}, the UNet's part alone{edge}): {gain}"
    tried = f"; the best on few prompts, {factor:g} times, gives {gain}" if factor != 1 else ""
    return f"its own scale is as good as any of {FACTORS[0]:g} to {FACTORS[-1]:g} times{tried}"


def stock_text(stock: StockComparison) -> str:
    """What stock diffusers makes of it, in one sentence."""
    if stock.weights is None or stock.velocity is None:
        return f"stock diffusers (load_lora_weights on the export): cannot read it: {stock.problem}"
    relation = "the same" if stock.is_equal else f"NOT the same within {STOCK_TOLERANCE:g}"
    return (
        f"stock diffusers (load_lora_weights on the export): {relation}; weights {stock.weights:.1e}, velocities "
        f"{stock.velocity:.1e} away, relatively"
    )


def _scores(corrected: PairedError, own: PairedError) -> str:
    if corrected.score is None or own.score is None:
        return f"error {corrected.student:.4f} instead of {own.student:.4f}"
    return f"score {corrected.score:.3f} instead of {own.score:.3f}"


def _paired_rows(strength: LoraStrength) -> Iterator[tuple[str, ...]]:
    for name, error in (
        ("student + LoRA", strength.student),
        ("student alone", strength.without),
        ("teacher alone", strength.teacher_without),
    ):
        score = "-" if error.score is None else f"{error.score:.3f}"
        interval = "-" if error.interval is None else f"{error.interval[0]:.3f} to {error.interval[1]:.3f}"
        numbers = (f"{value:.4f}" for value in (error.student, error.floor, error.ceiling))
        yield name, f"{strength.scale:g}", *numbers, score, interval


def _effect_rows(strength: LoraStrength) -> Iterator[tuple[str, ...]]:
    for branch, effect in (("cond.", strength.conditional), ("uncond.", strength.unconditional)):
        for name, value_of in EFFECT_ROWS.items():
            values = map(value_of, (effect.overall, *effect.by_bin))
            yield f"{branch} {name}", f"{strength.scale:g}", *("-" if v is None else f"{v:.2f}" for v in values)
