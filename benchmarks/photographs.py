"""Do a few photographs teach what the model never saw? `python -m benchmarks.photographs RUN`.

pairs  the colour-shape pairs that no sentence of the embedded world ever has, each a class with pictures of the world
       and sentences beside them. Its teacher draws most of them all the same, so `before` is not 0.
token  classic dreambooth: one word that the model has never read ("a zork") for one look (a large purple star on a
       green background), which it cannot draw before; the judge looks for that look.

Each is a run of its own in FOLDER (default RUN/photographs) from the distilled student of RUN, which goes on where it
was left. Further options go to finetune-classes. Printed: the judge's share of pictures that show all that was said,
before and after, at sentences that no picture of the class has (or at the word itself), and at held-out sentences of
the world.
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
from stages.classes import OUTSIDE_LABEL, load_classes, outside_prompts
from stages.classes.exam import ALL_SHOWN, Exam
from stages.evaluate.metrics import Scorer
from stages.nets.saved import load_run_teacher, load_student, open_run
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, derived_seed
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.tiny import score, world

MIN_LEARNT, MOST_LOST = 0.9, 0.02
WORD, LOOK = "a zork", "a large purple star on a green background"


@dataclass(frozen=True)
class Case:
    """Classes of photographs, and what is asked of each."""

    training_prompts: Mapping[str, Sequence[Prompt]]
    """class -> what its pictures show: a sentence of the world each"""
    captions: Mapping[str, str]
    """class -> the caption in place of these sentences"""
    test_prompts: Mapping[str, Sequence[Prompt]]

    def scorer(self) -> Scorer:
        """The judge, who is told what a caption means."""
        meant = {caption: self.training_prompts[name][0].text for name, caption in self.captions.items()}

        def judged(texts: Sequence[str], pictures: torch.Tensor) -> Mapping[str, torch.Tensor]:
            return score.score([meant.get(text, text) for text in texts], pictures)

        return judged


def sentences(colour: str, shape: str, rng: random.Random) -> Iterator[str]:
    """Endless sentences of the world about this pair."""
    grammar = world.world_grammar()
    while True:
        chosen = {phrase.name: rng.choice(phrase.words) for phrase in grammar.phrases}
        chosen |= {"colour": colour, "shape": shape}
        unsaid = grammar.sample_omissions(rng)
        yield grammar.compose({name: word for name, word in chosen.items() if name not in unsaid})


def pairs(pictures: int, questions: int) -> Case:
    """Every pair that the world never shows."""
    shown: dict[str, list[Prompt]] = {}
    asked: dict[str, list[Prompt]] = {}
    for pair in world.world_grammar().never:
        colour, shape = pair["colour"], pair["shape"]
        name, rng = f"{shape}/{colour}", random.Random(derived_seed("photographs", colour, shape))
        said = sentences(colour, shape, rng)
        shown[name] = [Prompt(text, name, derived_seed(name, i)) for i, text in enumerate(islice(said, pictures))]
        known = {prompt.text for prompt in shown[name]}
        asked[name] = list(islice((Prompt(text, name, 0) for text in said if text not in known), questions))
    return Case(shown, {}, asked)


def token(pictures: int, questions: int) -> Case:
    """One look under a word of its own."""
    shown = {WORD: [Prompt(LOOK, WORD, derived_seed("photographs", WORD, i)) for i in range(pictures)]}
    return Case(shown, {WORD: WORD}, {WORD: [Prompt(WORD, WORD, 0)] * questions})


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
    found = {when: exam(load_student(run, parts)) for when, run in runs.items()}
    return {name: {when: found[when][name][ALL_SHOWN] for when in found} for name in exam.texts}


def report(found: Mapping[str, Mapping[str, float]]) -> str:
    """The table in Markdown, and whether it is as it should be."""
    lines = ["| all at once | before | after |", "|---|---|---|"]
    lines += [f"| {name} | {100 * one['before']:.1f} % | {100 * one['after']:.1f} % |" for name, one in found.items()]
    missed = [name for name, one in found.items() if name != OUTSIDE_LABEL and one["after"] < MIN_LEARNT]
    lost = found[OUTSIDE_LABEL]["before"] - found[OUTSIDE_LABEL]["after"]
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
    asked, rest = parser.parse_known_args()
    for name in [asked.only] if asked.only else list(CASES):
        case, home = CASES[name](asked.photographs, asked.pictures), (asked.folder or asked.run / "photographs") / name
        prepare(home, asked.run)
        words = ["--run", str(home), "--classes", str(write_photographs(case, home)), *exam_options(asked), *rest]
        config = load(finetune_classes.Config, "finetune_classes", asked.config, words)
        finetune_classes.run(config)
        print(f"\n{name}: {asked.photographs} photographs a class, {asked.pictures} pictures asked, ", end="")
        print(f"{asked.steps} steps, guidance {asked.guidance}\n\n{report(measure(case, home, config))}")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
