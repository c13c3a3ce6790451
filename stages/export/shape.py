"""What an export says of a student that is no whole copy of its teacher."""

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel

from stages.nets.student_shape import LDM_FACT, fits_ldm
from stages.system.refusal import Refused

NO_LDM = "the student is pruned, and the LDM layout has as many layers in each block, and a middle block"
"""Why there is no single file."""
PRUNED_NOTE = """\
Its UNet is pruned (`{prune}`, as BK-SDM does, arXiv:2305.15798): it has fewer layers than its teacher's, which its
config states and stock diffusers builds. LoRAs and ControlNets made for the teacher do not fit it."""
NO_SINGLE_FILE_NOTE = (
    "There is no single file for other programs: the LDM layout has as many layers in each block, and a middle block."
)
SCRATCH_NOTE = "Its training began with random weights, not with its teacher's."


def shape_notes(facts: Mapping[str, Any]) -> list[str]:
    """Paragraphs of the card: how the student differs from a whole copy of its teacher, if it does."""
    notes = [PRUNED_NOTE.format(prune=facts["prune"])] if "prune" in facts else []
    notes += [NO_SINGLE_FILE_NOTE] if not facts.get(LDM_FACT, True) else []
    return notes + ([SCRATCH_NOTE] if facts.get("scratch") else [])


def can_have_single_file(unet: UNet2DConditionModel) -> bool:
    """Whether the LDM layout can hold the student; where it cannot, that is printed."""
    if fits := fits_ldm(unet.config):
        return fits
    print(f"no single file: {NO_LDM}")
    return False


def refuse_foreign_layout(facts: Mapping[str, Any]) -> None:
    """Raise `Refused` for a student that the LDM layout cannot hold, of which a single file is wanted."""
    if not facts.get(LDM_FACT, True):
        raise Refused(f"export: {NO_LDM} - leave --single-file, --unet-only and --fold out")
