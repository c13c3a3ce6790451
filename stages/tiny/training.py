"""How `model/` was made: latents of whitened patches, then classifier, autoencoder and teacher, then one folder."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, fold, mse_loss, unfold
from transformers import CLIPTokenizer

from stages.prompts import derived_seed
from stages.system.atomic import atomic_path
from stages.system.refusal import Refused
from stages.tiny import anatomy
from stages.tiny.score import AttributeClassifier
from stages.tiny.world import PIXELS, draw_scene, label, sample_scene, world_grammar


@dataclass(frozen=True)
class TrainingSpec:
    """How long and how fast one part is trained."""

    name: str
    steps: int
    learning_rate: float
    warmup_steps: int = 100
    ema_decay: float = 0.998
    save_every: int = 250


SEED = 20
SCENES = 40_000
PARTS = ("judge", "decoder", "encoder", "teacher")
"""By their stored names; `judge` is the attribute classifier."""
CLASSIFIER = TrainingSpec("judge", steps=2500, learning_rate=2e-3, warmup_steps=50)
DECODER = TrainingSpec("decoder", steps=9000, learning_rate=2e-3)
ENCODER = TrainingSpec("encoder", steps=3000, learning_rate=2e-3)
TEACHER = TrainingSpec("teacher", steps=10_000, learning_rate=1.5e-3, ema_decay=0.999)

LATENT_UNIT = 0.18215
"""SD1.5's scaling factor: with latents of its size a forgotten factor shows as it would there."""


@dataclass(frozen=True)
class Scenes:
    """Pictures of the world, with the coverage of their shapes, the labels of their attributes and their sentences."""

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
    """The pictures of the first `count` training sentences of a seed."""
    prompts = [world_grammar().prompt(seed, index) for index in range(count)]
    pictures, coverage, labels = [], [], []
    for prompt in prompts:
        scene, rng = sample_scene(prompt)
        picture, covered = draw_scene(scene, rng)
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
        coverage.append(torch.from_numpy(covered.copy()))
        labels.append(torch.tensor(label(scene)))
    texts = tuple(prompt.text for prompt in prompts)
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


def fit_classifier(scenes: Scenes, work: Path) -> None:
    """Train the classifier on true pictures with a little noise, so that it is robust to a decoder's blur."""
    torch.manual_seed(SEED)
    net = AttributeClassifier().train()

    def loss(generator: torch.Generator) -> Tensor:
        rows = scenes.sample_rows(generator, 64)
        pictures = scenes.normalised(rows)
        noise = 0.15 * torch.rand(64, 1, 1, 1, generator=generator)
        logits = net(pictures + noise * torch.randn(pictures.shape, generator=generator))
        return sum((cross_entropy(row, scenes.labels[rows, i]) for i, row in enumerate(logits)), torch.zeros(()))

    train(CLASSIFIER, net, loss, work)


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


