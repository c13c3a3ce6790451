"""Which lines are drawn of runs: errors over training, by time and by class, and the weight of each block."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from stages.report.charts import Chart, Point, Series
from stages.report.intervals import Group, mean_series
from stages.report.records import ByTime, RunRecord, ValidationLine

SAMPLES = "training samples"
TIME = "time s: 0 is the picture, 1 is noise"
MAX_MIDDLE_LINES = 3
"""Earlier checkpoints in a chart of errors by time."""

Pick = Callable[[RunRecord], Sequence[Point]]


def validation_points(name: str) -> Pick:
    """A measurement at each checkpoint."""
    return lambda run: [(float(line.samples), getattr(line, name)) for line in run.validations]


def step_points(name: str) -> Pick:
    """A mean of each journal line."""
    return lambda run: [(float(line.samples), getattr(line, name)) for line in run.steps]


def learning_charts(groups: Sequence[Group]) -> list[Chart]:
    """What is measured over training: on data that the student never saw, and on what it trains on."""
    texts = {
        "held_out": (
            "Error on held-out data",
            validation_points("held_out"),
            "How far the student's prediction is from its teacher's on data kept out of training: "
            "0 is the same, 1 is as bad as predicting nothing. It should fall.",
        ),
        "end": (
            "Error of the finished picture, few steps",
            validation_points("end"),
            "All steps from the same noise: how far the student's picture is from the one that its teacher's path "
            "ends at. 0 is the same picture.",
        ),
        "flow": (
            "Training loss of the velocity",
            step_points("flow"),
            "The part of the loss that makes pictures, on the data being trained on. It is noisy; the trend counts.",
        ),
    }
    charts = []
    for key, (title, pick, text) in texts.items():
        label = "mean squared error" if key == "flow" else "relative squared error"
        charts.append(Chart(f"learn-{key}", title, SAMPLES, label, text, list(_group_series(groups, pick))))
    return [chart for chart in charts if chart.lines]


def _group_series(groups: Sequence[Group], pick: Pick) -> Iterable[Series]:
    for group in groups:
        lines = [points for points in map(pick, group.runs) if any(y is not None for _, y in points)]
        if len(lines) > 1:
            yield mean_series(group.name, lines)
        many = len(lines) > 1
        for run in group.runs:
            yield Series(run.name, pick(run), is_faint=many)


def loss_chart(run: RunRecord, key: str) -> Chart:
    """The parts of one run's loss."""
    names = {"loss": "all", "flow": "velocity", "guidance": "guidance", "block_term": "blocks"}
    series = [Series(label, step_points(name)(run)) for name, label in names.items()]
    series = [one for one in series if any(y for _, y in one.points)]
    return Chart(key, f"Parts of the loss: {run.name}", SAMPLES, "loss", "Each part before its weight.", series)


def lambda_chart(run: RunRecord, key: str) -> Chart:
    """The weight of each block over training."""
    return Chart(
        key,
        f"Weight of each block: {run.name}",
        SAMPLES,
        "lambda",
        "How strongly the inside of each part of the network is held to the teacher's. down_0 is nearest to the "
        "picture on the way in, mid is the middle, up_3 is nearest on the way out.",
        _by_name((line.samples, line.lambdas) for line in run.steps),
        may_be_logarithmic=False,
    )


def block_chart(run: RunRecord, key: str) -> Chart:
    """The error of each block over training."""
    points = _by_name((line.samples, line.blocks) for line in run.steps)
    text = "How far the inside of each part of the network is from the teacher's, before its weight."
    return Chart(key, f"Error of each block: {run.name}", SAMPLES, "block error", text, points)


def class_chart(run: RunRecord, quantity: str, key: str) -> Chart:
    """A measurement of each class at the checkpoints."""
    titles = {
        "all": ("Right pictures", "share of pictures", "Pictures that show what their text says; higher is better."),
        "paired_error": ("Error against the teacher", "relative squared error", "0 is the teacher's own picture."),
    }  # fmt: skip
    title, label, text = titles[quantity]
    lines = _by_name((line.samples, getattr(line, quantity)) for line in run.exams)
    return Chart(key, f"{title} by class: {run.name}", SAMPLES, label, text, lines, may_be_logarithmic=False)


def class_flow_chart(run: RunRecord, key: str) -> Chart:
    """The training loss of each class."""
    lines = _by_name((line.samples, line.flow_by_class) for line in run.steps)
    text = "The velocity's error on the training data of each class."
    return Chart(key, f"Training error by class: {run.name}", SAMPLES, "mean squared error", text, lines)


def time_chart(run: RunRecord, key: str) -> Chart:
    """The error by time at the last checkpoint, on held-out and on seen data, and held-out at earlier ones."""
    if not run.validations:
        return Chart(key, "", TIME, "", "")
    last = run.validations[-1]
    series = [
        Series(f"held-out, after {last.samples:,}", _bins(last.held_out_by_s)),
        Series("seen in training", _bins(last.seen_by_s)),
        Series("seen, with new noise", _bins(last.seen_new_noise_by_s)),
        *(Series(f"held-out, after {line.samples:,}", _bins(line.held_out_by_s), is_faint=True)
          for line in _earlier(run.validations)),
    ]  # fmt: skip
    text = "The same error, split by how much noise the student sees. A gap between held-out and seen is memorising."
    return Chart(key, f"Error by time: {run.name}", TIME, "relative squared error", text, series, x_limits=(0.0, 1.0))


def step_chart(run: RunRecord, key: str) -> Chart:
    """The training error by time, first, middle and last line of the journal."""
    if not run.steps:
        return Chart(key, "", TIME, "", "")
    numbers = sorted({0, len(run.steps) // 2, len(run.steps) - 1})
    lines = [run.steps[number] for number in numbers]
    series = [Series(f"after {line.samples:,}", _bins(line.flow_by_s)) for line in lines]
    text = "Where along the way from noise to picture the training error is, at the start, in the middle and now."
    return Chart(
        key, f"Training error by time: {run.name}", TIME, "mean squared error", text, series, x_limits=(0.0, 1.0)
    )


def _bins(values: ByTime) -> list[Point]:
    return [((number + 0.5) / len(values), value) for number, value in enumerate(values)]


def _earlier(lines: Sequence[ValidationLine]) -> list[ValidationLine]:
    """A few of the lines before the last, evenly."""
    before = lines[:-1]
    step = max(1, -(-len(before) // MAX_MIDDLE_LINES))
    return list(before[::step])


def _by_name(rows: Iterable[tuple[int, Mapping[str, float | None]]]) -> list[Series]:
    """One line for each name, in the order in which they come."""
    lines: dict[str, list[Point]] = {}
    for samples, values in rows:
        for name, value in values.items():
            lines.setdefault(name, []).append((float(samples), value))
    return [Series(name, points) for name, points in lines.items()]
