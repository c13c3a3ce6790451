"""Laws of the gate: which pictures are rejected and why, and that none is deleted."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from configs.values import PictureSize
from shards.codec import encode
from shards.manifest import Recipe
from shards.reader import Reader
from shards.record import BlockFeatures, Record, States
from shards.writer import CacheWriter
from stages.classes.gate import GateConfig, apply_gate, find_duplicates, lowest_scores, summary_line
from stages.classes.ledger import Ledger
from stages.classes.photographs import Photograph
from stages.classes.pictures import PicturePlan, PicturesConfig
from stages.nets.components import load_components
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.sampling.grids import read_settings
from stages.system.refusal import Refused
from stages.tiny.score import score
from stages.tiny.world import Scene, draw_scene

STAR, MOON = "a large red star at the left on a white background", "a large blue moon at the top on a gray background"


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(load_components("stages/tiny/model", torch.device("cpu"), torch.float32), "hold")


def latent(teacher: Teacher, text: str, seed: int) -> Tensor:
    parts = text.split()
    pixels, _ = draw_scene(Scene(parts[1], parts[2], parts[3], parts[6], parts[9]), random.Random(seed))
    return teacher.encode_pictures(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0]


def record(number: int, text: str, x0: Tensor) -> Record:
    state = torch.zeros(1, 4, 8, 8).half()
    states = States(torch.tensor([1]), torch.tensor([0.1]), state, state, state, torch.tensor([False]))
    features = BlockFeatures({"mid": torch.zeros(1, 3).half()})
    head = (f"{number:09d}", text, "class", number, 1.0)
    return Record(*head, torch.zeros(2, 3).half(), x0.half(), states, features, PictureSize(64, 64))


@pytest.fixture
def plan() -> PicturePlan:
    """Stars: two that differ, the first again, and a moon with a star's text; moons: a photograph with that text."""
    prompts: list[Prompt] = [Prompt(STAR, "star/red", i) for i in range(4)]
    prompts += [
        Photograph(STAR, "photograph@moons", 4, file=Path("a.png"), sha256="", upright_size=PictureSize(64, 64))
    ]
    return PicturePlan(prompts, ["stars"] * 4 + ["moons"], Recipe(identity={}))


@pytest.fixture
def folder(tmp_path: Path, teacher: Teacher) -> Path:
    shown = [(STAR, 0), (STAR, 5), (STAR, 0), (MOON, 0), (MOON, 1)]
    writer = CacheWriter(tmp_path / "cache", Recipe(identity={"made_for": "this test"}))
    writer.add("train", 0, [record(i, STAR, latent(teacher, text, seed)) for i, (text, seed) in enumerate(shown)])
    return tmp_path


def accept(ledger: Ledger) -> None:
    """The check of a run that accepts every ledger."""


Gate = Callable[..., Ledger]


@pytest.fixture
def gate(folder: Path, plan: PicturePlan, teacher: Teacher) -> Gate:
    def of(**config: object) -> Ledger:
        return apply_gate(folder, plan, teacher, score, GateConfig.model_validate(config), PicturesConfig(), accept)

    return of


def test_wrong_pictures_and_near_duplicates_are_rejected_with_the_reason(gate: Gate) -> None:
    ledger = gate()
    reasons = {int(key): one.reason for key, one in ledger.rejected_pictures().items()}
    assert reasons == {2: "like 000000000 (1.000)", 3: "score 0 is below 0.2"}
    assert ledger.usable_keys() == ["000000000", "000000001", "000000004"]
    assert summary_line(ledger) == "set aside: 2 of 5 pictures, 1 by their score, 1 as near-duplicates (stars 2)"


def test_photographs_are_not_scored_and_have_the_target_data(gate: Gate) -> None:
    ledger = gate()
    assert ledger.usable_keys("data") == ["000000004"]
    assert ledger.pictures["000000004"].source == "photograph"
    assert ledger.usable_keys("teacher") == ["000000000", "000000001"]


