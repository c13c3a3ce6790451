"""The page in headless Chromium: no errors, nothing sideways, every control works; skipped where there is none.

Needs the extra `test-browser` and a Chromium: that of the system, or playwright's own.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.ablation.figures import MAIN_CURVE
from stages.ablation.table import read_table
from stages.report.page import make_page
from tests.report.made_runs import gates, make_run, paired, step_line, validation_line, write_lines

pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'sollune[test-browser]'")
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = [(360, 740), (800, 1000), (1600, 900)]
COLOURS = """() => {
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = "p, dt, dd, a, th, td, b, span, button, summary, h1, h2, h3, svg text, label, output";
  return [...document.querySelectorAll(texts)]
    .filter((one) => one.textContent.trim() && one.getClientRects().length && !one.closest(".faint, dialog"))
    .map((one) => {
      const style = getComputedStyle(one);
      return [one.tagName, one instanceof SVGElement ? style.fill : style.color, behind(one)];
    });
}"""
"""Of every visible text: its element, its colour, and the colour behind it."""
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=installed, args=QUIET)
        except Error:
            pytest.skip("no Chromium: apt-get install chromium")
        yield started
        started.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a distillation of several picture sizes, of runs of few steps, of classes, and of other seeds."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "model/distill", evaluation={**paired(0.1), **gates(True, False)}, sizes=("40x40", "40x64"))
    make_run(folder / "model/fast/4", windows=4, checkpoints=(128, 320, 640))
    make_run(folder / "model/classes", classes=True)
    for seed in range(3):
        make_run(folder / f"a-run-with-a-name-that-is-rather-long-{seed}/distill", seed=seed, max_samples=999)
    out = folder / "page.html"
    out.write_text(make_page([folder / "model", *sorted(folder.glob("a-*"))], None, None).text)
    return out


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """opened(file, width, height, scheme): the page; at the end it must have printed and requested nothing."""
    contexts, faults = [], list[str]()

    def open_page(file: Path, width: int = 1600, height: int = 900, scheme: Any = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else faults.append(request.url),
        )
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready=yes]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def background(page: Page) -> tuple[int, ...]:
    text = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return tuple(int(number) for number in text.removeprefix("rgb(").removesuffix(")").split(","))


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """The contrast ratio of WCAG."""

    def luminance(colour: tuple[int, ...]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_nothing_is_wider_than_the_window(written: Path, opened: Open, width: int, height: int, scheme: str) -> None:
    page = opened(written, width, height, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".card button").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#zoom").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert box["y"] + box["height"] <= height


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_studies_of_a_table_fit_the_window(opened: Open, tmp_path: Path, width: int, height: int) -> None:
    pytest.importorskip("pyarrow", reason="no pyarrow: pip install 'sollune[report]'")
    out = tmp_path / "studies.html"
    table = Path("docs/ablation.parquet")
    out.write_text(make_page([], table, None).text)
    page = opened(out, width, height)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    with_curves = {(row.study, row.regime) for row in read_table(table) if row.metric == MAIN_CURVE}
    assert page.locator("#ablation .chart").count() == len(with_curves) > 0
    assert page.locator("#ablation .forest").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(written: Path, opened: Open, scheme: str) -> None:
    page = opened(written, 1600, 900, scheme)
    pairs = page.evaluate(COLOURS)
    assert len(pairs) > 100

    def parse(colour: str) -> tuple[int, ...]:
        return tuple(int(float(part)) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])

    faint = {(name, one, other) for name, one, other in pairs if contrast(parse(one), parse(other)) < 4.5}
    assert faint == set()


def test_colours_follow_the_system_and_the_switch(written: Path, opened: Open) -> None:
    page = opened(written, scheme="dark")
    assert max(background(page)) < 64
    page.select_option("#theme", "light")
    assert min(background(page)) > 192
    page.reload()
    assert min(background(page)) > 192  # it is remembered
    page.select_option("#theme", "auto")
    assert max(background(page)) < 64


def test_sliders_choose_the_checkpoint_and_the_steps(written: Path, opened: Open) -> None:
    page = opened(written)
    page.select_option("#run", label="fast/4")
    student = page.locator(".card").first.locator("img").nth(1)
    newest, newest_alt = student.get_attribute("src"), student.get_attribute("alt")
    assert page.text_content("#checkpoint-text") == "after 640 samples"
    assert "student, 4 steps" in (newest_alt or "")
    page.focus("#checkpoint")
    page.keyboard.press("Home")
    assert page.text_content("#checkpoint-text") == "after 128 samples"
    assert student.get_attribute("src") != newest
    page.keyboard.press("End")
    assert student.get_attribute("src") == newest
    page.focus("#steps")
    page.keyboard.press("Home")
    assert page.text_content("#steps-text") == "student, 25 steps"
    assert student.get_attribute("src") != newest


def test_the_teacher_beside_a_student_has_the_same_size(written: Path, opened: Open) -> None:
    page = opened(written)
    page.focus("#steps")
    page.keyboard.press("End")
    assert page.text_content("#steps-text") == "40x64 student, 4 steps"
    images = page.locator(".card").first.locator("img")
    sizes = [images.nth(number).evaluate("(one) => [one.naturalWidth, one.naturalHeight]") for number in (0, 1)]
    assert sizes[0] == sizes[1] == [80, 128]


def test_a_picture_is_enlarged_moved_and_closed_by_keys_alone(written: Path, opened: Open) -> None:
    page = opened(written)
    card = page.locator(".card button").nth(1)
    card.focus()
    page.keyboard.press("Enter")
    first = page.text_content("#zoom-title")
    assert page.locator(".pane").count() == 2
    page.focus("#zoom-panes")
    image = page.locator(".pane img").first
    before = image.evaluate("(one) => one.style.transform")
    page.keyboard.press("+")
    larger = image.evaluate("(one) => one.style.transform")
    assert larger != before
    page.keyboard.press("ArrowLeft")
    moved = image.evaluate("(one) => one.style.transform")
    assert moved != larger
    assert page.locator(".pane img").nth(1).evaluate("(one) => one.style.transform") == moved
    page.keyboard.press("0")
    assert image.evaluate("(one) => one.style.transform") == before
    page.locator("#zoom-next").press("Enter")
    assert page.text_content("#zoom-title") != first
    page.keyboard.press("Escape")
    assert not page.locator("#zoom").is_visible()
    assert card.evaluate("(one) => one === document.activeElement")


def test_the_wheel_enlarges_around_the_pointer_and_dragging_moves(written: Path, opened: Open) -> None:
    page = opened(written)
    page.locator(".card button").nth(1).click()
    box = page.locator(".pane").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -400)
    image = page.locator(".pane img").first
    expect(image).to_have_attribute("style", re.compile(r"scale\(2\.7"))
    before = image.evaluate("(one) => one.style.transform")
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 30, box["y"] + box["height"] / 2)
    page.mouse.up()
    assert image.evaluate("(one) => one.style.transform") != before


def test_charts_are_read_by_pointer_and_by_keys_and_lines_can_be_hidden(written: Path, opened: Open) -> None:
    page = opened(written)
    chart = page.locator("#learn-held_out")
    chart.scroll_into_view_if_needed()
    chart.locator("svg").first.hover()
    reading = chart.locator(".reading")
    assert "model/distill" in (reading.text_content() or "")
    chart.locator("svg").first.focus()
    page.keyboard.press("Home")
    first = reading.text_content()
    page.keyboard.press("ArrowRight")
    assert reading.text_content() not in ("", first)
    button = chart.locator(".legend button").first
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not chart.locator("g.line").first.is_visible()
    button.click()
    assert chart.locator("g.line").first.is_visible()


def test_a_page_in_training_renews_itself_and_comes_back_as_it_was(tmp_path: Path, opened: Open) -> None:
    run, out = make_run(tmp_path / "run", complete=False, max_samples=9999), tmp_path / "page.html"
    out.write_text(make_page([run], None, 1.0).text)
    page = opened(out)
    page.focus("#checkpoint")
    page.keyboard.press("Home")
    page.locator("#learn-flow .legend button").first.click()
    page.locator("#summary details").first.evaluate("(one) => { one.open = true; }")
    page.evaluate("window.scrollTo(0, 700)")
    write_lines(run, [step_line(7040, 0, 0.01, None, False), validation_line(7040, 0, 0.01, None)])
    out.write_text(make_page([run], None, 1.0).text)
    page.get_by_text("7,040").first.wait_for(timeout=10_000)
    page.wait_for_selector("html[data-ready=yes]")
    assert page.evaluate("window.scrollY") == 700
    assert page.text_content("#checkpoint-text") == "after 320 samples"
    assert page.locator("#learn-flow .legend button").first.get_attribute("aria-pressed") == "false"
    assert page.locator("#summary details").first.evaluate("(one) => one.open")


def test_a_page_that_shall_stay_does_not_renew_itself(tmp_path: Path, opened: Open) -> None:
    run, out = make_run(tmp_path / "run", complete=False), tmp_path / "page.html"
    out.write_text(make_page([run], None, 1.0).text)
    page = opened(out)
    page.uncheck("#live")
    page.evaluate("window.here = true")
    page.wait_for_timeout(1500)
    assert page.evaluate("window.here") is True


def test_the_newest_pictures_are_there_without_scripts(written: Path, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written.as_uri())
    assert page.locator(".hero img").count() == 6
    assert page.locator("svg .stroke").count() > 5
    context.close()
