"""The pages about runs in a real browser, on a telephone and on a desk, by day and by night."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from latentac.runs.reporting.compare import write_comparison
from tests.browser import browser as started
from tests.latentac.published import make, publish_until, with_incumbent
from tools.golang import Unavailable

LONG = "shapes-unet-with-a-rather-long-name-20260131-120000"
_WIDE = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"
_CONTRAST = """() => {
  const light = colour => { const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const marks = [...document.querySelectorAll('.mark, .good, .bad, figcaption, small')];
  return Math.min(...marks.map(e => { const ink = light(getComputedStyle(e).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); }));
}"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        with started() as running:
            yield running
    except Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a complete run that met an incumbent, and its comparison with others, one with a long name."""
    folder = tmp_path_factory.mktemp("pages")
    make(folder, change=with_incumbent, run="first")
    publish_until(folder, "gate", run=LONG)
    publish_until(folder, "train", run="stopped")
    made = write_comparison(["first", LONG, "stopped"], f"file://{folder}/runs/store", str(folder / "runs"))
    return {"report": folder / "runs" / "first" / "report.html", "compare": made.page}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_fits_its_screen(browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    """Neither the page nor a table scrolls sideways, nothing fails to load, and all small print has contrast 4.5."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(pages[name].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(_WIDE) == []
    assert page.evaluate("[...document.images].every(e => e.complete && e.naturalWidth > 0)")
    assert page.evaluate(_CONTRAST) >= 4.5
    assert troubles == []
    page.close()


@pytest.mark.parametrize("name", ["report", "compare"])
def test_on_a_telephone_each_cell_of_a_wide_table_names_its_column(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    """The head of such a table is only heard there, so every cell says what it is; on a desk the head is seen."""
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(pages[name].as_uri())
    labels = page.locator(".stack td").evaluate_all("cells => cells.map(e => getComputedStyle(e, '::before').content)")
    assert labels
    assert not [label for label in labels if label in ("none", '""')]
    page.set_viewport_size({"width": 1200, "height": 900})
    head = page.locator(".stack thead").first.bounding_box()
    assert head is not None
    assert head["height"] > 10
    page.close()
