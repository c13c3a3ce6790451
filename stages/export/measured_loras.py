"""What `sollune evaluate RUN --lora` measured of LoRAs, as the rows of the model card's table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.export.tables import format_interval, markdown_table
from stages.system.refusal import Refused, in_one_line
from stages.system.text import parse_measurements

HEADS = ["LoRA", "scale", "score", "95 %", "without it", "its effect, conditional", "unconditional", "best scale"]
NOTE = """\
LoRAs made for the teacher were loaded into this model and compared with teacher + LoRA from the same noise: score 0 is
the teacher's own picture with the LoRA, 1 an unrelated one; beside it the score of this model without the LoRA. Its
effect is the norm of what it changes of the velocity, over the same of the teacher. The best scale, times the one in
the table and of the UNet's part alone, is given where prompts other than those of the search confirm it."""


def read_measured_loras(folder: Path, samples: int) -> tuple[Mapping[str, Any], ...]:
    """The measurements of this very checkpoint, by the names of their files; none where nothing was measured.

    Raises `Refused` for a file that is none of ours.
    """
    return tuple(one for file in sorted(folder.glob("*.json")) if (one := _read(file))["samples"] == samples)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        measured: Mapping[str, Any] = parse_measurements(file.read_text(encoding="utf-8"))
        lora_rows([measured]), measured["samples"]  # what another program wrote fails here
        return measured
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(
            f"{file}: no measurement of a LoRA of ours ({in_one_line(error)}) - measure again or remove it"
        ) from error


def lora_table(loras: Sequence[Mapping[str, Any]]) -> str:
    """The LoRAs that were measured; an empty text where there are none."""
    rows = [[_quoted(name), *cells] for name, *cells in lora_rows(loras)]
    return markdown_table("LoRAs of the teacher on this model", HEADS, rows)


def lora_rows(loras: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each LoRA and scale; the best scale stands beside the full one."""
    rows = []
    for lora in loras:
        for strength in lora["strengths"]:
            student, without = strength["student"], strength["without"]
            interval = format_interval(student["interval"], ".2f")
            effects = [_number(strength[branch]["overall"]["ratio"]) for branch in ("conditional", "unconditional")]
            best = _best_scale(lora["correction"]) if strength["strength"] == 1 else ""
            scores = [_number(student["score"]), interval, _number(without["score"])]
            rows.append([Path(lora["name"]).name, f"{strength['scale']:g}", *scores, *effects, best])
    return rows


def _best_scale(correction: Mapping[str, Any] | None) -> str:
    if correction is None or not correction["helps"]:
        return "its own"
    return f"{correction['factor']:g} times: {_number(correction['corrected']['score'])}"


def _quoted(name: str) -> str:
    """A file's name without what Markdown would read in a table."""
    return "`" + name.replace("`", "'").replace("|", "\\|") + "`"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
