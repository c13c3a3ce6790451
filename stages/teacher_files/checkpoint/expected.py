"""Which tensors, of which shapes, the configs of a diffusers folder ask for."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from stages.system.refusal import Refused, in_one_line
from stages.teacher_files.folder import read_json

CLASS_LIBRARIES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
}
TEXT_PREFIX = "text_model."
"""Of the text encoder's tensors in stored files; transformers >= 5.6 names them without it."""


def expected_shapes(folder: Path, component: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a component by the names of stored files; raises `Refused` for a config that makes no model."""
    config = folder / component / "config.json"
    shapes = _shapes(config, config.stat().st_mtime_ns, component)
    return dict(shapes)


@lru_cache(maxsize=16)
def _shapes(config: Path, _mtime_ns: int, component: str) -> dict[str, tuple[int, ...]]:
    import diffusers  # the libraries' own classes say best what they will ask for; they take seconds to import
    import transformers

    settings, libraries = read_json(config), {"diffusers": diffusers, "transformers": transformers}
    library, name = CLASS_LIBRARIES[component]
    model_class: Any = getattr(libraries[library], name)
    try:
        with torch.device("meta"):
            if library == "diffusers":
                module = model_class.from_config(settings)
            else:
                module = model_class(transformers.CLIPTextConfig.from_dict(settings))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # configs can be broken in any way, and libraries raise anything at them
        raise Refused(
            f"teacher: {config}: makes no model ({in_one_line(error)}) - take the config that belongs to the weights"
        ) from error
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if component != "text_encoder":
        return shapes
    return {TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): shape for name, shape in shapes.items()}
