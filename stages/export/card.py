"""The model card: what the folder is, how to run it, how it was made, how good it is, what it may be used for.

Every line comes from a fact; what is not known is left out, or said to be unknown.
"""

import json
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from stages.export.figures import results, tables
from stages.export.history import History
from stages.export.licence import FIELDS, OPENRAIL, STABLE_DIFFUSION_1

TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "diffusers-training", "sollune"]
PROMPT = "a red lighthouse on a cliff"

FLOW = """A Stable Diffusion 1.x model that answers with the **velocity** of the straight path
`x_s = (1 - s) x0 + s eps`, `v = eps - x0`, told the time `1000 s`. It was distilled by sollune from a cache of its
teacher's own answers."""
KEEP_FLOW = """Keep the scheduler that lies here: UniPC with `use_flow_sigmas`, `prediction_type: flow_prediction` and
`flow_shift: {flow_shift:g}` (`DPMSolverMultistepScheduler` with the same settings works as well). A scheduler for noise
prediction makes noise of it; most refuse. The latents are scaled as the teacher's are. In ComfyUI: `ModelSamplingSD3`
with shift {flow_shift:g} behind the loader, sampler euler, scheduler simple."""
VP = """A Stable Diffusion 1.x model that answers with **v-prediction** on its teacher's own noise schedule. It was
distilled by sollune from a cache of its teacher's own answers."""
KEEP_VP = """Keep the scheduler that lies here, or any other with `prediction_type: v_prediction` and the same betas.
The latents are scaled as the teacher's are."""

EXAMPLE = """```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(".")  # this folder, or the place to which it was published
picture = pipeline({prompt}, num_inference_steps=25, guidance_scale=5.0).images[0]
picture.save("picture.png")
```"""

LIMITS = """The student learnt from its teacher alone: what the teacher cannot paint, it cannot paint, and the biases
and unwanted contents of the teacher's training pictures come along. **There is no safety filter** in this folder:
whoever shows its pictures to others has to add one."""
LIMITS_SD1 = """Its teacher is, or descends from, Stable Diffusion 1.x, whose card states: trained on a part of
LAION-5B, which holds adult content; captions mainly in English, so that other languages work worse and white and
western cultures are often the default; no legible text; weak at composition, faces and people; a lossy autoencoder."""

CITATION = """sollune repeats, from an offline cache and with measured steps, an experiment of AbstractPhil:
`AbstractPhil/sd15-flow-matching` ("Sol", guided by the assessor "David") and `AbstractPhil/sd15-flow-lune` ("Lune",
which went on from it without him, on the latents of `AbstractPhil/sd15-latent-distillation-500k`)."""


def card(facts: Mapping[str, Any], history: History | None = None) -> str:
    """README.md with the head that model hubs read.

    `facts` are those of `sollune.json`: `title`, `license` with its name and link, and `base_model` (a hub id) are
    taken up where they are there.
    """
    flows = facts.get("prediction") != "v_prediction"
    sections = {
        "Use": f"{_example(history)}\n\n{(KEEP_FLOW if flows else KEEP_VP).format(**{'flow_shift': 1.0, **facts})}",
        "Samples": _samples(history),
        "Figures": _figures(history),
        "How it was made": _made(facts, history),
        "Biases, limits, safety": f"{LIMITS}\n\n{LIMITS_SD1}" if _of_stable_diffusion(facts) else LIMITS,
        "Licence": _licence(facts),
        "Citation": CITATION,
    }
    title = facts.get("title", f"{'A velocity model' if flows else 'A v-predicting model'} (sollune)")
    body = [f"# {title}", FLOW if flows else VP, *(f"## {head}\n\n{text}" for head, text in sections.items() if text)]
    return str(ModelCard(f"---\n{_head(facts, history, flows).to_yaml()}\n---\n" + "\n\n".join(body) + "\n"))


def _head(facts: Mapping[str, Any], history: History | None, flows: bool) -> ModelCardData:
    found = results(history.evaluation) if history else []
    base = facts.get("base_model")
    told: dict[str, Any] = {key: facts[key] for key in FIELDS if key in facts}
    if base:
        told |= {"base_model": base, "base_model_relation": "finetune"}
    if found:
        told |= {"eval_results": found, "model_name": str(base or facts.get("teacher") or "student")}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*TAGS, *(["flow-matching"] if flows else [])],
        language="en" if _of_stable_diffusion(facts) else None,
        inference=False,
        **told,
    )


def _of_stable_diffusion(facts: Mapping[str, Any]) -> bool:
    """Whether the teacher says that it is Stable Diffusion 1.x or made from it."""
    return facts.get("license") == OPENRAIL or facts.get("base_model") in STABLE_DIFFUSION_1


def _example(history: History | None) -> str:
    prompts = history.prompts if history else []
    return EXAMPLE.format(prompt=json.dumps(prompts[0] if prompts else PROMPT))


def _samples(history: History | None) -> str:
    """The pictures that lie in the folder."""
    pictures = history.pictures if history else {}
    return "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)


def _figures(history: History | None) -> str:
    found = tables(history.evaluation) if history else ""
    return found or "Not measured yet: `sollune evaluate RUN`, then `sollune export RUN` again."


def _made(facts: Mapping[str, Any], history: History | None) -> str:
    cache = {"cache": history.cache} if history and history.cache else {}
    told = "\n".join(_rows({**facts, **cache}))
    if not (history and history.recipe):
        return told
    recipe = yaml.safe_dump(dict(history.recipe), sort_keys=False, allow_unicode=True, width=120)
    return f"{told}\n\n<details><summary>The run's settings</summary>\n\n```yaml\n{recipe}```\n\n</details>"


def _licence(facts: Mapping[str, Any]) -> str:
    """The weights' licence is the teacher's; never guessed."""
    teacher = facts.get("base_model") or facts.get("teacher") or "its teacher"
    if "license" not in facts:
        return f"The weights stand under the licence of `{teacher}`, whose folder states none: ask whoever made it."
    name = facts.get("license_name", facts["license"])
    link = f" ({facts['license_link']})" if "license_link" in facts else ""
    text = f"The weights are made from `{teacher}` and stand under its licence: `{name}`{link}."
    if facts["license"] != OPENRAIL:
        return text
    return (
        f"{text} That is the CreativeML Open RAIL-M: its use-based restrictions (attachment A) bind "
        "everybody who uses, changes or passes on these weights."
    )


def _rows(facts: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each fact, nested ones by their path."""
    rows: list[str] = []
    for key, value in sorted(facts.items()):
        inner = isinstance(value, Mapping)
        rows += _rows(value, f"{prefix}{key}.") if inner else [f"- {prefix}{key}: `{value}`"]
    return rows
