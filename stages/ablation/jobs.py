"""The runs of a study: what each trains, where it lies, and what its weights and figures depend on."""

import hashlib
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from configs.values import Strict
from stages import distill, finetune_classes
from stages.ablation.study import DefectName, ModelName
from stages.david.fusion import PLACEBOS
from stages.evaluate.settings import Config as EvaluateConfig
from stages.nets.run_folder import ORIGIN_FILE
from stages.scale.fleet import FleetOptions
from stages.system.refusal import Refused, in_one_line
from stages.train.checkpoint_store import identity_differences

JOB_FILE, MEASURED_FILE, LOG_FILE = "job.json", "measured.json", "log.txt"
HASH_CHARACTERS = 16
PLACE_KEYS = {"run", "device", *FleetOptions.model_fields}
"""Settings that say where a run happens, or print its plan, not what it is."""
MEMORY_KEYS = {"train": {"shard_moments"}}
EXCLUDED: dict[str, Any] = {**dict.fromkeys(PLACE_KEYS, True), **MEMORY_KEYS, "fast": MEMORY_KEYS}
"""With what only divides the memory among processes, and changes no bit of the weights."""
SHOWN_DIFFERENCES, SHOWN_CHARACTERS = 3, 12


class BaseJob(Strict):
    """What the runs of all commands have."""

    study: str
    regime: str
    arm: str
    seed: int
    home: Path
    """holds the run's folder, links to what all runs share, and this job"""
    references: Path
    """where what runs share of the teacher's pictures is kept"""
    inputs: dict[str, str] = Field(default_factory=dict)
    """what it is trained on beside its settings -> its hash; empty while that is not there, and in jobs of before"""
    prompts: str = ""
    """the hash of the list of prompts of its pictures, likewise; another list means another measurement"""

    linked: ClassVar[tuple[str, ...]] = ("cache", "cache.yaml")
    """what of the run folder of the cache lies in `home` as a link"""

    @property
    def label(self) -> str:
        """For lines of progress."""
        return f"{self.study}/{self.regime}/{self.arm} seed {self.seed}"

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return True

    @property
    def read(self) -> dict[str, str]:
        """Everything that its figures come from beside its settings -> its hash; empty while that is not there."""
        return {**self.inputs, **({"list of prompts": self.prompts} if self.prompts else {})}

    @property
    @abstractmethod
    def run_folder(self) -> Path:
        """The ordinary folder of the trained student."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """The budget of its training."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What its weights depend on, and its curves, as JSON values."""

    @abstractmethod
    def settings_hash(self) -> str:
        """Of all settings that runs of this arm share whatever their seed, those of the measurement too."""

    def refuse_other_run(self) -> None:
        """Raise `Refused` where its folder holds a run with other settings."""
        file = self.home / JOB_FILE
        if not file.is_file():
            return
        try:
            earlier = read_job(file)
        except (OSError, ValidationError) as error:
            raise Refused(
                f"{file}: cannot be read ({in_one_line(error, 80)}) - choose another --out, or remove {self.home}"
            ) from error
        then = earlier.identity()
        if changed := identity_differences(then, json.loads(json.dumps(self.identity()))):
            more = f"; and {len(changed) - SHOWN_DIFFERENCES} more" if len(changed) > SHOWN_DIFFERENCES else ""
            raise Refused(
                f"{self.home}: holds a run with other settings ({'; '.join(changed[:SHOWN_DIFFERENCES])}{more}) - "
                "choose another --out, give the study another name, or remove that folder"
            )
        inputs = earlier.inputs or self._inputs_of_origin()
        for name, now in self.inputs.items():
            if inputs.get(name, now) != now:
                raise Refused(
                    f"{self.home}: holds a run with another {name} ({inputs[name][:SHOWN_CHARACTERS]}, now "
                    f"{now[:SHOWN_CHARACTERS]}) - choose another --out, or remove that folder"
                )

    def _inputs_of_origin(self) -> dict[str, str]:
        """What a run of before, whose job names no inputs, read as far as its student's origin says."""
        try:
            recipe = json.loads((self.run_folder / ORIGIN_FILE).read_text(encoding="utf-8"))["recipe_sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {"cache": recipe} if recipe and isinstance(recipe, str) else {}


class DistillJob(BaseJob):
    """A student that is distilled and measured, or the teacher that is measured."""

    distill: distill.Config
    evaluate: EvaluateConfig
    guidance: tuple[float, ...]
    defects: tuple[DefectName, ...] = ()
    model: ModelName = "student"

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.model == "student"

    @property
    def run_folder(self) -> Path:
        """The ordinary run folder of the student."""
        return self.home / "distill"

    @property
    def samples(self) -> int:
        """The budget of its training."""
        return self.distill.train.max_samples if self.trains else 0

    def identity(self) -> dict[str, Any]:
        """What its weights depend on, and its curves, as JSON values."""
        if not self.trains:
            return {"model": self.model}
        return {"distill": self.distill.model_dump(mode="json", exclude=EXCLUDED), "defects": list(self.defects)}

    def settings_hash(self) -> str:
        """Of all settings that runs of this arm share whatever their seed, those of the measurement too."""
        identity = self.identity()
        if self.trains:
            del identity["distill"]["train"]["seed"]
            if self.distill.david.fusion.formula in PLACEBOS:
                del identity["distill"]["david"]["fusion"]["placebo_seed"]
        return hash_of({**identity, "evaluate": self.evaluation_settings()})

    def evaluation_settings(self) -> dict[str, Any]:
        """What its figures depend on beyond its weights, as JSON values."""
        settings = self.evaluate.model_dump(mode="json", include={"prompts", "seed", "scorer", "velocity_states"})
        paired = self.evaluate.paired.model_dump(
            mode="json", include={"prompts", "steps", "reference_steps", "sampler"}
        )
        return {**settings, "paired": paired, "guidance": list(self.guidance)}


class ClassesJob(BaseJob):
    """A distilled student that is trained on classes and measured by its exam."""

    finetune_classes: finetune_classes.Config
    class_file: str
    """sha256 of the class file's content, as it was when the run was planned"""

    linked: ClassVar[tuple[str, ...]] = (*BaseJob.linked, "distill")

    @property
    def run_folder(self) -> Path:
        """The ordinary folder of the student."""
        return self.home / "classes"

    @property
    def samples(self) -> int:
        """The budget of its training."""
        return self.finetune_classes.train.max_samples

    def identity(self) -> dict[str, Any]:
        """What its weights depend on, and its figures, as JSON values; of the class file what it holds."""
        settings = self.finetune_classes.model_dump(mode="json", exclude={**EXCLUDED, "classes": True})
        return {"finetune_classes": settings, "class_file": self.class_file}

    def settings_hash(self) -> str:
        """Of all settings that runs of this arm share whatever their seed."""
        identity = self.identity()
        del identity["finetune_classes"]["train"]["seed"]
        if identity["finetune_classes"]["lora"]:
            del identity["finetune_classes"]["lora"]["seed"]
        return hash_of(identity)


Job: TypeAlias = DistillJob | ClassesJob
_JOB: TypeAdapter[Job] = TypeAdapter(Job)


def read_job(file: Path) -> Job:
    """The job of a file; raises `OSError` or pydantic's `ValidationError` where it holds none."""
    return _JOB.validate_json(file.read_bytes())


def hash_of(content: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:HASH_CHARACTERS]
