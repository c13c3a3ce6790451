"""Do a few photographs teach what the model never saw? `python -m benchmarks.photographs RUN`.

pairs  the colour-shape pairs that no sentence of the embedded world ever has, each a class with pictures of the world
       and sentences beside them. Its teacher generates most of them all the same, so `before` is not 0.
token  classic dreambooth: a word outside the model's training texts ("a zork") for one look (a large purple star on a
       green background), which the model cannot generate before; the scorer checks for that look.

Each is a run of its own in FOLDER (default RUN/photographs) from the distilled student of RUN, which resumes where it
stopped. Further options go to finetune-classes. Printed: the share of pictures that show every attribute of their
prompt, by the scorer, before and after, for sentences that no picture of the class has (or for the word itself), and
for held-out sentences of the world.
"""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import yaml
from PIL import Image

from benchmarks.classes import exam_options, options, prepare
from configs.load import load
from stages import finetune_classes
from stages.classes.exam import ALL_SHOWN, Exam
from stages.classes.selection import OUTSIDE_LABEL, outside_prompts
from stages.classes.specification import load_classes
from stages.evaluate.metrics import Scorer
from stages.nets.run_folder import load_run_teacher, load_student, open_run
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, derived_seed
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.tiny import score, world

MIN_LEARNT, MOST_LOST = 0.9, 0.02
WORD, LOOK = "a zork", "a large purple star on a green background"


@dataclass(frozen=True)
class Case:
    """Classes of photographs, and the prompts of their test."""

    training_prompts: Mapping[str, Sequence[Prompt]]
    """class -> a sentence of the world for each of its pictures"""
    captions: Mapping[str, str]
    """class -> the caption that replaces these sentences"""
    test_prompts: Mapping[str, Sequence[Prompt]]

    def scorer(self) -> Scorer:
        """The scorer of the world, with captions replaced by their sentences."""
        meant = {caption: self.training_prompts[name][0].text for name, caption in self.captions.items()}

        def score_meaning(texts: Sequence[str], pictures: torch.Tensor) -> Mapping[str, torch.Tensor]:
            return score.score([meant.get(text, text) for text in texts], pictures)

        return score_meaning


def sentences(colour: str, shape: str, rng: random.Random) -> Iterator[str]:
    """Endless sentences of the world about this pair."""
    grammar = world.world_grammar()
    while True:
        chosen = {phrase.name: rng.choice(phrase.words) for phrase in grammar.phrases}
        chosen |= {"colour": colour, "shape": shape}
        omitted = grammar.sample_omissions(rng)
        yield grammar.compose({name: word for name, word in chosen.items() if name not in omitted})


def pairs(pictures: int, tests: int) -> Case:
    """Every pair that the world never has."""
    training: dict[str, list[Prompt]] = {}
    test: dict[str, list[Prompt]] = {}
    for pair in world.world_grammar().never:
        colour, shape = pair["colour"], pair["shape"]
        name, rng = f"{shape}/{colour}", random.Random(derived_seed("photographs", colour, shape))
        texts = sentences(colour, shape, rng)
        training[name] = [Prompt(text, name, derived_seed(name, i)) for i, text in enumerate(islice(texts, pictures))]
        known = {prompt.text for prompt in training[name]}
        test[name] = list(islice((Prompt(text, name, 0) for text in texts if text not in known), tests))
    return Case(training, {}, test)


def token(pictures: int, tests: int) -> Case:
    """One look, named by a new word."""
    training = {WORD: [Prompt(LOOK, WORD, derived_seed("photographs", WORD, i)) for i in range(pictures)]}
    return Case(training, {WORD: WORD}, {WORD: [Prompt(WORD, WORD, 0)] * tests})


CASES = {"pairs": pairs, "token": token}


def write_photographs(case: Case, home: Path) -> Path:
    """Draw the pictures of a case with their captions, and write its class file."""
    classes = []
    for name, prompts in case.training_prompts.items():
        folder = home / "images" / name.replace("/", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        for number, prompt in enumerate(prompts):
            picture, _ = world.draw_scene(*world.sample_scene(prompt))
            Image.fromarray(picture).save(folder / f"{number:03d}.png")
            (folder / f"{number:03d}.txt").write_text(case.captions.get(name, prompt.text) + "\n")
        classes.append({"name": name, "images": str(folder.resolve()), "priority": "top"})
    file = home / "classes.yaml"
    atomic_write(file, yaml.safe_dump({"classes": classes}, sort_keys=False))
    return file


def measure(case: Case, home: Path, config: finetune_classes.Config) -> dict[str, dict[str, float]]:
    """Row -> before and after."""
    runs = {"before": open_run(home / "distill"), "after": open_run(home / "classes")}
    parts = load_run_teacher(runs["before"].origin, device_of(config.device), torch.float32)
    teacher = Teacher(parts, runs["before"].origin.tail)
    classes, count = load_classes(config.classes), config.exam.pictures
    rest = outside_prompts(config.prompts, config.seed, "validation", classes, count)
    exam = Exam(teacher, {**case.test_prompts, OUTSIDE_LABEL: rest}, case.scorer(), config.exam)
    results = {when: exam(load_student(run, parts)) for when, run in runs.items()}
    return {name: {when: results[when][name][ALL_SHOWN] for when in results} for name in exam.texts}


def report(results: Mapping[str, Mapping[str, float]]) -> str:
    """The table in Markdown, and whether it is as it should be."""
    lines = ["| all at once | before | after |", "|---|---|---|"]
    lines += [f"| {name} | {100 * one['before']:.1f} % | {100 * one['after']:.1f} % |" for name, one in results.items()]
    missed = [name for name, one in results.items() if name != OUTSIDE_LABEL and one["after"] < MIN_LEARNT]
    lost = results[OUTSIDE_LABEL]["before"] - results[OUTSIDE_LABEL]["after"]
    return "\n".join(
        [
            *lines,
            "",
            f"below {MIN_LEARNT:.0%} after: {', '.join(missed) or 'none'}",
            f"the rest lost {100 * lost:.1f} points of the {100 * MOST_LOST:.0f} that it may",
        ]
    )


def main() -> int:
    """Run every case, and print its table."""
    parser = options(__doc__)
    parser.add_argument("--only", choices=list(CASES), help="one of the cases")
    parser.add_argument("--photographs", type=int, default=20, help="pictures of each class")
    args, rest = parser.parse_known_args()
    for name in [args.only] if args.only else list(CASES):
        case, home = CASES[name](args.photographs, args.pictures), (args.folder or args.run / "photographs") / name
        prepare(home, args.run)
        overrides = ["--run", str(home), "--classes", str(write_photographs(case, home)), *exam_options(args), *rest]
        config = load(finetune_classes.Config, "finetune_classes", args.config, overrides)
        finetune_classes.run(config)
        print(f"\n{name}: {args.photographs} photographs a class, {args.pictures} test pictures, ", end="")
        print(f"{args.steps} steps, guidance {args.guidance}\n\n{report(measure(case, home, config))}")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
