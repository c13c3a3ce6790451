"""Where prompts come from; prompt number i is a function of (source, seed, i) alone."""

from stages.prompts.grammar import Grammar, GrammarSource, Phrase, load_grammar
from stages.prompts.hub import HubSource
from stages.prompts.mixture import MixtureSource, Part
from stages.prompts.prompt import VALIDATION_ONE_IN, Prompt, Split, derived_seed, split_of
from stages.prompts.report import SourceReport, omission_lines, report, token_counts, truncation_lines
from stages.prompts.source import PromptSource, prompts, source_identity
from stages.prompts.symbolic import SymbolicSource
from stages.prompts.table import TableSource
from stages.prompts.text_file import FileSource

__all__ = [
    "VALIDATION_ONE_IN",
    "FileSource",
    "Grammar",
    "GrammarSource",
    "HubSource",
    "MixtureSource",
    "Part",
    "Phrase",
    "Prompt",
    "PromptSource",
    "SourceReport",
    "Split",
    "SymbolicSource",
    "TableSource",
    "derived_seed",
    "load_grammar",
    "omission_lines",
    "prompts",
    "report",
    "source_identity",
    "split_of",
    "token_counts",
    "truncation_lines",
]
