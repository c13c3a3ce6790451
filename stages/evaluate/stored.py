"""What an evaluation sampled, stored in the run's folder: it goes on where it was ended, and a second one samples none.

A file holds the latents of one batch, under a digest of all that decides them; it may be removed at any time.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, cat

from stages.evaluate.paired import PairedInputs
from stages.nets.run_folder import BASE_FILE, Origin, SavedRun
from stages.sampling.fields import TwoBranchField
from stages.sampling.sampler import Sampler
from stages.sampling.single_file import BATCH_SIZE, decode_pictures, generate_latents
from stages.system.atomic import PARTIAL_SUFFIX, atomic_path, is_abandoned
from stages.system.disk import file_sha256

STORE_FOLDER = "evaluation"
VERSION = 1
"""Raised where the program samples otherwise than before."""
KEY, VALUE = "key", "value"


@dataclass(frozen=True)
class SampleStore:
    """Tensors by what decides them, each in a file of its own."""

    folder: Path

    def get(self, key: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """The tensor of a key on the CPU, made now or before; a file that is damaged is made again."""
        text = json.dumps({"version": VERSION, **key}, sort_keys=True)
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        if (stored := _read(file, text)) is not None:
            return stored
        made = make().detach().cpu().contiguous()
        with atomic_path(file) as temporary:
            save_file({VALUE: made}, temporary, {KEY: text})
        return made

    def remove_abandoned(self) -> None:
        """Remove what ended processes left half written."""
        for path in self.folder.glob(f".*{PARTIAL_SUFFIX}"):
            if is_abandoned(path):
                path.unlink(missing_ok=True)


def _read(file: Path, key: str) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get(KEY) != key:
                return None
            value: Tensor = opened.get_tensor(VALUE)
            return value
    except (SafetensorError, OSError, ValueError):
        return None


@dataclass(frozen=True)
class StoredInputs(PairedInputs):
    """Prompts and noises whose latents are stored, of fields that state their identity."""

    texts: Sequence[str]
    store: SampleStore

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.cond) == len(self.noise)

    def rows(self, rows: slice) -> "StoredInputs":
        """Some of the rows."""
        return StoredInputs(self.cond[rows], self.uncond, self.noise[rows], self.texts[rows], self.store)

    def with_cond(self, cond: Float[Tensor, "b l d"]) -> PairedInputs:
        """The same noises with other prompts, whose texts are unknown: not stored."""
        return PairedInputs(cond, self.uncond, self.noise)

    def with_neighbours_prompts(self) -> "StoredInputs":
        """Each noise with the prompt of the row before it."""
        texts = [*self.texts[-1:], *self.texts[:-1]]
        return StoredInputs(self.cond.roll(1, 0), self.uncond, self.noise, texts, self.store)

    def sample(self, field: TwoBranchField, sampler: Sampler) -> Float[Tensor, "b c h w"]:
        """The field's latents, batch by batch, each sampled now or before."""
        if field.identity is None:
            return super().sample(field, sampler)
        return self.stored("latents", field, sampler, lambda part: part.sample(field, sampler))

    def stored(
        self,
        quantity: str,
        field: TwoBranchField,
        sampler: Sampler,
        measure: Callable[[PairedInputs], Float[Tensor, "b ..."]],
    ) -> Float[Tensor, "b ..."]:
        """A quantity of each row, which `measure` computes of a batch by sampling the field."""
        settings = sampler.model_dump(mode="json", exclude={"batch_size"})
        key = {
            "quantity": quantity,
            "model": field.identity,
            "sampler": {**settings, "steps": sampler.steps_for(field)},
        }
        parts = []
        for first in range(0, len(self.noise), sampler.batch_size):
            part = self.rows(slice(first, first + sampler.batch_size))
            of_part = {**key, "texts": list(part.texts), "noise": tensor_sha256(part.noise)}
            plain = PairedInputs(part.cond, part.uncond, part.noise)
            parts.append(self.store.get(of_part, partial(measure, plain)))
        return cat(parts).to(self.noise.device)


def stored_pictures(
    store: SampleStore,
    model: Mapping[str, Any],
    pipeline: StableDiffusionPipeline,
    texts: Sequence[str],
    noise: Float[Tensor, "b c h w"],
    steps: int,
    guidance: float,
) -> Float[Tensor, "b 3 H W"]:
    """`generate_pictures` with the latents of each batch sampled now or before; `model` is what decides them."""
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    key = {
        "model": model,
        "scheduler": [type(pipeline.scheduler).__name__, json.loads(json.dumps(scheduler, default=str))],
    }
    pictures = []
    for first in range(0, len(texts), BATCH_SIZE):
        rows = slice(first, first + BATCH_SIZE)
        of_part = {
            **key,
            "texts": list(texts[rows]),
            "noise": tensor_sha256(noise[rows]),
            "steps": steps,
            "guidance": guidance,
        }
        sample = partial(generate_latents, pipeline, texts[rows], noise[rows], steps, guidance)
        pictures.append(decode_pictures(pipeline, store.get(of_part, sample)))
    return cat(pictures)


def teacher_identity(origin: Origin) -> dict[str, Any]:
    """What decides a teacher's answers."""
    return {"teacher": dict(origin.teacher_sha256), "tail": origin.tail}


def student_identity(run: SavedRun) -> dict[str, Any]:
    """What decides the answers of a run's student, whose prompts its teacher's text encoder reads."""
    origin, base = run.origin, run.folder / BASE_FILE
    beside = {"base": file_sha256(base), "lora": dict(origin.lora)} if origin.lora is not None else {}
    return {
        **teacher_identity(origin),
        "weights": file_sha256(run.weights),
        "target": origin.target,
        "windows": origin.windows,
        "guidance_range": origin.guidance_range,
        **beside,
    }


def folder_identity(folder: Path) -> dict[str, str]:
    """sha256 of every file of an exported model that may decide its pictures."""
    files = sorted(path for path in folder.glob("*/*") if path.suffix in (".json", ".safetensors", ".txt"))
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def tensor_sha256(value: Tensor) -> str:
    """sha256 of a tensor's values in fp32, with its shape."""
    content = value.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()
