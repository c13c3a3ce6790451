"""Single files of an earlier student, which must not stay silently beside the folder of a newer one."""

from pathlib import Path

from stages.export.ldm import WORKFLOW
from stages.export.modelspec import STUDENT
from stages.export.ours import FACTS, header, is_ours
from stages.nets.files import read_json


def single_files(out: Path) -> dict[Path, dict[str, str]]:
    """The single files in `out` that are ours, by what their headers say; a file that says nothing of us is not."""
    found = {file: header(file) for file in sorted(out.glob("*-flow.safetensors"))}
    return {file: said for file, said in found.items() if "sollune.prediction" in said}


def remove_stale(out: Path) -> list[Path]:
    """Remove our files of other students than the one in `<out>/diffusers`, and a workflow that loads one of them.

    What somebody changed since is left alone.
    """
    student = read_json(out / "diffusers" / FACTS)["student_sha256"]
    others = [file for file, said in single_files(out).items() if said.get(f"sollune.{STUDENT}") != student]
    stale = [file for file in others if is_ours(file)]
    graph = out / WORKFLOW
    if graph.is_file() and is_ours(graph) and any(file.name in graph.read_text(encoding="utf-8") for file in stale):
        stale.append(graph)
    for file in stale:
        file.unlink()
    return stale
