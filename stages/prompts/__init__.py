"""Where prompts come from; prompt number i is a function of (source, seed, i) alone."""

from stages.prompts.grammar import Grammar, GrammarSource, load_grammar
from stages.prompts.prompt import Prompt, Split, derived_seed, split_of
from stages.prompts.source import (
    PromptSource,
    omission_lines,
    prompts,
    source_identity,
    source_report,
    truncation_lines,
)
from stages.prompts.symbolic import SymbolicSource
from stages.prompts.table import FileSource

__all__ = [
    "FileSource", "Grammar", "GrammarSource", "Prompt", "PromptSource", "Split", "SymbolicSource", "derived_seed",
    "load_grammar", "omission_lines", "prompts", "source_identity", "source_report", "split_of", "truncation_lines",
]  # fmt: skip
