"""The runs of a study: one job for each regime, arm and seed, with all of its settings, checked before any begins."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.load import load
from configs.schema import Layer
from configs.values import Strict
from stages import cache_teacher, distill
from stages.ablation.study import Arm, DefectName, ModelName, Settings, Study
from stages.evaluate.settings import Config as EvaluateConfig
from stages.system.refusal import Refused, in_one_line
from stages.train.checkpoint_store import identity_differences

JOB_FILE, MEASURED_FILE, LOG_FILE = "job.json", "measured.json", "log.txt"
HASH_CHARACTERS = 16
PLACE_KEYS = {"run", "device"}
"""Settings that say where a run happens, not what it is."""
SHOWN_DIFFERENCES = 3


class Job(Strict):
    """One run: a student that is trained and measured, or the teacher that is measured."""

    study: str
    regime: str
    arm: str
    seed: int
    home: Path
    """holds the run folder `distill`, a link to the cache, and this job"""
    distill: distill.Config
    evaluate: EvaluateConfig
    guidance: tuple[float, ...]
    defects: tuple[DefectName, ...] = ()
    model: ModelName = "student"
    references: Path
    """where what all runs share of the teacher's pictures is kept"""

    @property
    def label(self) -> str:
        """For lines of progress."""
        return f"{self.study}/{self.regime}/{self.arm} seed {self.seed}"

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.model == "student"

    @property
    def run_folder(self) -> Path:
        """The ordinary run folder of the student."""
        return self.home / "distill"

    def identity(self) -> dict[str, Any]:
        """What its weights depend on, and its curves, as JSON values."""
        if not self.trains:
            return {"model": self.model}
        return {"distill": self.distill.model_dump(mode="json", exclude=PLACE_KEYS), "defects": list(self.defects)}

    def settings_hash(self) -> str:
        """Of all settings that runs of this arm share whatever their seed, those of the measurement too."""
        identity = self.identity()
        if self.trains:
            del identity["distill"]["train"]["seed"]
        return hash_of({**identity, "evaluate": self.evaluation_settings()})

    def evaluation_settings(self) -> dict[str, Any]:
        """What its figures depend on beyond its weights, as JSON values."""
        settings = self.evaluate.model_dump(mode="json", include={"prompts", "seed", "scorer", "velocity_states"})
        paired = self.evaluate.paired.model_dump(
            mode="json", include={"prompts", "steps", "reference_steps", "sampler"}
        )
        return {**settings, "paired": paired, "guidance": list(self.guidance)}

    def refuse_other_run(self) -> None:
        """Raise `Refused` where its folder holds a run with other settings."""
        file = self.home / JOB_FILE
        if not file.is_file():
            return
        try:
            then = Job.model_validate_json(file.read_bytes()).identity()
        except (OSError, ValidationError) as error:
            raise Refused(
                f"{file}: cannot be read ({in_one_line(error, 80)}) - choose another --out, or remove {self.home}"
            ) from error
        if changed := identity_differences(then, json.loads(json.dumps(self.identity()))):
            more = f"; and {len(changed) - SHOWN_DIFFERENCES} more" if len(changed) > SHOWN_DIFFERENCES else ""
            raise Refused(
                f"{self.home}: holds a run with other settings ({'; '.join(changed[:SHOWN_DIFFERENCES])}{more}) - "
                "choose another --out, give the study another name, or remove that folder"
            )


@dataclass(frozen=True)
class Plan:
    """The runs of a study, and the settings of the cache that they share."""

    study: Study
    jobs: Sequence[Job]
    cache: cache_teacher.Config


def make_plan(study: Study, file: Path, run: Path, out: Path, device: str) -> Plan:
    """All jobs, seed by seed, so that early results are of all arms; raises `Refused` for settings that are wrong.

    `file` is the study's, for messages; RUN/cache is the cache, the runs lie in `out`.
    """
    cache = load(cache_teacher.Config, "cache_teacher", study.files, ["--run", str(run), "--device", device])
    overlay = [Layer(f"{file}: evaluate", study.evaluate)]
    evaluate = load(EvaluateConfig, "evaluate", study.files, ["--run", str(run), "--device", device], overlays=overlay)
    evaluate = evaluate.model_copy(update={"prompts": evaluate.prompts or cache.prompts})
    configs = {
        (regime, name): distill_config(study, file, regime, name, device)
        for regime in study.regimes
        for name in study.arms
        if regime in study.regimes_of(name)
    }
    jobs = []
    for seed in range(max(map(study.seeds_of, study.arms))):
        for (regime, name), config in configs.items():
            if seed >= study.seeds_of(name):
                continue
            arm, home = study.arms[name], out / study.name / regime / name / f"seed{seed}"
            train = config.train.model_copy(update={"seed": seed + arm.seed_offset})
            jobs.append(
                Job(
                    study=study.name,
                    regime=regime,
                    arm=name,
                    seed=seed,
                    home=home,
                    distill=config.model_copy(update={"run": home, "train": train}),
                    evaluate=evaluate,
                    guidance=study.guidance or (evaluate.paired.sampler.guidance,),
                    defects=arm.defects,
                    model=arm.model,
                    references=out / "references",
                )
            )
    return Plan(study, jobs, cache)


def distill_config(study: Study, file: Path, regime: str, name: str, device: str) -> distill.Config:
    """The settings of an arm in a regime: files, then the study's options, the regime's, the arm's, then the budget.

    Its run folder and seed are no one's yet.
    """
    arm: Arm = study.arms[name]
    overlays = [
        Layer(f"{file}: options", underscored(study.options)),
        Layer(f"{file}: regimes.{regime}.options", underscored(study.regimes[regime].options)),
        Layer(f"{file}: arms.{name}.options", underscored(arm.options)),
    ]
    words = ["--run", study.name, "--device", device]
    if study.samples is not None:
        words += ["--train.max-samples", str(study.samples)]
    try:
        return load(distill.Config, "distill", [*study.files, *arm.files], words, overlays=overlays)
    except Refused as refusal:
        first, *_ = str(refusal).split("\n")
        where = "" if first.startswith(str(file)) else f"{file}: arm {name}, regime {regime}: "
        raise Refused(f"{where}{first}") from refusal


def underscored(options: Settings) -> Settings:
    """The same with underscores for the dashes of options in its keys."""
    return {
        key.replace("-", "_"): underscored(value) if isinstance(value, dict) else value
        for key, value in options.items()
    }


def hash_of(content: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:HASH_CHARACTERS]
