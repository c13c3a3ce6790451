"""The small version of a study, for a first look."""

from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from configs.load import first_error
from stages.ablation.study import Settings, Study, merged
from stages.system.refusal import Refused


def shortened(study: Study) -> Study:
    """What `--quick` runs, under a name of its own; raises `Refused` where the file has no such version."""
    quick = study.quick
    if quick is None:
        raise Refused(f"{study.name}: --quick: the study has no section quick - write one, or leave --quick out")
    arms = {
        name: arm.model_copy(
            update={
                "seeds": None,
                "regimes": _common(arm.regimes, quick.regimes),
                "options": without_budget(arm.options),
            }
        )
        for name, arm in study.arms.items()
        if name in quick.arms and {*(arm.regimes or quick.regimes)} & {*quick.regimes}
    }
    comparisons = [
        one.model_copy(
            update={
                "arms": _common(one.arms, arms),
                "against": _common(one.against, arms),
                "regimes": _common(one.regimes, quick.regimes),
            }
        )
        for one in study.comparisons
        if {*one.arms} & {*arms} and {*one.against} & {*arms} and one.samples is None
        if not one.regimes or {*one.regimes} & {*quick.regimes}
    ]
    regimes = {
        name: one.model_copy(update={"options": without_budget(one.options)})
        for name, one in study.regimes.items()
        if name in quick.regimes
    }
    short = study.model_copy(
        update={
            "name": f"{study.name}-quick",
            "options": without_budget(merged(study.options, quick.options)),
            "evaluate": merged(study.evaluate, quick.evaluate),
            "samples": quick.samples,
            "seeds": quick.seeds,
            "regimes": regimes,
            "arms": arms,
            "comparisons": tuple(comparisons),
            "quick": None,
        }
    )
    return _checked(short)  # a table holds it, and has to be readable


def _checked(study: Study) -> Study:
    """The study, read again as from a file."""
    content = study.model_dump()
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        path, problem = first_error(error, Study, content)
        raise Refused(f"{study.name}: --quick: {'.'.join(map(str, path))}: {problem}") from error


def without_budget(options: Settings) -> Settings:
    """The options without a number of samples of their own."""
    train = options.get("train")
    if not isinstance(train, Mapping):
        return options
    return {**options, "train": {k: value for k, value in train.items() if str(k).replace("-", "_") != "max_samples"}}


def _common(names: Iterable[str], kept: Iterable[str]) -> tuple[str, ...]:
    chosen = set(kept)
    return tuple(name for name in names if name in chosen)
