"""How often each class is drawn: its share is w_c / sum w, and all of its samples are alike."""

from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction

from configs.refusal import Refused, did_you_mean
from stages.classes.finding import owner_of_record
from stages.classes.spec import ClassFile


def expected_draws(classes: ClassFile, draws: int) -> dict[str, Fraction]:
    """Exactly how many of so many draws each class gets on average: n w_c / sum w.

    Draws are with replacement (`WeightedOrder`), so a count's deviation is sqrt(n p (1 - p)).
    """
    whole = sum(Fraction(classes.relative(spec)) for spec in classes.classes)
    return {spec.name: draws * Fraction(classes.relative(spec)) / whole for spec in classes.classes}


def draw_weights(classes: ClassFile, records: Counter[str]) -> dict[str, float]:
    """The share of the stream that each class name gets: its class's share, spread evenly over the class's records.

    `records` counts the records of each class name; raises `Refused` naming a class that has none.
    """
    owners = {name: owner_of_record(classes, name) for name in records}
    in_class = Counter[str]()
    for name, spec in owners.items():
        in_class[spec.name if spec else ""] += records[name]
    for spec in classes.classes:
        if not in_class[spec.name]:
            raise Refused(f"class {spec.name!r}: no record among {records.total()} fits {spec.rule} - paint some")
    return {
        name: classes.weight(spec) * records[name] / in_class[spec.name] if spec else 0.0
        for name, spec in owners.items()
    }


def prior_weights(classes: ClassFile, class_names: Callable[[], Sequence[str]]) -> dict[str, float] | None:
    """The share of the prior rows that each class name of the distillation cache gets; None where all are alike.

    A class with a `prior_class` brings its share p_c to the records that fit it; the shares of the others go to all
    records. `class_names` lists the class of each record, and is not asked where no class has a prior. Raises `Refused`
    naming a class whose prior fits none.
    """
    if all(spec.prior_class is None for spec in classes.classes):
        return None
    records = Counter(class_names())
    weights = dict.fromkeys(records, 0.0)
    for spec in classes.classes:
        fitting = [name for name in records if spec.prior_class is None or fnmatchcase(name, spec.prior_class)]
        if not fitting:
            raise Refused(
                f"class {spec.name!r}: prior_class {spec.prior_class} fits no record of the cache - "
                f"{did_you_mean(spec.prior_class or '', list(records)[:20])}"
            )
        whole = sum(records[name] for name in fitting)
        for name in fitting:
            weights[name] += classes.weight(spec) * records[name] / whole
    return weights