def test_a_gate_without_thresholds_keeps_everything(gate: Gate, folder: Path) -> None:
    assert len(gate(score=None, duplicate=None).usable_keys()) == 5
    assert not (folder / "set_aside.png").exists()


def test_rejected_pictures_are_shown_on_a_sheet_and_not_deleted(gate: Gate, folder: Path) -> None:
    tars = (folder / "cache" / "data" / "train-000000.tar").read_bytes()
    gate()
    assert read_settings(folder / "set_aside.png")["pictures"] == 2
    with Image.open(folder / "set_aside.png") as sheet:
        assert sheet.width == 2 * 136
        assert len(sheet.convert("RGB").getcolors(100_000) or []) > 100
    assert (folder / "cache" / "data" / "train-000000.tar").read_bytes() == tars


def test_the_ledger_is_read_back_as_it_was_written_and_not_made_twice(gate: Gate, folder: Path) -> None:
    ledger = gate()
    assert Ledger.open(folder) == ledger
    (folder / "set_aside.png").unlink()
    assert gate() == ledger
    assert not (folder / "set_aside.png").exists()  # nothing was scored again
    assert gate(duplicate=None) != ledger


def test_a_broken_ledger_is_refused_by_its_name_and_made_anew(gate: Gate, folder: Path) -> None:
    ledger, path = gate(), folder / "pictures.json"
    path.write_text(path.read_text().replace('"kept": true', '"kept": "perhaps"', 1))
    with pytest.raises(Refused, match=r"pictures\.json: cannot be read"):
        Ledger.open(folder)
    assert gate() == ledger
    assert Ledger.open(folder) == ledger


def test_a_class_that_loses_all_its_pictures_is_refused_with_counts_and_threshold(
    folder: Path, plan: PicturePlan, teacher: Teacher
) -> None:
    def low(texts: Sequence[str], pictures: Tensor) -> Mapping[str, Tensor]:
        return {"clip": torch.full([len(texts)], 0.11)}

    reason = r"class 'stars': none of its 4 pictures is left \(4 by their score, 0 as near-duplicates, 0 not made\)"
    with pytest.raises(Refused, match=reason):
        apply_gate(folder, plan, teacher, low, GateConfig(), PicturesConfig(), accept)
    assert (folder / "set_aside.png").exists()
    assert not (folder / "pictures.json").exists()


def test_only_kept_pictures_are_in_the_batches(gate: Gate, folder: Path) -> None:
    kept = gate().usable_keys()
    reader = Reader(folder / "cache", batch_size=6, keys=kept)
    assert reader.samples_per_epoch == 3
    assert set(next(reader.batches()).keys) == set(kept)
    weighted = Reader(folder / "cache", batch_size=6, keys=kept, class_weights={"class": 1.0})
    assert set(next(weighted.batches()).keys) <= set(kept)


def test_the_lowest_score_counts_and_nan_does_not() -> None:
    nan = float("nan")
    scores = {"shape": torch.tensor([1.0, 1.0, nan, nan]), "colour": torch.tensor([0.3, nan, 0.0, nan])}
    torch.testing.assert_close(lowest_scores(scores), torch.tensor([0.3, 1.0, 0.0, nan]), equal_nan=True)


def test_a_picture_is_compared_with_those_that_stay() -> None:
    """Of a chain in which each is like the next, and the first is not like the third, the third stays."""
    angles = torch.tensor([0.0, 0.1, 0.2, 3.0])
    x0 = torch.stack([angles.cos(), angles.sin()], dim=1)[:, :, None, None]
    assert [(later, earlier) for later, earlier, _ in find_duplicates(x0, 0.99)] == [(1, 0)]
    assert list(find_duplicates(torch.cat([x0[:1], x0[:1] / 3]), 1.0)) == [(1, 0, pytest.approx(1.0))]


def test_encoded_bytes_do_not_depend_on_the_gate(gate: Gate, folder: Path) -> None:
    before = [encode(one) for one in Reader(folder / "cache").records()]
    gate()
    assert [encode(one) for one in Reader(folder / "cache").records()] == before
