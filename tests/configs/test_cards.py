"""A card's overlay sets how a step is computed on it, and never what is learnt."""

from pathlib import Path

import pytest

from configs.load import load
from stages import distill, finetune_classes
from stages.convert import config as convert

BASE = Path("configs/sd15.yaml")
CARDS = sorted(Path("configs/cards").glob("*.yaml"))
HOW = {"accumulate": True, "gradient_checkpointing": True, "precision": True, "optimizer": {"kind"}}
CONFIGS = {"distill": distill.Config, "finetune_classes": finetune_classes.Config, "convert": convert.Config}
REQUIRED = {"convert": ["--teacher", "fine-tune", "--out", "runs/fine-tune"]}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
@pytest.mark.parametrize("section", CONFIGS)
def test_a_card_changes_how_a_step_is_computed_and_nothing_else(section: str, card: Path) -> None:
    alone, laid_over = (
        load(CONFIGS[section], section, files, REQUIRED.get(section, [])) for files in ([BASE], [BASE, card])
    )
    assert laid_over.train.model_dump(exclude=HOW) == alone.train.model_dump(exclude=HOW)
    assert laid_over.train.batch_size % laid_over.train.accumulate == 0
    if section == "distill":
        assert laid_over.fast.train.model_dump(exclude=HOW) == alone.fast.train.model_dump(exclude=HOW)
        assert laid_over.fast.train.model_dump(include=HOW) == laid_over.train.model_dump(include=HOW)
        laid_over, alone = (one.model_copy(update={"fast": None}) for one in (laid_over, alone))
    assert laid_over.model_dump(exclude={"train"}) == alone.model_dump(exclude={"train"})


def test_there_are_cards_of_three_sizes() -> None:
    assert [card.stem for card in CARDS] == ["24gb", "40gb", "80gb"]
