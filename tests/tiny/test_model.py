"""The embedded teacher as it is shipped: a real folder that generates what a sentence names."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from shards.record import BLOCKS
from stages.flow.bridge import Bridge
from stages.flow.schedule import NoiseSchedule
from stages.nets.components import load_components
from stages.nets.features import last_resnets
from stages.nets.scheduler import flow_scheduler
from stages.prompts import GrammarSource, prompts
from stages.tiny.check import reconstruct
from stages.tiny.embedded import PatchCode, fit_code
from stages.tiny.folder import MODEL
from stages.tiny.scenes import Scenes
from stages.tiny.score import accuracies, load_classifier, score
from stages.tiny.training import TrainingSpec, train
from stages.tiny.world import draw_scenes, world_grammar

SOURCE = GrammarSource(grammar=Path("stages/tiny/grammar.yaml"))


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """Loaded by the stock call for Stable Diffusion 1.5."""
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(200, seed=99)


def test_the_folder_takes_at_most_twelve_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) < 12e6


def test_it_has_the_anatomy_and_schedule_of_stable_diffusion() -> None:
    parts = load_components(str(MODEL), torch.device("cpu"), torch.float32)
    assert tuple(last_resnets(parts.unet)) == BLOCKS
    assert parts.schedule.prediction_type == "epsilon"
    assert float(parts.schedule.alpha_bar[-1]) == pytest.approx(0.00466, abs=2e-5)


def test_stock_diffusers_generates_what_a_sentence_names(pipeline: StableDiffusionPipeline) -> None:
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    texts = [prompt.text for prompt in prompts(SOURCE, 5, "validation", 40)]
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 15, "guidance_scale": 5.0, "generator": generator, "output_type": "pt"}
    assert accuracies(score(texts, pipeline(texts, **options).images))["all"] > 0.8


@pytest.fixture
def velocity_pipeline(pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> StableDiffusionPipeline:
    """The stock pipeline with a perfect student in it: the teacher's own velocity at the time 1000 s."""
    bridge, stock_forward = Bridge(NoiseSchedule.from_config(pipeline.scheduler.config)), pipeline.unet.forward

    def forward(
        x: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor]:
        s = (t.double() / 1000).expand(len(x))
        k, _s = bridge.nearest_state(s)
        return (bridge.velocity(x, s, k, stock_forward(bridge.teacher_input(x, s), k, encoder_hidden_states).sample),)

    monkeypatch.setattr(pipeline.unet, "forward", forward)
    return pipeline


def test_a_velocity_model_generates_under_the_exported_scheduler_and_rubbish_as_a_noise_model(
    velocity_pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [prompt.text for prompt in prompts(SOURCE, 5, "validation", 40)]

    def right() -> float:
        options = {"num_inference_steps": 15, "guidance_scale": 5.0, "output_type": "pt"}
        generated = velocity_pipeline(texts, generator=torch.Generator().manual_seed(0), **options)
        return accuracies(score(texts, generated.images))["all"]

    assert right() < 0.5
    monkeypatch.setattr(velocity_pipeline, "scheduler", flow_scheduler())
    assert right() > 0.8


def test_the_classifier_reads_true_pictures(scenes: Scenes) -> None:
    predicted = load_classifier().predict(scenes.normalised(torch.arange(200)))
    assert (predicted == scenes.labels).float().mean() > 0.99


def test_the_classifier_reads_pictures_that_went_through_the_autoencoder(
    scenes: Scenes, pipeline: StableDiffusionPipeline
) -> None:
    predicted = load_classifier().predict(reconstruct(pipeline.vae, scenes.normalised(torch.arange(200))))
    assert (predicted == scenes.labels).float().mean() > 0.98


def test_scaled_latents_have_unit_variance(scenes: Scenes, pipeline: StableDiffusionPipeline) -> None:
    with torch.inference_mode():
        latents = pipeline.vae.encode(scenes.normalised(torch.arange(200))).latent_dist.mean
    assert float(latents.std() * pipeline.vae.config.scaling_factor) == pytest.approx(1, abs=0.06)


def test_every_word_of_the_world_is_one_token(pipeline: StableDiffusionPipeline) -> None:
    words = {word for phrase in world_grammar().phrases for word in phrase.words}
    assert all(len(pipeline.tokenizer.tokenize(word)) == 1 for word in words)


def test_a_score_is_nan_where_nothing_is_named() -> None:
    scores = score(["a red star"], torch.zeros(1, 3, 64, 64))
    assert {name for name, value in scores.items() if value.isnan().all()} == {"size", "place", "background"}


def test_the_latent_code_is_white(scenes: Scenes) -> None:
    many = draw_scenes(4000, seed=3)
    code: PatchCode = fit_code(many)
    latents = code(many.normalised(torch.arange(4000))).double()
    covariance = latents.movedim(1, 0).flatten(1).cov()
    assert torch.allclose(covariance, torch.eye(4, dtype=torch.float64), atol=1e-3)


def test_a_fit_that_was_interrupted_ends_on_the_same_weights(tmp_path: Path) -> None:
    fit = TrainingSpec("part", steps=6, learning_rate=0.1, warmup_steps=2, save_every=2)

    def fitted(work: Path, stop_at: int) -> torch.Tensor:
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        layer, calls = torch.nn.Linear(3, 2), []

        def loss(generator: torch.Generator) -> torch.Tensor:
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return layer(torch.randn(4, 3, generator=generator)).square().mean()

        train(fit, layer, loss, work)
        return layer.weight.detach()

    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "twice", stop_at=4)
    assert torch.equal(fitted(tmp_path / "once", stop_at=0), fitted(tmp_path / "twice", stop_at=0))
