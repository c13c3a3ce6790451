"""Classes to care about: which prompts belong to one, how many pictures it earns, and how often it is drawn."""

from stages.classes.selection import (
    CLASS_MARK,
    DEFAULT_PICTURES,
    OUTSIDE_LABEL,
    PromptSearch,
    class_prompts,
    expected_samples,
    outside_prompts,
    owner_of_record,
    picture_quotas,
    prior_sampling_weights,
    prompts_identity,
    sampling_weights,
    search_prompts,
)
from stages.classes.specification import ClassFile, ClassSpec, Priority, load_classes

__all__ = [
    "CLASS_MARK",
    "DEFAULT_PICTURES",
    "OUTSIDE_LABEL",
    "ClassFile",
    "ClassSpec",
    "Priority",
    "PromptSearch",
    "class_prompts",
    "expected_samples",
    "load_classes",
    "outside_prompts",
    "owner_of_record",
    "picture_quotas",
    "prior_sampling_weights",
    "prompts_identity",
    "sampling_weights",
    "search_prompts",
]
