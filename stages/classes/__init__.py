"""Classes to care about: which prompts belong to one, how many pictures it earns, and how often it is drawn."""

from stages.classes.draws import draw_weights, expected_draws, prior_weights
from stages.classes.finding import MARK, Found, class_prompts, identity, owner_of_record, search
from stages.classes.outside import OUTSIDE, outside_prompts
from stages.classes.sharing import PICTURES, quotas
from stages.classes.spec import ClassFile, ClassSpec, Priority, load_classes

__all__ = [
    "MARK",
    "OUTSIDE",
    "PICTURES",
    "ClassFile",
    "ClassSpec",
    "Found",
    "Priority",
    "class_prompts",
    "draw_weights",
    "expected_draws",
    "identity",
    "load_classes",
    "outside_prompts",
    "owner_of_record",
    "prior_weights",
    "quotas",
    "search",
]
