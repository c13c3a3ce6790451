"""How `model/` was made: latents fixed by whitened patches, then judge, autoencoder and teacher, each resumable."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, fold, mse_loss, unfold
from transformers import CLIPTokenizer

from stages.tiny import anatomy
from stages.tiny.judge import AttributeClassifier
from stages.tiny.training import TrainingSpec, train
from stages.tiny.world import PIXELS, draw_scene, label, sample_scene, world_grammar

SEED = 20
SCENES = 40_000
CLASSIFIER = TrainingSpec("judge", steps=2500, learning_rate=2e-3, warmup_steps=50)
DECODER = TrainingSpec("decoder", steps=9000, learning_rate=2e-3)
ENCODER = TrainingSpec("encoder", steps=3000, learning_rate=2e-3)
TEACHER = TrainingSpec("teacher", steps=10_000, learning_rate=1.5e-3, ema_decay=0.999)


@dataclass(frozen=True)
class Scenes:
    """A drawn part of the world."""

    pictures: UInt8[Tensor, "n 3 h w"]
    coverage: UInt8[Tensor, "n h w"]
    labels: Int[Tensor, "n 5"]
    texts: tuple[str, ...]

    def sample_rows(self, generator: torch.Generator, count: int) -> Int[Tensor, " count"]:
        """Random rows."""
        return torch.randint(len(self.texts), (count,), generator=generator)

    def normalised(self, rows: Int[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [-1, 1]."""
        return self.pictures[rows].float() / 127.5 - 1


def draw_scenes(count: int, seed: int = SEED) -> Scenes:
    """The first `count` training sentences of a seed, drawn."""
    asked = [world_grammar().prompt(seed, index) for index in range(count)]
    pictures, coverage, labels = [], [], []
    for prompt in asked:
        scene, rng = sample_scene(prompt)
        picture, covered = draw_scene(scene, rng)
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
        coverage.append(torch.from_numpy(covered.copy()))
        labels.append(torch.tensor(label(scene)))
    texts = tuple(prompt.text for prompt in asked)
    return Scenes(torch.stack(pictures), torch.stack(coverage), torch.stack(labels), texts)


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


def fit_classifier(scenes: Scenes, work: Path) -> AttributeClassifier:
    """Train the judge on true pictures with a little noise, so that a decoder's blur does not confuse it."""
    torch.manual_seed(SEED)
    net = AttributeClassifier().train()

    def loss(generator: torch.Generator) -> Tensor:
        rows = scenes.sample_rows(generator, 64)
        pictures = scenes.normalised(rows)
        noise = 0.15 * torch.rand(64, 1, 1, 1, generator=generator)
        logits = net(pictures + noise * torch.randn(pictures.shape, generator=generator))
        return sum((cross_entropy(row, scenes.labels[rows, i]) for i, row in enumerate(logits)), torch.zeros(()))

    train(CLASSIFIER, net, loss, work)
    return net


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


def fit_teacher(scenes: Scenes, code: PatchCode, tokenizer: CLIPTokenizer, work: Path) -> nn.ModuleDict:
    """Train text encoder and UNet together on noise prediction, with a tenth of the sentences left empty."""
    torch.manual_seed(SEED)
    parts = nn.ModuleDict({"unet": anatomy.build_unet(), "text_encoder": anatomy.build_text_encoder(tokenizer)})
    alpha_bar = anatomy.build_scheduler().alphas_cumprod
    latents = torch.cat([code(scenes.normalised(rows)) for rows in torch.arange(len(scenes.texts)).split(1000)])
    said = tokenizer(["", *scenes.texts], padding="max_length", truncation=True, return_tensors="pt").input_ids

    def loss(generator: torch.Generator) -> Tensor:
        rows = scenes.sample_rows(generator, 64)
        empty = torch.rand(64, generator=generator) < 0.1
        k = torch.randint(1000, (64,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        alpha, sigma = (part.sqrt()[:, None, None, None] for part in (alpha_bar[k], 1 - alpha_bar[k]))
        cond = parts["text_encoder"](said[torch.where(empty, 0, rows + 1)]).last_hidden_state
        answer = parts["unet"](alpha * latents[rows] + sigma * noise, k, cond).sample
        return mse_loss(answer, noise)

    train(TEACHER, parts, loss, work)
    return parts


PARTS = ("judge", "decoder", "encoder", "teacher")


def fit(work: Path, parts: tuple[str, ...] = PARTS) -> None:
    """Train the parts named, each from its newest checkpoint in `work`; two calls may share the parts between them."""
    work.mkdir(parents=True, exist_ok=True)
    scenes = draw_scenes(SCENES)
    code, vae = fit_code(scenes), anatomy.build_vae(SEED)
    if "judge" in parts:
        fit_classifier(scenes, work)
    if "decoder" in parts:
        fit_decoder(scenes, code, vae, work)
    if "encoder" in parts:
        fit_encoder(scenes, code, vae, work)
    if "teacher" in parts:
        fit_teacher(scenes, code, anatomy.build_tokenizer(), work)
