"""The page in a real headless Chromium: at the width of a desk and of a phone. CI sets CI_BROWSER=1: it must run."""

import os
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mechunlearn.curve import LAYERS, Curve
from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report.report import Report
from mechunlearn.evaluate.results import Result

CHROMIUM = "/usr/bin/chromium"
QUIET = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
WIDTHS = (1280, 390)
SLOW = 120_000
"""Milliseconds: the machines of CI are shared."""


class Seen(NamedTuple):
    """What happened on the page at one width."""

    complaints: list[str]
    requests: list[str]
    page_width: int
    plots: list[dict[str, float]]
    tables: list[tuple[int, int]]
    picture: bytes
    colors: int


def made() -> Report:
    """Rows with long names and every plot; one cell failed."""
    generator = torch.Generator().manual_seed(0)
    names = tuple(f"fact {i}" for i in range(12))

    def shares(mean: float) -> torch.Tensor:
        return (mean + 0.1 * torch.randn(12, generator=generator)).clamp(0, 1)

    def curve(mean: float, axis: str) -> Result:
        values = torch.stack([shares(mean + 0.1 * i) for i in range(5)], 1)
        return Result.strongest(Curve(tuple("01234"), values, "probability", 0.25, axis), "attacked", names=names)

    found = []
    rows = {"original": 0.7, "MLPs 1-2, where facts are looked up": 0.1, "random, of the same size": 0.4}
    for row, mean in rows.items():
        for name in ("trained prompt", "multiple choice, system prompt"):
            for side, level in (("forget", mean), ("retain", 0.8)):
                found.append(Cell(row, f"{side}, {name}", 0, Result(shares(level), "p", 0.25, "share", names)))
        found.append(Cell(row, "relearning", 0, curve(mean, "steps")))
        found.append(Cell(row, "probe", 0, curve(mean, LAYERS) if mean != 0.4 else None, "ValueError: </script>"))
        found.append(Cell(row, "text loss", 0, Result(shares(2 - mean), "loss", 3.0, "nats per token")))
    weights = dict(zip(rows, (0, 100_000, 2_000_000), strict=True))
    return Report(tuple(found), weights, {"versions": {"torch": "x" * 300}})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        if os.environ.get("CI_BROWSER"):
            pytest.fail(f"CI_BROWSER is set and {CHROMIUM} is missing: install Debian's package chromium.")
        pytest.skip(f"needs {CHROMIUM} (Debian's package chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = [*QUIET.split(), "--no-first-run", "--disable-quic"]
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=options, timeout=SLOW)
        yield found
        found.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    made().to_html(path)
    return path


@pytest.fixture(scope="module", params=WIDTHS)
def seen(request, browser, path) -> Seen:
    return visited(browser, path, request.param)


def visited(browser: Any, path: Path, width: int) -> Seen:
    phone = width < 600
    page = browser.new_page(viewport={"width": width, "height": 900}, is_mobile=phone, has_touch=phone)
    page.set_default_timeout(SLOW)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("[...document.querySelectorAll('[role=img]')].every(p => p.querySelector('.main-svg'))")
    picture = page.screenshot(full_page=True)
    found = Seen(
        complaints,
        [url for url in requests if url != path.as_uri() and not url.startswith("data:")],
        page.evaluate("document.documentElement.scrollWidth"),
        page.evaluate(_PLOTS),
        page.evaluate(_TABLE),
        picture,
        page.evaluate(_COLORS, "data:image/png;base64," + b64encode(picture).decode()),
    )
    page.close()
    return found


# Each plot: its own width, that of its place and how many bars, lines and points it has.
_PLOTS = """[...document.querySelectorAll('[role=img]')].map(place => ({
    drawn: place.querySelector('.main-svg').getBoundingClientRect().width, place: place.clientWidth,
    marks: place.querySelectorAll('.bars path, .scatterlayer path').length}))"""

_TABLE = "[...document.querySelectorAll('.scroll')].map(box => [box.scrollWidth, box.clientWidth])"

# How many colours the picture has, 4 bits per channel.
_COLORS = """async source => {
    const image = new Image(); image.src = source; await image.decode();
    const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height).data, seen = new Set();
    for (let i = 0; i < pixels.length; i += 4)
        seen.add((pixels[i] >> 4) * 256 + (pixels[i + 1] >> 4) * 16 + (pixels[i + 2] >> 4));
    return seen.size}"""


def test_the_page_has_no_complaints_and_asks_the_network_for_nothing(seen):
    assert seen.complaints == []
    assert seen.requests == []


def test_the_page_does_not_scroll_sideways_but_its_table_may(seen):
    assert seen.page_width in WIDTHS
    [(table, box)] = seen.tables
    assert box < seen.page_width
    assert table > box or seen.page_width > 390


def test_every_plot_is_drawn_within_its_place(seen):
    assert len(seen.plots) == 7  # bars: forget, retain, other; relearning, probe, sizes, Pareto of text loss
    for plot in seen.plots:
        assert plot["marks"] > 2
        assert plot["drawn"] <= plot["place"] + 1


def test_the_screenshot_is_not_blank(seen):
    """White paper has one colour, text alone its greys; the rows have three more."""
    assert seen.colors > 30
    assert len(seen.picture) > 50_000


def test_a_page_that_complains_asks_the_network_and_is_blank_is_noticed(browser, tmp_path):
    """What the tests above would say of a bad page."""
    bad = '<div style="width: 2000px; height: 9px"></div><script src="http://localhost:9/x.js"></script><script>nothing()</script>'
    (tmp_path / "bad.html").write_text(f"<!DOCTYPE html>{bad}")
    found = visited(browser, tmp_path / "bad.html", 390)
    assert any("nothing" in text for text in found.complaints)
    assert found.requests == ["http://localhost:9/x.js"]
    assert found.page_width > 390
    assert found.colors == 1
    assert found.plots == []
