"""Laws of a teacher's identity: exactly the files that are loaded, whatever their ending, and no others."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.nets.components import load_components
from stages.system.refusal import Refused
from stages.teacher_files.folder import (
    COMPONENT_NAMES,
    WEIGHT_FILES,
    changed_components,
    component_digests,
    component_files,
    digests_as_recorded,
)

MODEL = Path("stages/tiny/model")
CPU = torch.device("cpu")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "teacher"))


def by_the_earlier_rule(folder: Path) -> dict[str, str]:
    """What recipes held before: every .json, .txt and .safetensors file of a part."""

    def digest(part: Path) -> str:
        sha = hashlib.sha256()
        for file in sorted(path for path in part.iterdir() if path.suffix in {".json", ".txt", ".safetensors"}):
            sha.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return sha.hexdigest()

    return {part: digest(folder / part) for part in COMPONENT_NAMES}


def times(file: Path, factor: float) -> dict[str, torch.Tensor]:
    return {name: factor * value for name, value in load_file(file).items()}


def pickled(teacher: Path, part: str) -> Path:
    """The weights of a part as a .bin file instead."""
    file = teacher / part / WEIGHT_FILES[part][0]
    old = file.with_name(WEIGHT_FILES[part][1])
    torch.save(load_file(file), old)
    file.unlink()
    return old


def sharded(teacher: Path, part: str) -> Path:
    """The weights of a part in two shards instead."""
    file = teacher / part / WEIGHT_FILES[part][0]
    held = load_file(file)
    names = [f"{file.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(held)}
    for shard in names:
        save_file({name: held[name] for name in held if where[name] == shard}, file.with_name(shard), {"format": "pt"})
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    file.unlink()
    return file.with_name(names[1])


def test_a_folder_of_nothing_but_what_is_loaded_keeps_the_identity_that_recipes_hold() -> None:
    assert component_digests(MODEL) == by_the_earlier_rule(MODEL)


def test_identity_depends_on_contents_and_not_on_the_path(teacher: Path) -> None:
    assert component_digests(teacher) == component_digests(MODEL)


@pytest.mark.parametrize("part", COMPONENT_NAMES)
def test_every_file_that_is_loaded_decides_the_identity_of_its_part_alone(teacher: Path, part: str) -> None:
    for file in component_files(teacher, part):
        before, content = component_digests(teacher), file.read_bytes()
        # A tensor or a word less at the end, so that the file is one that could be read.
        if file.suffix == ".safetensors":
            save_file(times(file, 1.5), file, {"format": "pt"})
        else:
            file.write_bytes(content + b"\n")
        assert changed_components(before, teacher) == [part]
        file.write_bytes(content)
        assert changed_components(before, teacher) == []


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
        "text_encoder/adapter_config.json",
        "text_encoder/generation_config.json",
        "vae/notes.txt",
        "tokenizer/chat_template.jinja",
        "tokenizer/old.json",
        "scheduler/README.md",
        "unet/.DS_Store",
        "README.md",
    ],
)
def test_what_is_not_loaded_changes_neither_identity_nor_weights(teacher: Path, name: str) -> None:
    parts = load_components(str(MODEL), CPU, torch.float32)
    (teacher / name).write_text('{"base_model_name_or_path": "another/model"}')
    assert component_digests(teacher) == component_digests(MODEL)
    again = load_components(str(teacher), CPU, torch.float32)
    for part in WEIGHT_FILES:
        stored, loaded = getattr(parts, part).state_dict(), getattr(again, part).state_dict()
        assert all(torch.equal(stored[key], loaded[key]) for key in stored)


@pytest.mark.parametrize("part", WEIGHT_FILES)
def test_pickled_weights_load_as_others_and_decide_the_identity(teacher: Path, part: str) -> None:
    file = pickled(teacher, part)
    parts = load_components(str(teacher), CPU, torch.float32)
    whole = load_components(str(MODEL), CPU, torch.float32)
    same = getattr(whole, part).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in getattr(parts, part).state_dict().items())
    before = component_digests(teacher)
    torch.save({name: 1.5 * value for name, value in torch.load(file).items()}, file)
    assert changed_components(before, teacher) == [part]


@pytest.mark.parametrize("part", WEIGHT_FILES)
def test_weights_in_shards_load_as_others_and_each_shard_decides_the_identity(teacher: Path, part: str) -> None:
    shard = sharded(teacher, part)
    parts = load_components(str(teacher), CPU, torch.float32)
    whole = load_components(str(MODEL), CPU, torch.float32)
    same = getattr(whole, part).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in getattr(parts, part).state_dict().items())
    before = component_digests(teacher)
    save_file(times(shard, 1.5), shard, {"format": "pt"})
    assert changed_components(before, teacher) == [part]


def test_a_recipe_of_before_still_means_a_folder_whose_files_it_counted(teacher: Path) -> None:
    shutil.copyfile(teacher / "vae/config.json", teacher / "vae/diffusion_pytorch_model.fp16.safetensors")
    (teacher / "unet/notes.txt").write_text("mine")
    before = by_the_earlier_rule(teacher)
    assert before != component_digests(teacher)
    assert changed_components(before, teacher) == []
    assert digests_as_recorded(before, teacher) == before
    weights = teacher / "vae" / WEIGHT_FILES["vae"][0]
    save_file(times(weights, 1.5), weights, {"format": "pt"})
    assert changed_components(before, teacher) == ["vae"]
    assert digests_as_recorded(before, teacher) == {**before, "vae": component_digests(teacher)["vae"]}


def test_a_recipe_of_before_that_left_out_the_weights_is_refused_as_undecidable(teacher: Path) -> None:
    pickled(teacher, "unet")
    before = by_the_earlier_rule(teacher)
    for check in (changed_components, digests_as_recorded):
        with pytest.raises(Refused, match=r"diffusion_pytorch_model\.bin: was no part .* make the cache again"):
            check(before, teacher)
