"""Sources that are rows of a file: read in order, again and again, with every unusable row counted by its reason."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from configs.values import Strict
from stages.prompts.prompt import Prompt, derived_seed
from stages.system.refusal import Refused, first_invalid_character, invalid_character_reason

MAX_CHARACTERS = 1 << 16
"""Of a sentence: a longer one, such as a whole book in one line, is a mistake."""


def fault_of_row(row: str) -> str | None:
    """Why no prompt can be made of a row as it stands in its source, if so."""
    if len(row) > MAX_CHARACTERS:
        return f"with more than {MAX_CHARACTERS:,} characters"
    return invalid_character_reason(row)


@dataclass(frozen=True)
class Row:
    """A sentence as it stands in its source."""

    place: str
    text: str
    class_name: str = ""
    row_fault: str | None = None
    """Why the row as a whole is unusable, where the source knows."""
    raw_text: str = field(default="", repr=False)
    """The row before anything was cut off."""

    @property
    def fault(self) -> str | None:
        """Why no prompt can be made of it, if so."""
        fault = self.row_fault or fault_of_row(self.text + self.class_name)
        return fault or (None if self.text.strip() else "empty")

    @property
    def faulty_place(self) -> str:
        """The place, with the character that makes the row unusable, if one does."""
        character = first_invalid_character(self.raw_text or self.text + self.class_name)
        return f"{self.place} ({character})" if character else self.place


class RowSource(Strict):
    """What all sources made of rows have in common; a subclass defines where the rows come from."""

    def rows(self) -> Iterator[Row]:
        """Every row in order, usable or not."""
        raise NotImplementedError

    def format_lines(self) -> list[str]:
        """How the rows are read: one line."""
        raise NotImplementedError

    def usable_rows(self) -> Iterator[Row]:
        """The rows that make prompts; raises `Refused` when there are none."""
        faults: dict[str, list[str]] = {}
        any_usable = False
        for row in self.rows():
            if row.fault is None:
                any_usable = True
                yield row
            elif not any_usable:
                faults.setdefault(row.fault, []).append(row.faulty_place)
        if not any_usable:
            reasons = [f"{len(places)} {fault}, the first: {places[0]}" for fault, places in faults.items()]
            why = f" ({'; '.join(reasons)})" if reasons else ""
            raise Refused(f"prompts: {self} holds no prompt{why} - write one a line or row, in UTF-8")

    def unusable_rows(self, prompt_count: int) -> dict[str, list[str]]:
        """The places of unusable rows by reason, before the row of prompt number `prompt_count`."""
        faults: dict[str, list[str]] = {}
        for row in self.rows():
            prompt_count -= row.fault is None
            if prompt_count < 0:
                break
            if row.fault:
                faults.setdefault(row.fault, []).append(row.faulty_place)
        return faults

    def iter_prompts(self, seed: int, start: int = 0) -> Iterator[Prompt]:
        """The usable rows in order, again and again, each time with another picture seed; from number `start` on."""
        index, reading = 0, 1
        while True:
            first = index
            for row in self.usable_rows():
                if index >= start:
                    class_name, picture_seed = row.class_name or "prompt", derived_seed("picture", seed, index)
                    derivation = (("row", row.place), ("reading", str(reading)))
                    yield Prompt(row.text.strip(), class_name, picture_seed, derivation)
                index += 1
            # Whole readings before the start are counted, not read.
            skipped = max(0, start - index) // (index - first)
            index, reading = index + skipped * (index - first), reading + 1 + skipped
