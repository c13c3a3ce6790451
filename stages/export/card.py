"""The model card: what the folder is, how to run it, how it was made, how good it is, what it may be used for.

Every line comes from a fact; what is not known is left out, or stated to be unknown.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from configs.values import PictureSize
from stages.export.history import RunHistory, model_index_results
from stages.export.landings import landing_table
from stages.export.measured_loras import NOTE as LORA_NOTE
from stages.export.measured_loras import lora_table
from stages.export.shape import shape_notes
from stages.export.tables import conversion_table, metric_tables
from stages.flow.windows import window_ends
from stages.sampling.few_steps import few_steps_of
from stages.sampling.fields import DEFAULT_GUIDANCE

OPENRAIL = "creativeml-openrail-m"
STABLE_DIFFUSION_1 = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5",
    *(f"CompVis/stable-diffusion-v1-{k}" for k in (1, 2, 3, 4)),
}
"""Hub ids whose licence is known without their card."""
LICENCE_FIELDS = ("license", "license_name", "license_link")
TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "diffusers-training", "sollune"]
DEFAULT_PROMPT = "a red lighthouse on a cliff"

FLOW_SUMMARY = """\
A Stable Diffusion 1.x model that predicts the **velocity** of the straight path
`x_s = (1 - s) x0 + s eps`, `v = eps - x0`, at the timestep `1000 s`. It was distilled by sollune from a cache of its
teacher's own predictions."""
CONVERTED_SUMMARY = """\
A Stable Diffusion 1.x model that predicts the **velocity** of the straight path
`x_s = (1 - s) x0 + s eps`, `v = eps - x0`, at the timestep `1000 s`. It was converted by sollune from a fine-tuned
model: it started from {start} and was trained shortly on a cache of the fine-tune's own predictions."""
FEW_STEPS_SUMMARY = """\
A Stable Diffusion 1.x model that makes a picture in **{steps}**. Each step leads from one time of the straight path
`x_s = (1 - s) x0 + s eps` to the next: the network predicts `(x_s - x_b) / (s - b)` at the timestep `1000 s`, where
`x_b` is the state at the step's end `b` on its teacher's own guided trajectory. It was trained by sollune on the
landings of such trajectories in a cache.

The guidance scale, {low:g} to {high:g}, is an input of the network: a step is one call, and **negative prompts do
nothing**."""
FEW_STEPS_NOTE = """\
Take `num_inference_steps={windows}` and no other number, with a guidance scale from {low:g} to {high:g}. Keep the
scheduler of this folder: `DPMSolverMultistepScheduler` of order 1 with `use_flow_sigmas`, `prediction_type:
flow_prediction` and `flow_shift: 1`, which takes Euler's steps at the times of the training. The latents are scaled as
the teacher's are.

A single file `*-{windows}step-w*-flow.safetensors` has one guidance scale, that in its name, within its weights: sample
it with `guidance_scale=1` in diffusers, cfg 1 elsewhere. In diffusers open its UNet by
`UNet2DConditionModel.from_single_file(FILE, config=FOLDER, subfolder="unet", time_cond_proj_dim=None)`, and give it to
`StableDiffusionPipeline.from_single_file(FILE, config=FOLDER, unet=UNET)`, where `FOLDER` is this one. For ComfyUI a
workflow lies beside the file: euler at the times {times}."""
STARTS = {
    "delta": "the flow student of its base model plus what the fine-tune changed in that model's weights",
    "graft": "the fine-tune itself, its time embedding re-solved for the time of the path",
}
FLOW_SCHEDULER_NOTE = """\
Keep the scheduler of this folder: UniPC with `use_flow_sigmas`, `prediction_type: flow_prediction` and
`flow_shift: {flow_shift:g}` (`DPMSolverMultistepScheduler` with the same settings works as well). Most schedulers for
noise prediction refuse it, the others give noise. The latents are scaled as the teacher's are. In ComfyUI:
`ModelSamplingSD3` with shift {flow_shift:g} behind the loader, sampler euler, scheduler simple."""
VP_SUMMARY = """\
A Stable Diffusion 1.x model with **v-prediction** on its teacher's own noise schedule. It was distilled by sollune from
a cache of its teacher's own predictions."""
VP_SCHEDULER_NOTE = """\
Keep the scheduler of this folder, or use any other with `prediction_type: v_prediction` and the same betas.
The latents are scaled as the teacher's are."""

CLIP_SKIP_NOTE = """\
Its texts are read with clip skip {layer}: the text encoder of this folder ends {skipped} early, so pass no `clip_skip`.
The single file holds the whole text encoder, as its readers expect: there set clip skip to {layer} (SD.Next,
reForge) or CLIP Stop At Layer to {stop} (SwarmUI); in ComfyUI put `CLIPSetLastLayer` with {stop} behind the loader."""
EXAMPLE_CODE = """```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(".")  # this folder, or the place to which it was published
picture = pipeline({prompt}, {size}num_inference_steps={steps}, guidance_scale={guidance}).images[0]
picture.save("picture.png")
```"""
NOT_MEASURED = "Not measured yet: `sollune evaluate RUN`, then `sollune export RUN` again."

