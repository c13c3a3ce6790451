"""A mix of fine-tunes put in the place of a teacher's UNet and text encoder."""

from dataclasses import replace

from stages.system.refusal import Refused
from stages.teacher_files.assembly import Assembly
from stages.teacher_files.checkpoint.stored import LazyTensor
from stages.teacher_files.mix.entries import (
    MIXED_COMPONENTS,
    WORD,
    FineTune,
    all_tensors,
    open_fine_tunes,
    stored_name,
)
from stages.teacher_files.mix.weights import FAR_DISTANCE, Comparison, MixedTensor, Tensors, compare
from stages.teacher_files.parts import Part
from stages.teacher_files.source import TeacherSource


def apply_mix(source: TeacherSource, made: Assembly) -> None:
    """Put base + sum of weight * (fine-tune - base) in the place of UNet and text encoder.

    The order of the fine-tunes changes nothing. Raises `Refused` for a model that is no fine-tune of this base, that
    comes twice, or that is not finite, and for weights that are too large.
    """
    if not source.mix:
        return
    fine_tunes = open_fine_tunes(source, made)
    bases = {component: made.part(component).with_tensors() for component in MIXED_COMPONENTS}
    comparisons = {component: _compare(bases[component], fine_tunes) for component in MIXED_COMPONENTS}
    _note_relations(fine_tunes, comparisons, made)
    for component, base in bases.items():
        equal = comparisons[component].equals_base
        changing = [one for one, is_equal in zip(fine_tunes, equal, strict=True) if not is_equal]
        if changing:
            made.put(_mixed(base, changing))


def _compare(base: Part, fine_tunes: list[FineTune]) -> Comparison:
    others = [(one.subject, one.weight, all_tensors(one.parts[base.component])) for one in fine_tunes]
    return compare(all_tensors(base), others)


def _note_relations(fine_tunes: list[FineTune], comparisons: dict[str, Comparison], made: Assembly) -> None:
    """Note how far each fine-tune is; raises `Refused` for one that comes twice."""
    same = set.intersection(*(comparison.same for comparison in comparisons.values()))
    if twice := next(((one, other) for one, other in sorted(same) if one >= 0), None):
        one, other = (fine_tunes[number] for number in twice)
        names = one.model if one.model == other.model else f"{other.model}: is the same model as {one.model}"
        raise Refused(f"{WORD}: {names}: comes twice - name it once, with the sum of its weights")
    for number, one in enumerate(fine_tunes):
        distance = comparisons["unet"].distance(number)
        far = ", which is far: hardly a fine-tune of it, and the mix may be useless" if distance >= FAR_DISTANCE else ""
        is_base = ", of which it is a copy that adds nothing" if (-1, number) in same else ""
        made.notes.append(f"{one.subject}: times {one.weight:g}, distance {distance:.3f} to the base{is_base}{far}")


def _mixed(base: Part, fine_tunes: list[FineTune]) -> Part:
    """A part of the base with the differences of these fine-tunes."""
    ordered = sorted(fine_tunes, key=lambda one: (one.parts[base.component].digest, one.weight))
    terms = [(one.weight, all_tensors(one.parts[base.component])) for one in ordered]
    changes = {**base.changes, "mix": [[one.parts[base.component].digest, one.weight] for one in ordered]}
    tensors, skipped = (_sums(base.component, held, terms) for held in (base.tensors or {}, base.skipped))
    return replace(base, tensors=tensors, skipped=skipped, changes=changes)


def _sums(component: str, held: Tensors, terms: list[tuple[float, dict[str, LazyTensor]]]) -> dict[str, LazyTensor]:
    """The tensors of the base with what is added to them; what no fine-tune has, because no model reads it, stays."""
    sums: dict[str, LazyTensor] = dict(held)
    for own, tensor in held.items():
        name = stored_name(component, own)
        if all(name in tensors for _, tensors in terms):
            sums[own] = MixedTensor(tensor, [(weight, tensors[name]) for weight, tensors in terms])
    return sums
