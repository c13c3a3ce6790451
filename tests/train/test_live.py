import io

from rich.console import Console

from stages.train.live import Dashboard, LogDisplay, RemainingTime, make_display, sparkline

LINE = {
    "samples": 640,
    "loss": 1.25,
    "flow": 0.75,
    "guidance": 0.5,
    "block_term": 2.5,
    "blocks": {"mid": 0.125, "up_3": 7.5},
    "lambdas": {"mid": 1.25, "up_3": 0.0},
    "flow_by_s": [0.1, None, 0.8],
    "guidance_by_s": [0.0, None, 0.4],
    "blocks_by_s": [1.0, None, 2.0],
    "effective_size": 0.875,
    "learning_rate": 1e-4,
    "grad_norm": 3.5,
    "samples_per_second": 121.25,
    "window_seconds": 5.0,
    "data_wait_seconds": 0.05,
    "bookkeeping_seconds": 0.01,
    "memory_gib": 1.5,
    "update_ratio": {"mid": 5e-4, "rest": 1e-4},
}
METRICS = {
    "held_out": 0.0345,
    "held_out_by_s": [0.1, 0.2],
    "seen": 0.03,
    "seen_by_s": [0.1, None],
    "seen_new_noise": 0.031,
    "seen_new_noise_by_s": [0.1, None],
    "cache_gap": 0.001,
}


def terminal() -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=110, height=50, color_system=None, legacy_windows=False
    )


def log() -> Console:
    return Console(file=io.StringIO(), width=80)


def output_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def render_all(console: Console) -> str:
    """The text of a dashboard with every kind of content."""
    dashboard = Dashboard("runs/[tiny]/distill", 0, 44800, console)
    dashboard.show_progress(640)
    dashboard.show_line({**LINE, "samples": 320, "flow": 1.5}, ())
    dashboard.show_line(LINE, ["upload: no route to host"])
    dashboard.show_event(640, "validation", METRICS)
    dashboard.show_warning(700, "step skipped: a gradient was not finite")
    text = "".join(segment.text for segment in console.render(dashboard.render(), console.options))
    dashboard.close()
    return text


def test_the_dashboard_shows_progress_losses_and_warnings():
    text = render_all(terminal())
    for part in (
        "runs/[tiny]/distill",
        "640 of 44,800 samples",
        "121.2 samples/s",
        "loss 1.25",
        "flow 0.75",
        "data wait 1.0%",
        "bookkeeping 0.2%",
        "memory 1.50 GiB",
        "validation after 640",
        "+0.0010",
        "! upload: no route to host",
        "! after 700: step skipped",
        "█▅",  # flow, line by line
    ):
        assert part in text, part


def test_the_dashboard_has_a_row_for_each_block_and_a_sparkline_for_each_part_of_the_loss():
    lines = [line.split() for line in render_all(terminal()).splitlines()]
    assert any(words[1:5] == ["mid", "0.125", "1.250", "5.0e-04"] for words in lines)
    assert any(words[1:4] == ["up_3", "7.5", "0.000"] for words in lines)
    assert any(words[1:3] == ["rest", "1.0e-04"] for words in lines)
    flow = next(words for words in lines if "flow" in words and "0.8" in words)
    assert any(words[1:5] == ["held", "out", "0.0345", "▅█"] for words in lines)
    assert flow[-4:-1] == ["▂", "█", "0.8"]


def test_the_dashboard_fits_a_narrow_terminal_and_one_with_ascii_only():
    narrow = Console(file=io.StringIO(), force_terminal=True, width=60, height=40, color_system=None)
    assert max(map(len, render_all(narrow).splitlines())) <= 60
    plain = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), force_terminal=True, width=110, height=50)
    dashboard = Dashboard("runs/tiny", 0, 10, plain)
    dashboard.show_line(LINE, ())
    dashboard.close()
    plain.file.flush()


def test_a_log_gets_one_line_of_names_and_numbers_for_each_line_of_the_journal():
    console = log()
    lines = LogDisplay(0, 44800, console)
    lines.show_progress(640)
    assert output_of(console) == ""
    lines.show_line(LINE, ["upload: [red] no route"])
    lines.show_event(640, "validation", METRICS)
    train, warning, validation = output_of(console).splitlines()
    assert train.startswith("train samples=640 of=44800 loss=1.25 flow=0.75 guidance=0.5 block_term=2.5 grad_norm=3.5 ")
    assert " lr=0.0001 rate=121.2/s wait=1.0% memory=1.50GiB left=" in train
    assert warning == "warning samples=640 upload: [red] no route"
    assert validation == "validation samples=640 held_out=0.0345 seen=0.03 seen_new_noise=0.031 cache_gap=0.001"


def test_skipped_steps_and_spikes_are_shown_where_there_are_any():
    for skipped, spikes in ((0, 0), (2, 1)):
        console = log()
        LogDisplay(0, 44800, console).show_line({**LINE, "skipped": skipped, "spikes": spikes}, ())
        assert ("skipped=2 spikes=1" in output_of(console)) == (skipped > 0)


def test_without_a_terminal_the_display_is_lines(capsys):
    assert isinstance(make_display("runs/tiny", 0, 10), LogDisplay)


def test_a_sparkline_is_as_high_as_its_values_and_blank_where_there_is_none():
    assert sparkline([0.0, None, 0.5, 1.0]) == "▁ ▅█"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([None]) == " "
    assert sparkline([]) == ""


def test_the_time_left_follows_from_the_pace_of_this_process(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = RemainingTime(1000, 3000)
    assert clock.format(1000) == "?"
    now[0] = 110.0
    assert clock.format(1500) == "0:00:30"
    assert clock.format(3001) == "0:00:00"  # the last batch is whole


def test_the_dashboard_is_refreshed_every_other_second_at_most(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    dashboard = Dashboard("runs/tiny", 0, 100, terminal())
    refreshed = []
    monkeypatch.setattr(dashboard, "_refresh", lambda: refreshed.append(dashboard.samples))
    for samples in range(1, 11):
        now[0] += 0.5
        dashboard.show_progress(samples)
        if refreshed[-1:] == [samples]:
            dashboard._refreshed_at = now[0]
    assert refreshed == [4, 8]


def test_the_dashboard_has_a_row_for_each_class_with_its_loss_and_its_exam():
    console = terminal()
    dashboard = Dashboard("runs/tiny/classes", 0, 9600, console)
    dashboard.show_line({**LINE, "flow_by_class": {"stars": 0.125, "[rings]": None, "(prior)": 0.25}}, ())
    dashboard.show_event(640, "classes", {"wrong": 0.05, "all": {"stars": 0.9375, "[rings]": 1.0, "(outside)": 0.875}})
    dashboard.close()
    rows = [line.strip("│ ").split() for line in output_of(console).splitlines()]
    assert ["stars", "0.125", "0.9375"] in rows
    assert ["[rings]", "1"] in rows
    assert ["(prior)", "0.25"] in rows
    assert ["(outside)", "0.875"] in rows


def test_a_line_without_the_terms_of_a_second_branch_is_shown() -> None:
    left_out = ("guidance", "block_term", "guidance_by_s", "blocks_by_s")
    line = {key: value for key, value in LINE.items() if key not in left_out} | {"blocks": {}, "lambdas": {}}
    for console, make in ((terminal(), lambda c: Dashboard("run", 0, 64, c)), (log(), lambda c: LogDisplay(0, 64, c))):
        display = make(console)
        display.show_line(line, ())
        display.close()
        text = output_of(console)
        assert "grad" in text
        assert "guidance" not in text
        assert "block_term" not in text.replace("block term", "block_term")