LIMITS_TEXT = """\
The student was trained on its teacher's predictions alone: it cannot generate what the teacher cannot, and it has the
biases and unwanted contents of the teacher's training pictures. **There is no safety filter** in this folder: add one
before you show its pictures to others."""
SD1_LIMITS_TEXT = """\
Its teacher is, or is made from, Stable Diffusion 1.x, whose card states: trained on a part of
LAION-5B, which holds adult content; captions mainly in English, so that other languages work worse and white and
western cultures are often the default; no legible text; weak at composition, faces and people; a lossy autoencoder."""

CITATION = """\
sollune repeats, from an offline cache and with measured steps, an experiment of AbstractPhil:
`AbstractPhil/sd15-flow-matching` ("Sol", guided by the assessor "David") and `AbstractPhil/sd15-flow-lune` ("Lune",
trained on from it without David, on the latents of `AbstractPhil/sd15-latent-distillation-500k`)."""


def licence_of(teacher_folder: Path, base_model: str | None = None) -> dict[str, str]:
    """The licence fields of the teacher's card, or the licence of its hub id; empty when neither is known."""
    card = teacher_folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    stated: dict[str, str] = {}
    if text.startswith("---"):
        head = ModelCard(text, ignore_metadata_errors=True).data
        stated = {key: value for key in LICENCE_FIELDS if isinstance(value := head.get(key), str)}
    if "license" in stated:
        return stated
    return {"license": OPENRAIL} if base_model in STABLE_DIFFUSION_1 else {}


def licence_files(teacher_folder: Path) -> list[Path]:
    """The teacher's licence texts, which are copied with its weights."""
    return sorted(path for path in teacher_folder.glob("LICENSE*") if path.is_file())


def model_card(facts: Mapping[str, Any], history: RunHistory | None = None) -> str:
    """README.md with the head that model hubs read.

    `facts` are those of `sollune.json`: `title`, `license` with its name and link, and `base_model` (a hub id) are
    used where they are there.
    """
    is_flow = facts.get("prediction") != "v_prediction"
    prompt = history.prompts[0] if history and history.prompts else DEFAULT_PROMPT
    pictures = history.pictures if history else {}
    sections = {
        "Use": "\n\n".join(
            [_example_code(prompt, facts), *_size_lines(facts), *_scheduler_notes(facts), *_clip_skip_notes(facts)]
        ),
        "Samples": "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
        "Figures": _figures(history),
        "LoRAs made for its teacher": f"{LORA_NOTE}\n\n{lora_table(history.loras)}"
        if history and history.loras
        else "",
        "How it was made": _provenance_section(facts, history),
        "Biases, limits, safety": f"{LIMITS_TEXT}\n\n{SD1_LIMITS_TEXT}" if _is_sd1(facts) else LIMITS_TEXT,
        "Licence": _licence_section(facts),
        "Citation": CITATION,
    }
    title = facts.get("title", f"{'A velocity model' if is_flow else 'A v-predicting model'} (sollune)")
    body = [
        f"# {title}",
        _summary(facts, is_flow),
        *shape_notes(facts),
        *(f"## {head}\n\n{text}" for head, text in sections.items() if text),
    ]
    return str(ModelCard(f"---\n{_front_matter(facts, history, is_flow).to_yaml()}\n---\n" + "\n\n".join(body) + "\n"))


def _summary(facts: Mapping[str, Any], is_flow: bool) -> str:
    """What the model is, in a paragraph."""
    if few_steps := few_steps_of(facts, "card"):
        low, high = few_steps.guidance_range
        steps = f"{few_steps.windows} step{'s' * (few_steps.windows > 1)}"
        return FEW_STEPS_SUMMARY.format(steps=steps, low=low, high=high)
    if (start := facts.get("converted_from", {}).get("start")) in STARTS:
        return CONVERTED_SUMMARY.format(start=STARTS[start])
    return FLOW_SUMMARY if is_flow else VP_SUMMARY


def _scheduler_notes(facts: Mapping[str, Any]) -> list[str]:
    """How other programs sample it."""
    few_steps = few_steps_of(facts, "card")
    if few_steps is None:
        is_flow = facts.get("prediction") != "v_prediction"
        return [(FLOW_SCHEDULER_NOTE if is_flow else VP_SCHEDULER_NOTE).format(**{"flow_shift": 1.0, **facts})]
    windows, (low, high) = few_steps
    times = ", ".join(f"{end:.9g}" for end in window_ends(windows).tolist())
    return [FEW_STEPS_NOTE.format(windows=windows, low=low, high=high, times=times)]


def _figures(history: RunHistory | None) -> str:
    """The tables of what was measured of this checkpoint."""
    tables = (
        [
            landing_table(history.landings),
            metric_tables(history.evaluation),
            conversion_table(history.conversion),
        ]
        if history
        else []
    )
    return "\n\n".join(filter(None, tables)) or NOT_MEASURED


