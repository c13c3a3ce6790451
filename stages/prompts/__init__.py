"""Where prompts come from; prompt number i is a function of (source, seed, i) alone."""

from stages.prompts.grammar import Grammar, GrammarSource, Phrase, load_grammar
from stages.prompts.hub import HubSource
from stages.prompts.prompt import VALIDATION_ONE_IN, Prompt, Split, derived_seed, split_of
from stages.prompts.source import (
    MixtureSource,
    PromptSource,
    SourceReport,
    WeightedSource,
    omission_lines,
    prompts,
    source_identity,
    source_report,
    token_counts,
    truncation_lines,
)
from stages.prompts.symbolic import SymbolicSource
from stages.prompts.table import FileSource, TableSource

__all__ = [
    "VALIDATION_ONE_IN",
    "FileSource",
    "Grammar",
    "GrammarSource",
    "HubSource",
    "MixtureSource",
    "Phrase",
    "Prompt",
    "PromptSource",
    "SourceReport",
    "Split",
    "SymbolicSource",
    "TableSource",
    "WeightedSource",
    "derived_seed",
    "load_grammar",
    "omission_lines",
    "prompts",
    "source_identity",
    "source_report",
    "split_of",
    "token_counts",
    "truncation_lines",
]
