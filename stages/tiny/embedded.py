"""How `model/` was made: latents of whitened patches, then classifier, autoencoder and teacher, then one folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import fold, mse_loss, unfold
from transformers import CLIPTokenizer

from stages.tiny import anatomy
from stages.tiny.folder import LATENT_UNIT, encode, half_weights, scale_of, write_folder
from stages.tiny.judge import AttributeClassifier
from stages.tiny.scenes import PIXELS, Scenes
from stages.tiny.training import TrainingSpec, fit_classifier, fit_teacher, load_average, train
from stages.tiny.world import EMBEDDED, draw_scenes

SEED = 20
SCENES = 40_000
PARTS = ("judge", "decoder", "encoder", "teacher")
"""By their stored names; `judge` is the attribute classifier."""
CLASSIFIER = TrainingSpec("judge", steps=2500, learning_rate=2e-3, warmup_steps=50)
DECODER = TrainingSpec("decoder", steps=9000, learning_rate=2e-3)
ENCODER = TrainingSpec("encoder", steps=3000, learning_rate=2e-3)
TEACHER = TrainingSpec("teacher", steps=10_000, learning_rate=1.5e-3, ema_decay=0.999)


@dataclass(frozen=True)
class PatchCode:
    """The latent that the autoencoder is fitted to: the first four principal components of 8x8 patches, whitened."""

    mean: Float[Tensor, " n"]
    basis: Float[Tensor, "n 4"]

    def __call__(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 4 h/8 w/8"]:
        patches = unfold(pictures, 8, stride=8).transpose(1, 2)
        return fold(((patches - self.mean) @ self.basis).transpose(1, 2), (PIXELS // 8,) * 2, 1)


def fit_code(scenes: Scenes) -> PatchCode:
    """Principal components from the first 4000 pictures, each scaled to unit variance."""
    patches = unfold(scenes.normalised(torch.arange(4000)), 8, stride=8).transpose(1, 2).reshape(-1, 192).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    print(f"latent: four components hold {values[-4:].sum() / values.sum():.3f} of the variance")
    basis = vectors[:, -4:].flip(1)
    basis = basis * basis.sum(0).sign()
    return PatchCode(mean.float(), (basis / values[-4:].flip(0).sqrt()).float())


def fit_decoder(scenes: Scenes, code: PatchCode, vae: AutoencoderKL, work: Path) -> None:
    """Train the decoder on slightly noisy codes; errors on the shape and at its edge count more."""
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def loss(generator: torch.Generator) -> Tensor:
        rows = scenes.sample_rows(generator, 16)
        pictures, covered = scenes.normalised(rows), scenes.coverage[rows, None].float() / 255
        latents = code(pictures)
        noise = 0.15 * torch.rand(16, 1, 1, 1, generator=generator)
        decoded = vae.decode(latents + noise * torch.randn(latents.shape, generator=generator)).sample
        near = nn.functional.max_pool2d(covered, 5, stride=1, padding=2)
        weighted: Tensor = (decoded - pictures).abs() * (1 + 4 * near)
        return weighted.mean()

    train(DECODER, decoder, loss, work)


def fit_encoder(scenes: Scenes, code: PatchCode, vae: AutoencoderKL, work: Path) -> None:
    """Train the encoder to give the code, with a log-variance of -8."""
    encoder = nn.ModuleList([vae.encoder, vae.quant_conv])

    def loss(generator: torch.Generator) -> Tensor:
        pictures = scenes.normalised(scenes.sample_rows(generator, 16))
        mean, log_variance = vae.quant_conv(vae.encoder(pictures)).chunk(2, dim=1)
        spread: Tensor = (log_variance + 8).square().mean()
        return mse_loss(mean, code(pictures)) + 0.01 * spread

    train(ENCODER, encoder, loss, work)


def fit(work: Path, parts: tuple[str, ...] = PARTS) -> None:
    """Train these parts, each from its newest checkpoint in `work`; two processes may train different parts."""
    work.mkdir(parents=True, exist_ok=True)
    scenes = draw_scenes(SCENES, SEED)
    code, vae = fit_code(scenes), anatomy.build_vae(SEED)
    if "judge" in parts:
        torch.manual_seed(SEED)
        fit_classifier(CLASSIFIER, scenes, AttributeClassifier(EMBEDDED), work)
    if "decoder" in parts:
        fit_decoder(scenes, code, vae, work)
    if "encoder" in parts:
        fit_encoder(scenes, code, vae, work)
    if "teacher" in parts:
        tokenizer = anatomy.build_tokenizer()
        torch.manual_seed(SEED)
        rows_of = torch.arange(len(scenes.texts)).split(1000)
        latents = torch.cat([code(scenes.normalised(rows)) for rows in rows_of])
        fit_teacher(TEACHER, latents, scenes.texts, tokenizer, build_parts(tokenizer), work)


def build_parts(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """The untrained UNet and text encoder."""
    return nn.ModuleDict({"unet": anatomy.build_unet(), "text_encoder": anatomy.build_text_encoder(tokenizer)})


def assemble(work: Path, out: Path) -> None:
    """Write every part in fp16 into `out`, replacing what lies there."""
    tokenizer = anatomy.build_tokenizer()
    vae, classifier, teacher = anatomy.build_vae(), AttributeClassifier(EMBEDDED), build_parts(tokenizer)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    encoder = nn.ModuleList([vae.encoder, vae.quant_conv])
    for part, module in zip(PARTS, (classifier, decoder, encoder, teacher), strict=True):
        load_average(work, part, module)
    enlarge_latents(vae, 1 / LATENT_UNIT)
    vae.register_to_config(scaling_factor=scale_of(encode(vae, draw_scenes(1000, SEED + 1))))
    write_folder(vae, teacher, tokenizer, out, {"judge/judge.safetensors": half_weights(classifier)})


@torch.no_grad()
def enlarge_latents(vae: AutoencoderKL, factor: float) -> None:
    """Make the encoder's latents `factor` times larger and let the decoder undo it: exact, in two 1x1 convolutions."""
    vae.quant_conv.weight[:4] *= factor
    vae.quant_conv.bias[:4] *= factor
    vae.quant_conv.bias[4:] += 2 * torch.log(torch.tensor(factor))
    vae.post_quant_conv.weight /= factor
