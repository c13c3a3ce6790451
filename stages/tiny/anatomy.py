"""The untrained parts of the embedded teacher: the anatomy of Stable Diffusion 1.5 at a tenth of its width."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stages.prompts import Grammar
from stages.tiny.scenes import PIXELS
from stages.tiny.world import world_grammar

LATENT = PIXELS // 8
TOKENS = 24
TEXT_WIDTH = 64


def build_tokenizer(grammar: Grammar | None = None) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with merges that make every word of a grammar one token; none: the embedded world."""
    extra = ("a", "an", "and", "the", "of", "photo", "picture")
    texts = " ".join(
        f"{phrase.text} {' '.join(phrase.words)}" for phrase in (grammar or world_grammar()).phrases
    ).replace("{}", "")
    vocabulary = list(bytes_to_unicode().values())  # type: ignore[no-untyped-call]
    vocabulary += [f"{letter}</w>" for letter in vocabulary]
    merges: list[str] = []
    # Longest words first: an earlier merge wins, so no short word's merge can cut a long word apart.
    for word in sorted({*texts.split(), *extra}, key=lambda word: (-len(word), word)):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merge, whole = f"{pieces[0]} {pieces[1]}", pieces[0] + pieces[1]
            merges += [merge] if merge not in merges else []
            vocabulary += [whole] if whole not in vocabulary else []
            pieces = [whole, *pieces[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    pairs: Any = [tuple(merge.split()) for merge in merges]  # its annotation names another type
    return CLIPTokenizer(vocab=ids, merges=pairs, model_max_length=TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A three-layer CLIP text model.

    Token embeddings start from N(0, 1), positions from N(0, 0.3): with CLIP's usual 0.02 places are never learned.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("token_embedding.weight"):
                parameter.normal_(0, 1)
            if name.endswith("position_embedding.weight"):
                parameter.normal_(0, 0.3)
    return model


def build_unet() -> UNet2DConditionModel:
    """Nine blocks as in SD1.5: three with cross-attention and a plain one down, mirrored up, and a middle."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def build_vae(seed: int = 0) -> AutoencoderKL:
    """An autoencoder with SD1.5's factor of 8 and its four latent channels."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PIXELS,
        scaling_factor=1.0,
    )


def build_scheduler() -> DDIMScheduler:
    """SD1.5's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
