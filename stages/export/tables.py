"""Tables in Markdown for the model card."""

from collections.abc import Sequence


def format_cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def markdown_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table; an empty text without rows."""
    lines = [f"**{title}**", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) if rows else ""
