"""Pictures of classes at several sizes: from prompts, from the cache and from photographs, through the gate."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs.values import PictureSize
from shards.codec import encode
from shards.manifest import Manifest
from shards.reader import Reader
from shards.record import Record
from shards.verify import inspect
from shards.writer import CacheWriter
from stages.cache.fill import fill, tasks_of
from stages.cache.sizes import RenderSizes, SizeShare
from stages.cache.targets import RenderConfig, StatesConfig, make_records, recipe_of, sizes_in
from stages.classes.cached import measure_cache_errors
from stages.classes.class_plan import Config as PlanConfig
from stages.classes.class_plan import photograph_lines
from stages.classes.gate import GateConfig, apply_gate
from stages.classes.ledger import Ledger
from stages.classes.photographs import Photograph, load_photographs
from stages.classes.pictures import PicturePlan, PicturesConfig, picture_record_maker, plan_pictures, size_of_picture
from stages.classes.selection import prompts_identity
from stages.classes.specification import ClassFile, load_classes
from stages.finetune_classes import Config, with_cache_sizes
from stages.nets.components import load_components
from stages.nets.run_folder import Origin
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import GrammarSource, prompts
from stages.sampling.grids import read_settings
from stages.tiny.score import score

SOURCE = GrammarSource(grammar=Path("stages/tiny/grammar.yaml"))
SHARES = tuple(SizeShare(size=size, share=share) for size, share in (("64x96", 0.5), ("64x64", 0.3), ("96x64", 0.2)))
RENDER = RenderConfig(states=StatesConfig(steps=3, trajectory_states=2, renoised_states=1), sizes=SHARES)
NATIVE, TALL, WIDE = (PictureSize.parse(text) for text in ("64x64", "64x96", "96x64"))
SIZES = RenderSizes(NATIVE, SHARES)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(load_components("stages/tiny/model", torch.device("cpu"), torch.float32), "hold")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher: Teacher) -> Path:
    """A distillation cache of twelve prompts at three sizes, and photographs of three aspects."""
    folder = tmp_path_factory.mktemp("run")
    tasks = tasks_of({"train": prompts(SOURCE, 0, "train", 12)}, 4, 4, SIZES)
    writer = CacheWriter(folder / "cache", recipe_of(teacher, RENDER, {"seed": 0}))
    fill(
        writer, tasks, lambda of, keys, size: make_records(teacher, of, keys, RENDER.states, size), show_progress=False
    )
    (folder / "own").mkdir()
    for name, sides in (("square", (130, 120)), ("tall", (80, 200)), ("wide", (300, 210))):
        Image.new("RGB", sides, "brown").save(folder / "own" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def plan(run: Path, teacher: Teacher) -> PicturePlan:
    own = {"name": "own", "priority": "top", "images": run / "own", "caption": "a brown wall"}
    everything = {"name": "all", "pattern": "*", "priority": "top", "pictures": 20}
    classes = ClassFile.model_validate({"classes": [everything, own]})
    recipe = recipe_of(teacher, RENDER, prompts_identity(SOURCE, 1, classes, 20))
    return plan_pictures(classes, SOURCE, 1, 20, PicturesConfig(reuse=0.5), run / "cache", recipe)


@pytest.fixture(scope="module")
def folder(run: Path, plan: PicturePlan, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/classes with the records of all pictures."""
    folder = tmp_path_factory.mktemp("classes")
    make = picture_record_maker(teacher, run / "cache", RENDER.states)
    tasks = tasks_of({"train": plan.prompts}, 5, 4, SIZES, partial(size_of_picture, sizes=SIZES))
    fill(CacheWriter(folder / "cache", plan.recipe), tasks, make, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[int, Record]:
    return {int(record.key): record for record in Reader(folder / "cache").records()}


def test_every_picture_is_there_once_at_its_size(records: dict[int, Record], plan: PicturePlan, folder: Path) -> None:
    assert sorted(records) == list(range(len(plan.prompts)))
    for number, record in records.items():
        assert record.size == size_of_picture(plan.prompts[number], SIZES)
        assert record.x0.shape == (4, record.size.height // 8, record.size.width // 8)
    assert len({record.size for record in records.values()}) == 3
    assert list(inspect(folder / "cache", Manifest.open(folder / "cache"))) == []


def test_photographs_have_the_size_of_their_aspect(
    records: dict[int, Record], plan: PicturePlan, teacher: Teacher
) -> None:
    sizes = {}
    for number, record in records.items():
        if plan.source_at(number) == "photograph":
            photograph, size = plan.prompts[number], size_of_picture(plan.prompts[number], SIZES)
            assert isinstance(photograph, Photograph)
            sizes[photograph.file.stem] = record.size
            expected = teacher.encode_pictures(load_photographs([photograph], size))[0]
            torch.testing.assert_close(record.x0.float(), expected, atol=1e-2, rtol=1e-2)
    assert sizes == {"square": NATIVE, "tall": TALL, "wide": WIDE}
    assert plan.crop_lines(SIZES.listed) == [
        "class 'own': images: 3 of 3 photographs lose their edges (1 to 64x96, 1 to 64x64, 1 to 96x64), at most 40 % "
        "of the area (tall.png, 80x200)"
    ]


def test_reused_records_keep_their_size_and_every_tensor(
    records: dict[int, Record], plan: PicturePlan, run: Path
) -> None:
    cached = {encode(record)[1]: record.size for record in Reader(run / "cache").records()}
    reused = [record for number, record in records.items() if plan.source_at(number) == "reused"]
    assert len(reused) == 10
    assert all(cached[encode(record)[1]] == record.size for record in reused)


def test_a_picture_without_sizes_is_native_and_one_of_an_early_cache_too(plan: PicturePlan) -> None:
    for prompt in plan.prompts:
        assert size_of_picture(prompt, RenderSizes(NATIVE)) in (NATIVE, getattr(prompt, "size", None))


def test_the_gate_judges_each_size_by_itself_and_tells_what_the_scorer_cannot(
    folder: Path, plan: PicturePlan, teacher: Teacher, records: dict[int, Record], capsys: pytest.CaptureFixture[str]
) -> None:
    config = GateConfig(score=0.5, duplicate=0.5)
    ledger = apply_gate(folder, plan, teacher, score, config, PicturesConfig(), lambda _: None)
    printed = capsys.readouterr().out
    unjudged = Counter(
        str(record.size)
        for number, record in records.items()
        if record.size != NATIVE and plan.source_at(number) != "photograph"
    )
    for size, count in unjudged.items():
        assert f"gate: {count} pictures of {size} are kept unjudged" in printed
    assert "of 64x64" not in printed
    for key, picture in ledger.pictures.items():
        size = records[int(key)].size
        assert picture.size == (None if size == NATIVE else str(size))
        if picture.reason.startswith("score"):
            assert size == NATIVE
        if picture.reason.startswith("like"):
            earlier = picture.reason.split()[1]
            assert records[int(earlier)].size == size
    assert Ledger.open(folder) == ledger
    if rejected := ledger.rejected_pictures():
        assert read_settings(folder / "set_aside.png")["pictures"] == len(rejected)


def test_a_sheet_of_rejected_pictures_of_several_sizes_is_written(
    folder: Path, plan: PicturePlan, teacher: Teacher
) -> None:
    config = GateConfig(score=None, duplicate=0.001)
    ledger = apply_gate(folder, plan, teacher, None, config, PicturesConfig(), lambda _: None)
    sizes = {picture.size for picture in ledger.rejected_pictures().values()}
    assert len(sizes) > 1
    with Image.open(folder / "set_aside.png") as sheet:
        assert sheet.width % (192 + 8) == 0 or sheet.width % (128 + 8) == 0


def test_without_sizes_of_their_own_the_classes_take_those_of_the_distillation_cache(run: Path) -> None:
    config = Config.model_validate({"run": run, "classes": run / "classes.yaml", "prompts": SOURCE})
    assert with_cache_sizes(config).render.sizes == SHARES
    own = config.model_copy(update={"render": config.render.model_copy(update={"sizes": SHARES[:1]})})
    assert with_cache_sizes(own) == own


def test_a_listed_size_without_a_picture_for_training_is_neither_learnt_nor_taken_by_the_classes(
    teacher: Teacher, tmp_path: Path
) -> None:
    absent = SizeShare(size="96x96", share=0.1)
    render = RENDER.model_copy(update={"sizes": (*SHARES, absent)})
    writer = CacheWriter(tmp_path / "cache", recipe_of(teacher, render, {"seed": 0}))
    for number, size in enumerate((NATIVE, WIDE)):
        records = make_records(teacher, prompts(SOURCE, 0, "train", 1), [f"{number:09d}"], RENDER.states, size)
        writer.add("train", 0, records, size=size)
    config = Config(run=tmp_path, classes=Path("x"), prompts=SOURCE)
    assert [str(one.size) for one in with_cache_sizes(config).render.sizes] == ["64x64", "96x64"]
    assert Origin.from_manifest(writer.manifest).sizes == ("64x64", "96x64")


def test_the_errors_at_cached_states_of_several_sizes_are_those_of_each_record(run: Path, teacher: Teacher) -> None:
    student, reader = Student.from_teacher(teacher.components.unet).eval(), Reader(run / "cache")
    numbers = list(range(12))
    together = measure_cache_errors(student, reader, {"all": numbers}, teacher.uncond, 12, None).velocity_errors[0]
    alone = [
        measure_cache_errors(student, reader, {"one": [number]}, teacher.uncond, 1, None).velocity_errors[0]
        for number in numbers
    ]
    norms = [
        sum(float(v.double().square().flatten(1).mean(1).mean()) for v in (states.v_cond, states.v_uncond))
        for states in (reader.record_at(number).states for number in numbers)
    ]
    expected = [float(error) * norm / (sum(norms) / 12) for error, norm in zip(alone, norms, strict=True)]
    assert sorted(together.tolist()) == pytest.approx(sorted(expected), rel=1e-4)


def test_the_plan_of_classes_tells_the_crop_of_photographs(run: Path) -> None:
    (run / "classes.yaml").write_text(
        f"classes: [{{name: own, priority: top, images: {run / 'own'}, caption: a wall}},"
        " {name: stars, pattern: star/*, priority: low}]"
    )
    config = PlanConfig.model_validate({"run": run, "classes": run / "classes.yaml"})
    classes = load_classes(config.classes)
    (line,) = photograph_lines(classes, config)
    assert "3 of 3 photographs lose their edges" in line
    assert photograph_lines(classes, config.model_copy(update={"run": None})) == []


@pytest.mark.parametrize("shares", [(1, 1, 1), (3, 2, 2), (0.1, 0.2, 0.4), (1 / 3, 0.77, 5)])
def test_sizes_read_from_a_recipe_make_that_recipe_again(shares: tuple[float, ...], teacher: Teacher) -> None:
    sizes = tuple(SizeShare(size=one.size, share=share) for one, share in zip(SHARES, shares, strict=True))
    recipe = recipe_of(teacher, RENDER.model_copy(update={"sizes": sizes}), {})
    again = recipe_of(teacher, RENDER.model_copy(update={"sizes": sizes_in(recipe)}), {})
    assert again.fingerprint() == recipe.fingerprint()
