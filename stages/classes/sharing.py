"""How many pictures each class gets."""

from fractions import Fraction

from configs.refusal import Refused
from stages.classes.spec import ClassFile

PICTURES = 300
"""In all, unless told."""


def quotas(classes: ClassFile, total: int) -> dict[str, int]:
    """Pictures to be had of prompts, `total` in all, in the file's order; raises `Refused` when that cannot be.

    A class that says `pictures` gets just these, one of nothing but photographs gets 0. The others share what is left
    by weight, w_c / sum w of these others: whole pictures first, then one each to the largest remainders, the earlier
    class where two are equal.
    """
    told = {spec.name: spec.pictures for spec in classes.classes if spec.pictures is not None}
    sharing = [spec for spec in classes.classes if spec.is_painted and spec.pictures is None]
    if not told and not sharing:
        return {spec.name: 0 for spec in classes.classes}
    left = total - sum(told.values())
    if left < 0 or (left > 0 and not sharing):
        asked = ", ".join(f"{name} {pictures}" for name, pictures in told.items())
        raise Refused(
            f"classes ask for {sum(told.values())} pictures ({asked}), count is {total} - "
            f"set count to {sum(told.values())}, or change their `pictures`"
        )
    whole = sum(Fraction(classes.relative(spec)) for spec in sharing)
    exact = {spec.name: left * Fraction(classes.relative(spec)) / whole for spec in sharing}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: left - sum(shares.values())]:
        shares[name] += 1
    empty = [name for name, share in shares.items() if share == 0]
    if empty:
        raise Refused(
            f"class {empty[0]!r} gets none of {total} pictures (its share is {float(exact[empty[0]]):.2f}) - "
            "ask for more pictures or raise its priority"
        )
    return {spec.name: (told | shares).get(spec.name, 0) for spec in classes.classes}
