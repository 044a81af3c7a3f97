"""PNG files of figures, by a headless browser."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from shutil import which
from typing import Any

from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

WIDTH, HEIGHT = 1100, 500
"""Of a figure that does not say."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
SLOW = 120_000
"""Milliseconds."""

_DRAW = """async ([data, layout, width, height]) => {
    const place = document.createElement("div");
    await Plotly.newPlot(place, data, {...layout, width, height});
    const picture = await Plotly.toImage(place, {format: "png", width, height});
    Plotly.purge(place);
    return picture.split(",")[1];
}"""


def write_pngs(figures: Mapping[Path, Figure]) -> str | None:
    """Write every figure to its path; or say why not. Pictures of an earlier run are not left there."""
    for path in figures:
        path.unlink(missing_ok=True)
    browser = next((found for name in BROWSERS if (found := which(name))), None)
    if browser is None:
        return "no browser was found: install Chromium."
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        return "the package playwright, which drives the browser, is not installed: pip install playwright."
    try:
        _draw(figures, browser, sync_playwright)
    except Error as problem:
        return f"the browser {browser} did not draw them: {problem}"
    return None


def _draw(figures: Mapping[Path, Figure], browser: str, sync_playwright: Any) -> None:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=[*QUIET], timeout=SLOW)
        page = opened.new_page()
        page.set_default_timeout(SLOW)
        page.add_script_tag(content=get_plotlyjs())
        for path, figure in figures.items():
            content = json.loads(figure.to_json() or "")
            size = [content["layout"].get(name, default) for name, default in (("width", WIDTH), ("height", HEIGHT))]
            picture = page.evaluate(_DRAW, [content["data"], content["layout"], *size])
            path.write_bytes(base64.b64decode(picture))
        opened.close()