def _example_code(prompt: str, facts: Mapping[str, Any]) -> str:
    """The example, with height and width where the size learnt most is not the one that the pipeline takes."""
    sizes = [PictureSize.parse(size) for size in facts.get("sizes", ())]
    foreign = sizes and str(sizes[0]) != facts.get("native_size")
    size = f"height={sizes[0].height}, width={sizes[0].width}, " if foreign else ""
    steps, scale = 25, DEFAULT_GUIDANCE
    if few_steps := few_steps_of(facts, "card"):
        steps, scale = few_steps.windows, few_steps.default_guidance
    return EXAMPLE_CODE.format(prompt=json.dumps(prompt), size=size, steps=steps, guidance=scale)


def _size_lines(facts: Mapping[str, Any]) -> list[str]:
    """The sizes, unless they are the teacher's own alone."""
    sizes = list(facts.get("sizes", ()))
    if sizes in ([], [facts.get("native_size")]):
        return []
    return [f"It learnt pictures of these sizes (width x height), the most frequent first: {', '.join(sizes)}."]


def _clip_skip_notes(facts: Mapping[str, Any]) -> list[str]:
    """What to set in other programs, which count the last layer as 1; nothing without clip skip."""
    if not (skip := int(facts.get("clip_skip", 0))):
        return []
    skipped = f"{skip} layer{'s' * (skip > 1)}"
    return [CLIP_SKIP_NOTE.format(layer=skip + 1, stop=-(skip + 1), skipped=skipped)]


def _front_matter(facts: Mapping[str, Any], history: RunHistory | None, is_flow: bool) -> ModelCardData:
    results = model_index_results(history.evaluation) if history else []
    base = facts.get("base_model")
    fields: dict[str, Any] = {key: facts[key] for key in LICENCE_FIELDS if key in facts}
    if base:
        fields |= {"base_model": base, "base_model_relation": "finetune"}
    if results:
        fields |= {"eval_results": results, "model_name": str(base or facts.get("teacher") or "student")}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*TAGS, *(["flow-matching"] if is_flow else [])],
        language="en" if _is_sd1(facts) else None,
        inference=False,
        **fields,
    )


def _is_sd1(facts: Mapping[str, Any]) -> bool:
    """Whether the teacher is Stable Diffusion 1.x or made from it."""
    return facts.get("license") == OPENRAIL or facts.get("base_model") in STABLE_DIFFUSION_1


def _provenance_section(facts: Mapping[str, Any], history: RunHistory | None) -> str:
    cache = {"cache": history.cache_facts} if history and history.cache_facts else {}
    text = "\n".join(_fact_lines({**facts, **cache}))
    if not (history and history.settings):
        return text
    settings = yaml.safe_dump(dict(history.settings), sort_keys=False, allow_unicode=True, width=120)
    return f"{text}\n\n<details><summary>The run's settings</summary>\n\n```yaml\n{settings}```\n\n</details>"


def _fact_lines(facts: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each fact, nested ones by their path; of several in order by their number."""
    rows: list[str] = []
    for key, value in sorted(facts.items()):
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            rows += _fact_lines(value, f"{prefix}{key}.")
        else:
            rows.append(f"- {prefix}{key}: `{list(value) if isinstance(value, tuple) else value}`")
    return rows


def _licence_section(facts: Mapping[str, Any]) -> str:
    """The weights' licence is the teacher's, and that of what was put into it; never guessed."""
    parts = [_teacher_licence(facts)]
    if others := _added_parts(facts):
        parts.append(f"They also hold {' and '.join(others)}, whose licence is not known here: ask its authors first.")
    return "\n\n".join(parts)


def _added_parts(facts: Mapping[str, Any]) -> list[str]:
    """What was put into the teacher and has other authors."""
    mixed = [f"the fine-tune `{one['name']}`" for one in facts.get("mix", ())]
    loras = [f"the LoRA `{lora['name']}`" for lora in facts.get("loras", ())]
    parts = {"vae": "the autoencoder of", "parts": "parts of"}
    return mixed + loras + [f"{words} `{facts[key]['name']}`" for key, words in parts.items() if key in facts]


def _teacher_licence(facts: Mapping[str, Any]) -> str:
    teacher = facts.get("base_model") or facts.get("teacher") or "its teacher"
    if "license" not in facts:
        return f"The weights are under the licence of `{teacher}`, whose folder states none: ask its authors."
    name = facts.get("license_name", facts["license"])
    link = f" ({facts['license_link']})" if "license_link" in facts else ""
    text = f"The weights are made from `{teacher}` and are under its licence: `{name}`{link}."
    if facts["license"] != OPENRAIL:
        return text
    return (
        f"{text} That is the CreativeML Open RAIL-M: its use-based restrictions (attachment A) bind "
        "everybody who uses, changes or passes on these weights."
    )
