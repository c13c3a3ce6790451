"""What the runs of a study read: the cache, the prompts of its pictures, the student that is trained on classes."""

from collections.abc import Sequence
from pathlib import Path

from shards.manifest import Manifest
from stages.ablation.jobs import SHOWN_CHARACTERS, Job
from stages.ablation.plan import Plan
from stages.nets.run_folder import open_run
from stages.prompts import source_identity
from stages.system.disk import file_sha256
from stages.system.refusal import Refused


def refuse_unlike_plans(plans: Sequence[Plan], cache_is_there: bool, base_is_there: bool) -> None:
    """Raise `Refused` where studies that share a cache, or a distilled student, would each make another one."""
    _refuse_unlike([(plan.study.name, plan.cache) for plan in plans if not cache_is_there], "their caches")
    bases = [(plan.study.name, plan.base) for plan in plans if plan.base is not None and not base_is_there]
    _refuse_unlike(bases, "the student that they start from")


def _refuse_unlike(settings: Sequence[tuple[str, object]], what: str) -> None:
    for name, one in settings[1:]:
        if one != settings[0][1]:
            raise Refused(
                f"{settings[0][0]} and {name}: the settings of {what} differ, and they would share one - "
                "run them one by one, each with its own --run and --out"
            )


def jobs_of(plans: Sequence[Plan], run: Path | None) -> list[Job]:
    """All jobs of the plans, with what they read of `run`; None while the cache, or the student, is not there yet.

    Raises `Refused` where the folder of one holds another run.
    """
    jobs = [job for plan in plans for job in (plan.jobs if run is None else with_inputs(plan, run))]
    for job in jobs:
        job.refuse_other_run()
    return jobs


def with_inputs(plan: Plan, run: Path) -> list[Job]:
    """The jobs of a plan, with the hashes of what they read of the cache in `run`, and of its student if they do.

    Raises `Refused` where the cache is of other prompts than the study's.
    """
    recipe = Manifest.open(run / "cache").recipe
    prompts = source_identity(plan.cache.prompts, plan.cache.seed)["sha256"]
    of_cache = recipe.identity.get("prompts")
    if isinstance(of_cache, dict) and of_cache.get("sha256") not in (None, prompts):
        raise Refused(
            f"{run / 'cache'}: holds other prompts ({_short(of_cache['sha256'])}) than {plan.study.name} names "
            f"({_short(prompts)}) - give a --run of its own, which is made where it is missing"
        )
    inputs, pictures = {"cache": recipe.fingerprint()}, ""
    if plan.base is not None:
        inputs["distilled student"] = file_sha256(open_run(run / "distill").weights)
    elif plan.evaluate is not None and plan.evaluate.prompts is not None:
        pictures = str(source_identity(plan.evaluate.prompts, plan.evaluate.seed)["sha256"])
    return [job.model_copy(update={"inputs": inputs, "prompts": pictures}) for job in plan.jobs]


def _short(sha256: object) -> str:
    return str(sha256)[:SHOWN_CHARACTERS]
