"""GPUs by name, with the rates that their makers state."""

import re
from dataclasses import dataclass

from stages.system.refusal import did_you_mean


@dataclass(frozen=True)
class Card:
    """The stated rates of a card without sparsity, in 10^12 operations a second; half sums up in fp32."""

    name: str
    pattern: str
    """in the name that the driver gives it"""
    half: float
    """fp16, and bf16 where the card has it"""
    tf32: float | None
    single: float
    """fp32 outside of tensor cores"""
    bandwidth: float
    """of its memory, in 10^9 bytes a second"""


CARDS = (
    Card("b200", r"\bB200\b", 2250, 1100, 75, 8000),
    Card("gh200", r"\bGH200\b", 989.4, 494.7, 67, 4000),
    Card("h200-nvl", r"\bH200 NVL\b", 835, 417, 60, 4800),
    Card("h200", r"\bH200\b", 989.4, 494.7, 67, 4800),
    Card("h100-nvl", r"\bH100 NVL\b", 835, 417, 60, 3900),
    Card("h100-pcie", r"\bH100 PCIe\b", 756, 378, 51, 2000),
    Card("h100", r"\bH100\b", 989.4, 494.7, 67, 3350),
    Card("a100", r"\bA100\b", 312, 156, 19.5, 1555),
    Card("a10", r"\bA10\b", 125, 62.5, 31.2, 600),
    Card("l40s", r"\bL40S\b", 362, 183, 91.6, 864),
    Card("l40", r"\bL40\b", 181, 90.5, 90.5, 864),
    Card("l4", r"\bL4\b", 121, 60, 30.3, 300),
    Card("a40", r"\bA40\b", 149.7, 74.8, 37.4, 696),
    Card("rtx-6000-ada", r"\bRTX 6000 Ada\b", 364, 182, 91.1, 960),
    Card("rtx-a6000", r"\bRTX A6000\b", 154.8, 77.4, 38.7, 768),
    Card("rtx-4090", r"\bRTX 4090\b(?! D| Laptop)", 165.2, 82.6, 82.6, 1008),
    Card("rtx-3090", r"\bRTX 3090\b(?! Ti)", 71, 35.6, 35.6, 936),
    Card("v100", r"\bV100\b", 125, None, 15.7, 900),
    Card("t4", r"\bT4\b", 65, None, 8.1, 300),
)
"""The first whose pattern fits a device; from data sheets, those of SXM and of the smallest memory where a name says
nothing."""


def card_of_device(device_name: str) -> Card | None:
    """The card with this name of the driver's; None for one that is not in the table."""
    return next((card for card in CARDS if re.search(card.pattern, device_name)), None)


def card_named(name: str) -> Card:
    """The card of this short name; raises `ValueError` with the known ones for another."""
    known = {card.name: card for card in CARDS}
    if name.lower() not in known:
        near = did_you_mean(name.lower(), [*known])
        more = "" if near.startswith("known") else f" known here: {', '.join(known)}"
        raise ValueError(f"gpu {name}: not in the table of cards - {near}{more}")
    return known[name.lower()]