def fit_teacher(scenes: Scenes, code: PatchCode, tokenizer: CLIPTokenizer, work: Path) -> None:
    """Train text encoder and UNet together on noise prediction, with a tenth of the sentences left empty."""
    torch.manual_seed(SEED)
    parts = nn.ModuleDict({"unet": anatomy.build_unet(), "text_encoder": anatomy.build_text_encoder(tokenizer)})
    alpha_bar = anatomy.build_scheduler().alphas_cumprod
    latents = torch.cat([code(scenes.normalised(rows)) for rows in torch.arange(len(scenes.texts)).split(1000)])
    token_ids = tokenizer(["", *scenes.texts], padding="max_length", truncation=True, return_tensors="pt").input_ids

    def loss(generator: torch.Generator) -> Tensor:
        rows = scenes.sample_rows(generator, 64)
        empty = torch.rand(64, generator=generator) < 0.1
        k = torch.randint(1000, (64,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        alpha, sigma = (part.sqrt()[:, None, None, None] for part in (alpha_bar[k], 1 - alpha_bar[k]))
        cond = parts["text_encoder"](token_ids[torch.where(empty, 0, rows + 1)]).last_hidden_state
        return mse_loss(parts["unet"](alpha * latents[rows] + sigma * noise, k, cond).sample, noise)

    train(TEACHER, parts, loss, work)


def fit(work: Path, parts: tuple[str, ...] = PARTS) -> None:
    """Train these parts, each from its newest checkpoint in `work`; two processes may train different parts."""
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


def train(spec: TrainingSpec, module: nn.Module, loss_of: Callable[[torch.Generator], Tensor], work: Path) -> None:
    """Minimise `loss_of(generator of the step)`; `module` ends on the moving average of its weights.

    The newest state lies in `work/<name>.pt`, from which a second call resumes.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=spec.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    averaged = {name: value.detach().clone() for name, value in module.state_dict().items()}
    path, step, shown, since = work / f"{spec.name}.pt", 0, 0.0, time.perf_counter()
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, step = state["averaged"], state["step"]
    while step < spec.steps:
        cosine = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / spec.steps))))
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * min((step + 1) / spec.warmup_steps, cosine)
        loss = loss_of(torch.Generator().manual_seed(derived_seed(spec.name, step)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(spec.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in module.state_dict().items():
                averaged[name].lerp_(value, 1 - decay) if value.is_floating_point() else averaged[name].copy_(value)
        shown = loss.item() if step == 1 else 0.98 * shown + 0.02 * loss.item()
        if step % spec.save_every == 0 or step == spec.steps:
            with atomic_path(path) as temporary:
                state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
                torch.save({**state, "step": step}, temporary)
            seconds = time.perf_counter() - since
            print(f"{spec.name}: step {step}/{spec.steps} loss {shown:.4f} {seconds:.0f}s", flush=True)
    module.load_state_dict(averaged)


def assemble(work: Path, out: Path) -> None:
    """Write every part in fp16 into `out`, replacing what lies there."""
    tokenizer = anatomy.build_tokenizer()
    vae, classifier = anatomy.build_vae(), AttributeClassifier()
    teacher = nn.ModuleDict({"unet": anatomy.build_unet(), "text_encoder": anatomy.build_text_encoder(tokenizer)})
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    encoder = nn.ModuleList([vae.encoder, vae.quant_conv])
    for part, module in zip(PARTS, (classifier, decoder, encoder, teacher), strict=True):
        load_average(work, part, module)
    enlarge_latents(vae, 1 / LATENT_UNIT)
    vae.register_to_config(scaling_factor=round(measured_scale(vae), 5))
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=teacher["text_encoder"].half(),
        tokenizer=tokenizer,
        unet=teacher["unet"].half(),
        scheduler=anatomy.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out)
    nest_text_keys(out / "text_encoder")
    load_in_float32(out / "text_encoder" / "config.json")
    tokenizer.save_pretrained(out / "tokenizer")
    tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))  # vocab.json and merges.txt, for transformers 4
    (out / "judge").mkdir()
    state = classifier.state_dict()
    weights = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(weights, out / "judge" / "judge.safetensors")


def load_average(work: Path, part: str, module: nn.Module) -> None:
    """Load the averaged weights of a finished part in place."""
    path = work / f"{part}.pt"
    if not path.exists():
        raise Refused(f"{path} does not exist - run python -m stages.tiny fit --parts {part}")
    module.load_state_dict(torch.load(path, weights_only=True)["averaged"])
    module.eval()


@torch.no_grad()
def enlarge_latents(vae: AutoencoderKL, factor: float) -> None:
    """Make the encoder's latents `factor` times larger and let the decoder undo it: exact, in two 1x1 convolutions."""
    vae.quant_conv.weight[:4] *= factor
    vae.quant_conv.bias[:4] *= factor
    vae.quant_conv.bias[4:] += 2 * torch.log(torch.tensor(factor))
    vae.post_quant_conv.weight /= factor


@torch.no_grad()
def measured_scale(vae: AutoencoderKL) -> float:
    """One over the standard deviation of the encoder's latents on 1000 pictures."""
    scenes = draw_scenes(1000, seed=SEED + 1)
    latents = [vae.encode(scenes.normalised(rows)).latent_dist.mean for rows in torch.arange(1000).split(100)]
    return 1 / float(torch.cat(latents).std())


def nest_text_keys(folder: Path) -> None:
    """Rewrite a text encoder's weights under `text_model.`, the names that every version of transformers reads."""
    file = folder / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def load_in_float32(config: Path) -> None:
    """Name float32 as the type to load in, as diffusers does; transformers else takes that of the file."""
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
