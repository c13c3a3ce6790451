"""The model card: what the folder is, how to run it, what it was made from."""

from collections.abc import Mapping
from typing import Any

import yaml

TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "sollune"]

FLOW = """A Stable Diffusion 1.x model that answers with the **velocity** of the straight path
`x_s = (1 - s) x0 + s eps`, `v = eps - x0`, told the time `1000 s`. It was distilled by sollune from a cache of its
teacher's own answers."""
KEEP_FLOW = """Keep the scheduler that lies here: UniPC with `use_flow_sigmas` and `prediction_type: flow_prediction`
(`DPMSolverMultistepScheduler` with the same two settings works as well). A scheduler for noise prediction makes noise
of it. The latents are scaled as the teacher's are."""
VP = """A Stable Diffusion 1.x model that answers with **v-prediction** on its teacher's own noise schedule. It was
distilled by sollune from a cache of its teacher's own answers."""
KEEP_VP = """Keep the scheduler that lies here, or any other with `prediction_type: v_prediction` and the same betas.
The latents are scaled as the teacher's are."""

TEXT = """# {title}

{what}

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("THIS FOLDER")
picture = pipeline("a sentence", num_inference_steps=25, guidance_scale=5.0).images[0]
```

{keep}

## Facts

{facts}
"""


def card(facts: Mapping[str, Any]) -> str:
    """README.md with the head that model hubs read; `facts` may name `title`, `license` and `base_model` (a hub id)."""
    flows = facts.get("prediction") != "v_prediction"
    head = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*TAGS, "flow-matching"] if flows else TAGS,
        **{key: facts[key] for key in ("license", "base_model") if key in facts},
    }
    if "base_model" in head:
        head["base_model_relation"] = "finetune"
    what, keep, title = (FLOW, KEEP_FLOW, "A velocity model") if flows else (VP, KEEP_VP, "A v-predicting model")
    rows = "\n".join(_rows(facts))
    body = TEXT.format(title=facts.get("title", f"{title} (sollune)"), what=what, keep=keep, facts=rows)
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{body}"


def _rows(facts: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each fact, nested ones by their path."""
    rows: list[str] = []
    for key, value in sorted(facts.items()):
        inner = isinstance(value, Mapping)
        rows += _rows(value, f"{prefix}{key}.") if inner else [f"- {prefix}{key}: `{value}`"]
    return rows
