"""Sources that are rows of something: read in order, again and again, with every unusable row counted by its reason."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from configs.refusal import Refused
from configs.strict import Strict
from stages.prompts.prompt import Prompt, derived_seed


@dataclass(frozen=True)
class Row:
    """A sentence as it was found; bytes that are not UTF-8 stand in it as lone surrogates."""

    place: str
    text: str
    class_name: str = ""

    @property
    def fault(self) -> str | None:
        """Why no prompt can be made of it, if so."""
        if any("\ud800" <= letter <= "\udfff" for letter in self.text + self.class_name):
            return "not UTF-8"
        return None if self.text.strip() else "empty"


class RowSource(Strict):
    """What all sources made of rows have in common; a member says where the rows come from."""

    def rows(self) -> Iterator[Row]:
        """Every row in order, usable or not."""
        raise NotImplementedError

    def usable(self) -> Iterator[Row]:
        """The rows that make prompts; raises `Refused` when there are none."""
        found = False
        for row in self.rows():
            if row.fault is None:
                found = True
                yield row
        if not found:
            raise Refused(f"prompts: {self} holds no prompt - write one a line or row, in UTF-8")

    def faults(self, among: int) -> dict[str, list[str]]:
        """The places of unusable rows by reason, up to the row of the prompt number `among`."""
        found: dict[str, list[str]] = {}
        for row in self.rows():
            among -= row.fault is None
            if among < 0:
                break
            if row.fault:
                found.setdefault(row.fault, []).append(row.place)
        return found

    def endless(self, seed: int, start: int = 0) -> Iterator[Prompt]:
        """The usable rows in order, again and again, each time with another picture seed; from number `start` on."""
        index = 0
        for read in count(1):
            for row in self.usable():
                if index >= start:
                    said = (("row", row.place), ("reading", str(read)))
                    yield Prompt(
                        row.text.strip(), row.class_name or "prompt", derived_seed("picture", seed, index), said
                    )
                index += 1
