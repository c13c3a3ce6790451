"""Single files of an earlier student, which must not stay silently beside the folder of a newer one."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from stages.export.ldm import WORKFLOW
from stages.export.modelspec import STUDENT
from stages.export.place import FACTS
from stages.nets.files import read_json


def single_files(out: Path) -> dict[Path, dict[str, str]]:
    """The single files in `out` that are ours, by what their headers say; a file that says nothing of us is not."""
    found = {file: _header(file) for file in sorted(out.glob("*-flow.safetensors"))}
    return {file: said for file, said in found.items() if "sollune.prediction" in said}


def remove_stale(out: Path) -> list[Path]:
    """Remove our files of other students than the one in `<out>/diffusers`, and a workflow that loads one of them."""
    student = read_json(out / "diffusers" / FACTS)["student_sha256"]
    stale = [file for file, said in single_files(out).items() if said.get(f"sollune.{STUDENT}") != student]
    graph = out / WORKFLOW
    if graph.is_file() and any(file.name in graph.read_text(encoding="utf-8") for file in stale):
        stale.append(graph)
    for file in stale:
        file.unlink()
    return stale


def _header(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}
