"""The prompts of an evaluation, and where those of a run's cache came from, as the run's root folder records it."""

from pydantic import ValidationError

from configs.load import first_error
from configs.values import Strict
from configs.yaml_text import read_yaml
from stages.nets.run_folder import SavedRun, cache_folder
from stages.prompts import PromptSource, prompts
from stages.system.refusal import Refused

REMEDY = "name a source with --prompts.source, or a YAML file that has one with --config"


class _Recorded(Strict):
    prompts: PromptSource


def recorded_prompts(run: SavedRun) -> PromptSource:
    """The source of the cache's prompts; raises `Refused` where nothing tells it."""
    file = cache_folder(run.folder).parent / "cache.yaml"
    if not file.is_file():
        raise Refused(f"prompts: {file} is not there, so the run's own are not known - {REMEDY}")
    content = read_yaml(file, str(file), REMEDY)
    section = content.get("cache_teacher") if isinstance(content, dict) else None
    recorded = {"prompts": section.get("prompts")} if isinstance(section, dict) else {}
    try:
        return _Recorded.model_validate(recorded).prompts
    except ValidationError as error:
        _, problem = first_error(error, _Recorded, recorded)
        raise Refused(f"prompts: {file}: {problem} - {REMEDY}") from error


def distinct_texts(source: PromptSource, seed: int, count: int) -> list[str]:
    """Validation sentences, each once as far as the source has them; a longer list begins with the shorter one."""
    distinct = list(dict.fromkeys(prompt.text for prompt in prompts(source, seed, "validation", 4 * count)))
    return [distinct[i % len(distinct)] for i in range(count)]
