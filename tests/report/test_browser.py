"""The page in a real browser, without a network: nothing is fetched, nothing fails, everything is drawn and fits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_report import sources

from pyprune.report.html import page

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("PYPRUNE_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
LONG = "x" * 300
SECTIONS = ("done", "widths", "importance", "quality", "cost", "samples", "recovery", "stages", "repeat")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with thirty layers, words that do not break, a generation that would like to run, four models."""
    given = sources()
    given.report = {**given.report, "model": f"/models/{LONG}", "warnings": [LONG]}
    given.widths = [{**given.widths[-1], "layer": i, "after": 100 + i} for i in range(30)] + list(given.widths[:2])
    given.columns = {**given.columns, "other": LONG}
    given.evaluations = [*given.evaluations, ("other", given.evaluations[0][1])]
    given.samples = [{"prompt": LONG, "dense": f"<script>fetch('http://example.org')</script>{LONG}", "pruned": LONG}]
    given.commands = [("prune", f"pyprune prune {LONG}")]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(given), encoding="utf-8")
    return path


class Opened:
    """A tab with the page in it, and what it said and asked for."""

    def __init__(self, browser: Any, file: Path, width: int, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 800}, offline=True, **options)
        self.tab = context.new_page()
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(file.as_uri())
        self.tab.wait_for_load_state("load")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_offline_whole_and_within_its_width(browser, file: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, file, width, color_scheme=scheme)
    assert opened.said == []
    assert opened.asked == [file.as_uri()]
    for section in SECTIONS:
        assert opened.tab.locator(f"#{section} h2").is_visible(), section
    boxes = [drawn.bounding_box() for drawn in opened.tab.locator("svg[role=img]").all()]
    assert len(boxes) == 5 and all(box["width"] > 40 and box["height"] >= 16 for box in boxes), boxes
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= width
    beyond = """() => [...document.querySelectorAll('body *')].filter(
        e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"""
    assert opened.tab.evaluate(beyond) == []


def test_shapes_have_a_size_and_a_colour(browser, file: Path) -> None:
    tab = Opened(browser, file, 1280).tab
    seen = tab.evaluate("""() => [...document.querySelectorAll('svg[role=img]')].map(svg =>
        [...svg.querySelectorAll('.kept, .removed, .line')].map(e => {
            const box = e.getBoundingClientRect(), style = getComputedStyle(e);
            return [box.width, box.height, style.fill, style.stroke];
        }))""")
    assert all(seen)
    for picture in seen:
        for width, height, fill, stroke in picture:
            assert width > 0 and height >= 0
            assert fill.startswith("rgb") or stroke.startswith("rgb")
    fills = {fill for picture in seen for _, _, fill, _ in picture if fill != "none"}
    assert len(fills) == 2  # kept and removed differ


def test_numbers_unfold_and_links_lead_to_their_sections(browser, file: Path) -> None:
    tab = Opened(browser, file, 1280).tab
    numbers = tab.locator("#widths details").first
    assert not numbers.locator("table").is_visible()
    numbers.locator("summary").click()
    assert numbers.locator("table").is_visible()
    tab.locator("nav a[href='#samples']").click()
    assert tab.evaluate("location.hash") == "#samples"
    top = tab.locator("#samples").bounding_box()["y"]
    assert -2 <= top < 800


def test_text_reads_against_its_background_in_both_colour_schemes(browser, file: Path) -> None:
    contrast = """() => {
        const parse = c => c.match(/[0-9.]+/g).slice(0, 3).map(Number);
        const light = c => { const [r, g, b] = parse(c).map(v => (v /= 255) <= 0.03928 ? v / 12.92
            : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        return [...document.querySelectorAll('p, dt, dd, th, td, span, h1, h2, a, summary, pre')].map(e => {
            const ink = light(getComputedStyle(e).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); });
    }"""
    for scheme in ("light", "dark"):
        tab = Opened(browser, file, 1280, color_scheme=scheme).tab
        assert min(tab.evaluate(contrast)) >= 4.5, scheme  # WCAG 2.1, 1.4.3


def test_the_page_prints(browser, file: Path) -> None:
    tab = Opened(browser, file, 1280).tab
    assert tab.pdf(format="A4").startswith(b"%PDF")
    tab.emulate_media(media="print")
    assert not tab.locator("nav").is_visible() and tab.locator("#widths svg").first.is_visible()


def test_a_page_that_would_fetch_something_is_noticed(browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><p style='width: 3000px'>x</p><img src='http://127.0.0.1:9/a.png'>", encoding="utf-8"
    )
    opened = Opened(browser, bad, 390)
    assert len(opened.asked) == 2 and opened.said
    assert opened.tab.evaluate("document.documentElement.scrollWidth") > 390
