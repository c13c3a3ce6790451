"""Laws of CLIP's score, on a CLIP model of a few thousand random weights."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from stages.evaluate.clip import ClipScorer
from stages.evaluate.metrics import Scorer
from stages.system.refusal import Refused

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ["a red star", "a blue moon at the left on a white background", "a star " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained("stages/tiny/model/tokenizer")
    last = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = CLIPConfig(
        text_config={**SMALL, **last, "vocab_size": len(tokenizer), "max_position_embeddings": 24},
        vision_config={**SMALL, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return ClipScorer(str(folder), CPU)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_the_score_is_the_cosine_that_the_model_computes_for_each_pair(
    scorer: Scorer, folder: Path, pictures: torch.Tensor
) -> None:
    scores = scorer(TEXTS, pictures)["clip"]
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    for text, picture, score in zip(TEXTS, pictures, scores, strict=True):
        shown = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        inputs = processor(text=[text], images=[shown], return_tensors="pt", truncation=True)
        with torch.inference_mode():
            cosine = model(**inputs).logits_per_image[0, 0] / model.logit_scale.exp()
        torch.testing.assert_close(score, cosine, atol=1e-5, rtol=1e-4)
    assert scores.std() > 1e-3


def test_a_pairs_score_does_not_depend_on_the_other_pairs(scorer: Scorer, pictures: torch.Tensor) -> None:
    together = scorer(TEXTS, pictures)["clip"]
    alone = torch.cat([scorer([text], picture[None])["clip"] for text, picture in zip(TEXTS, pictures, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_folder_that_is_no_clip_model_is_refused_with_its_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"clip: .* no CLIP model can be loaded"):
        ClipScorer(str(tmp_path), CPU)
    with pytest.raises(Refused, match="clip: 'no-such-owner/nothing'"):
        ClipScorer("no-such-owner/nothing", CPU)


def test_a_model_of_which_weights_are_missing_is_refused_instead_of_made_up(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        Refused, match=r"no CLIP model can be loaded from there \(1 tensor missing, such as text_projection.weight"
    ):
        ClipScorer(str(tmp_path), CPU)
