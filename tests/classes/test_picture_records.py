"""Laws of the records of pictures: photographs become ordinary records, and no kill changes a byte."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.killing import fork_job, kill_before_step, read_files, wait_for_exit
from configs.values import PictureSize
from shards.codec import encode
from shards.manifest import differences
from shards.reader import Reader
from shards.record import Record
from shards.writer import CacheWriter
from stages.cache import claims
from stages.cache.fill import fill, tasks_of
from stages.cache.sizes import RenderSizes
from stages.cache.targets import RenderConfig, StatesConfig, draw_randomness, make_records, recipe_of
from stages.classes.gate import GateConfig, apply_gate
from stages.classes.ledger import Ledger
from stages.classes.pictures import PicturePlan, PicturesConfig, picture_record_maker, plan_pictures
from stages.classes.selection import prompts_identity
from stages.classes.specification import ClassFile
from stages.nets.components import load_components
from stages.nets.teacher import Teacher
from stages.prompts import GrammarSource, prompts
from stages.tiny.score import score
from stages.tiny.world import Scene, draw_scene

SOURCE = GrammarSource(grammar=Path("stages/tiny/grammar.yaml"))
RENDER = RenderConfig(states=StatesConfig(steps=3, trajectory_states=2, renoised_states=1))
CAPTION = "a large brown heart at the left on a white background"


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(load_components("stages/tiny/model", torch.device("cpu"), torch.float32), "hold")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher: Teacher) -> Path:
    """A distillation cache of four prompts, and a folder with two photographs of brown hearts."""
    folder = tmp_path_factory.mktemp("run")
    cached = prompts(SOURCE, 0, "train", 4)
    writer = CacheWriter(folder / "cache", recipe_of(teacher, RENDER, {"seed": 0}))
    writer.add("train", 0, make_records(teacher, cached, [f"{i:09d}" for i in range(4)], RENDER.states))
    (folder / "own").mkdir()
    for i in range(2):
        pixels, _ = draw_scene(Scene("large", "brown", "heart", "left", "white"), random.Random(i))
        Image.fromarray(pixels).resize((128, 128)).save(folder / "own" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def plan(run: Path, teacher: Teacher) -> PicturePlan:
    """A generated star, a cached record, and the photographs."""
    cached = prompts(SOURCE, 0, "train", 4)
    taken = {"name": "taken", "pattern": cached[0].class_name, "priority": "top", "pictures": 1}
    stars = {"name": "stars", "pattern": "star/*", "priority": "top", "pictures": 2}
    own = {"name": "own", "priority": "top", "images": run / "own", "caption": CAPTION}
    classes = ClassFile.model_validate({"classes": [taken, stars, own]})
    recipe = recipe_of(teacher, RENDER, prompts_identity(SOURCE, 1, classes, 3))
    return plan_pictures(classes, SOURCE, 1, 3, PicturesConfig(), run / "cache", recipe)


@pytest.fixture(scope="module")
def records(run: Path, teacher: Teacher, plan: PicturePlan) -> list[Record]:
    keys = [f"{i:09d}" for i in range(len(plan.prompts))]
    return picture_record_maker(teacher, run / "cache", RENDER.states)(plan.prompts, keys, PictureSize(64, 64))


def test_a_photographs_latent_decodes_to_the_photograph(
    records: list[Record], plan: PicturePlan, teacher: Teacher
) -> None:
    own = [record for i, record in enumerate(records) if plan.source_at(i) == "photograph"]
    assert [record.text for record in own] == [CAPTION] * 2
    shown = teacher.decode_latents(torch.stack([record.x0.float() for record in own]))
    for i, picture in enumerate(shown):
        pixels, _ = draw_scene(Scene("large", "brown", "heart", "left", "white"), random.Random(i))
        difference = picture - torch.from_numpy(pixels).permute(2, 0, 1) / 255
        assert difference.square().mean().sqrt() < 0.06


def test_fitted_latents_decode_to_a_photograph_that_the_encoder_misses(teacher: Teacher) -> None:
    # The autoencoder was not trained on cyan stars; the scorer takes its reconstruction for another shape.
    text = "a small cyan star at the middle on a gray background"
    pixels, _ = draw_scene(Scene("small", "cyan", "star", "middle", "gray"), random.Random(0))
    photograph = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    latents = {steps: teacher.fit_latents(photograph, steps) for steps in (0, 40)}
    shown = {steps: teacher.decode_latents(x0[None]) for steps, x0 in latents.items()}
    apart = {steps: float((picture[0] - photograph).abs().mean()) for steps, picture in shown.items()}
    assert torch.equal(latents[0], teacher.encode_pictures(photograph[None])[0])
    assert apart[40] < 0.8 * apart[0]
    assert score([text], shown[0])["shape"] == 0
    assert score([text], shown[40])["shape"] == 1


def test_fit_steps_belong_to_the_recipe(run: Path, teacher: Teacher) -> None:
    own = {"name": "own", "priority": "top", "images": run / "own", "caption": CAPTION}
    classes = ClassFile.model_validate({"classes": [own]})
    recipe = recipe_of(teacher, RENDER, prompts_identity(SOURCE, 1, classes, 3))
    plain, fitted = (
        plan_pictures(classes, SOURCE, 1, 3, PicturesConfig(fit_steps=steps), run / "cache", recipe).recipe
        for steps in (0, 2)
    )
    assert differences(plain, fitted) == ["photographs.fit_steps was absent, is now 2"]


def test_all_states_of_a_photograph_are_on_its_straight_path_and_hold_the_teachers_predictions(
    records: list[Record], plan: PicturePlan, teacher: Teacher
) -> None:
    record = records[-1]
    states, config = record.states, RENDER.states.model_copy(update={"renoised_states": 3})
    assert not states.trajectory.any()
    assert record.guidance_scale == 1
    eps = draw_randomness(plan.prompts[-1], config, (4, 8, 8)).renoised_noise
    s = states.s[:, None, None, None]
    torch.testing.assert_close(states.x_s.float(), (1 - s) * record.x0.float() + s * eps, atol=2e-3, rtol=2e-3)
    again = teacher.predict(
        states.x_s.float(), states.s, states.k, record.cond.float().expand(3, -1, -1), teacher.uncond
    )
    torch.testing.assert_close(again.v_cond.half(), states.v_cond, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(again.features["mid"].half(), record.features.by_block["mid"], atol=4e-3, rtol=4e-3)


def test_a_reused_record_is_unchanged(records: list[Record], plan: PicturePlan, run: Path) -> None:
    number = next(i for i in range(len(records)) if plan.source_at(i) == "reused")
    first = Reader(run / "cache").record_at(0)
    assert encode(records[number])[1] == encode(first)[1]
    assert (records[number].text, records[number].seed) == (first.text, first.seed)


@pytest.fixture
def make_pictures(run: Path, plan: PicturePlan, teacher: Teacher) -> Callable[[Path], None]:
    """All steps from the plan to the ledger."""

    def run_all(folder: Path) -> None:
        make = picture_record_maker(teacher, run / "cache", RENDER.states)
        tasks = tasks_of({"train": plan.prompts}, 2, 2, RenderSizes(PictureSize(64, 64)))
        fill(CacheWriter(folder / "cache", plan.recipe), tasks, make)
        apply_gate(folder, plan, teacher, None, GateConfig(duplicate=0.2), PicturesConfig(), lambda _ledger: None)

    return run_all


def test_a_kill_before_any_step_on_the_disk_changes_no_byte_in_the_end(
    make_pictures: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.1)  # how long an unsigned claim is respected
    assert wait_for_exit(fork_job(lambda: make_pictures(tmp_path / "whole"))) == 0
    expected = read_files(tmp_path / "whole")
    assert {"pictures.json", "set_aside.png", "cache/data/train-000002.tar"} <= set(expected)
    assert any(one.source == "photograph" and not one.kept for one in Ledger.open(tmp_path / "whole").pictures.values())
    killed = 0
    for step in range(3, 200, 17):
        folder = tmp_path / f"killed{step}"
        if not kill_before_step(lambda folder=folder: make_pictures(folder), step):  # type: ignore[misc]
            break
        killed += 1
        assert wait_for_exit(fork_job(lambda folder=folder: make_pictures(folder))) == 0  # type: ignore[misc]
        assert read_files(folder) == expected
    assert killed >= 4
