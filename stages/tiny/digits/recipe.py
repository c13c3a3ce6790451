"""How a teacher of handwritten digits is made, every part from the embedded teacher's weights."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from stages.system.atomic import atomic_write
from stages.system.refusal import Refused
from stages.tiny import anatomy
from stages.tiny.digits.digits import load_digits
from stages.tiny.digits.world import DIGITS
from stages.tiny.folder import LATENT_UNIT, MODEL, encode, half_weights, refuse_other_folder, write_folder
from stages.tiny.judge import AttributeClassifier
from stages.tiny.scenes import Scenes
from stages.tiny.training import TrainingSpec, fit_classifier, fit_teacher, train

LOG_VARIANCE = -8.0
"""Of latents of unit variance, as in the embedded autoencoder."""


JUDGE = TrainingSpec("judge", steps=1200, learning_rate=2e-3, warmup_steps=50)
AUTOENCODER = TrainingSpec("autoencoder", steps=500, learning_rate=1e-3, warmup_steps=50)
TEACHER = TrainingSpec("teacher", steps=1000, learning_rate=1e-3, ema_decay=0.995, save_every=100)


@dataclass(frozen=True)
class Recipe:
    """How much each part is trained, on how many pictures, and from which seed."""

    scenes: int = 12_000
    judge: TrainingSpec = JUDGE
    autoencoder: TrainingSpec = AUTOENCODER
    teacher: TrainingSpec = TEACHER
    seed: int = 18

    def spec(self, part: str) -> TrainingSpec:
        """How a part is trained, with the random numbers of this seed."""
        specs = {"judge": self.judge, "autoencoder": self.autoencoder, "teacher": self.teacher}
        return replace(specs[part], seed=self.seed)


def fit_judge(recipe: Recipe, scenes: Scenes, work: Path) -> AttributeClassifier:
    """Train the judge on digits that are not held out."""
    torch.manual_seed(recipe.seed)
    net = AttributeClassifier(DIGITS)
    fit_classifier(recipe.spec("judge"), scenes, net, work)
    return net.eval()


def fit_autoencoder(spec: TrainingSpec, scenes: Scenes, work: Path) -> AutoencoderKL:
    """Train encoder and decoder together, from the embedded teacher's; errors on the ink and at its edge count more."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
    unit = 1 / vae.config.scaling_factor
    log_variance_of = LOG_VARIANCE + 2 * torch.tensor(unit).log()

    def loss(generator: torch.Generator) -> Tensor:
        rows = scenes.sample_rows(generator, 16)
        pictures, covered = scenes.normalised(rows), scenes.coverage[rows, None].float() / 255
        mean, log_variance = vae.quant_conv(vae.encoder(pictures)).chunk(2, dim=1)
        noise = 0.15 * unit * torch.rand(16, 1, 1, 1, generator=generator)
        decoded = vae.decode(mean + noise * torch.randn(mean.shape, generator=generator)).sample
        near = nn.functional.max_pool2d(covered, 5, stride=1, padding=2)
        error: Tensor = ((decoded - pictures).abs() * (1 + 4 * near)).mean()
        size, spread = (mean / unit).square().mean(), (log_variance - log_variance_of).square().mean()
        total: Tensor = error + 1e-3 * size + 1e-3 * spread
        return total

    train(spec, vae, loss, work)
    return vae.eval()


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Float[Tensor, "n 4 h w"]) -> Float[Tensor, "n 4 h w"]:
    """Give latents mean 0 and covariance 1 over all places, in two 1x1 convolutions: the decoder undoes it exactly.

    The latents are those that `vae` gives before; returned are the scaled ones that it gives after.
    """
    rows = latents.movedim(1, 0).flatten(1).double()
    mean, (values, vectors) = rows.mean(1), torch.linalg.eigh(rows.cov())
    root = values.sqrt() * LATENT_UNIT
    to_white, from_white = (vectors * power @ vectors.T for power in (1 / root, root))
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    encoder.weight[:4] = torch.einsum("ij,jkhw->ikhw", to_white, encoder.weight[:4].double()).float()
    encoder.bias[:4] = (to_white @ (encoder.bias[:4].double() - mean)).float()
    encoder.bias[4:] += to_white.square().sum(1).log().float()  # its log-variances are all about the same
    decoder.bias += (decoder.weight.double()[:, :, 0, 0] @ mean).float()
    decoder.weight.copy_(
        torch.einsum("ij,jkhw->ikhw", decoder.weight[:, :, 0, 0].double(), from_white[:, :, None, None])
    )
    vae.register_to_config(scaling_factor=LATENT_UNIT)
    white = torch.einsum("ij,jn->in", to_white * LATENT_UNIT, rows - mean[:, None]).float()
    places: Tensor = white.unflatten(1, (len(latents), *latents.shape[2:]))
    return places.movedim(1, 0)


def first_parts(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """The embedded teacher's UNet and text encoder; words that it does not know start from N(0, 1)."""
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet", torch_dtype=torch.float32)
    known = CLIPTokenizer.from_pretrained(MODEL / "tokenizer").get_vocab()
    text_encoder = anatomy.build_text_encoder(tokenizer)
    weights = dict(CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32).state_dict())
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    table = text_encoder.state_dict()[name].clone()
    for piece, row in tokenizer.get_vocab().items():
        if piece in known:
            table[row] = weights[name][known[piece]]
    text_encoder.load_state_dict({**weights, name: table})
    return nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def open_work(recipe: Recipe, work: Path) -> None:
    """Keep in `work` what its checkpoints are of; raises `Refused` where they are of something else."""
    digits = load_digits()
    content = hashlib.sha256(digits.ink.tobytes() + digits.digit.tobytes()).hexdigest()
    facts = json.dumps({"recipe": asdict(recipe), "digits": content}, indent=2).encode()
    file = work / "fit.json"
    if not file.exists():
        atomic_write(file, facts)
    elif file.read_bytes() != facts:
        raise Refused(f"--work: {work}: holds checkpoints of another seed or recipe - name another folder")


def make_teacher(recipe: Recipe, work: Path, out: Path) -> None:
    """Train autoencoder and teacher, each from its newest checkpoint in `work`, and write the folder `out`."""
    refuse_other_folder(out)
    open_work(recipe, work)
    scenes = DIGITS.draw(recipe.scenes, recipe.seed)
    vae = fit_autoencoder(recipe.spec("autoencoder"), scenes, work)
    latents = whiten(vae, encode(vae, scenes))
    tokenizer = anatomy.build_tokenizer(DIGITS.grammar())
    torch.manual_seed(recipe.seed)
    parts = first_parts(tokenizer)
    fit_teacher(recipe.spec("teacher"), latents, scenes.texts, tokenizer, parts, work)
    write_folder(vae, parts.eval(), tokenizer, out)


def make_judge(recipe: Recipe, work: Path, file: Path) -> None:
    """Train the judge from its newest checkpoint in `work`, and write its weights."""
    open_work(recipe, work)
    atomic_write(file, half_weights(fit_judge(recipe, DIGITS.draw(recipe.scenes, recipe.seed), work)))
