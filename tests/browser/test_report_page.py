"""What a browser shows of a study's report, opened from disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.browser import browser, missing, resize, shown

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.timeout(900),  # the search it is of, where no other test has run it yet
]

SECTIONS = (
    "In words", "Pareto front", "Against the baselines", "Layer by layer", "Where the bytes went",
    "Speed on each device", "Damage by kind of text", "Diagnosis", "What each component costs",
    "Experts and routing", "Quantization error", "Sensitivity by layer", "How to reproduce it",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(finished: tuple[list[str], Path, dict]) -> Iterator[Any]:
    with browser() as driver:
        driver.get((finished[1] / "report.html").as_uri())
        shown(driver, ".js-plotly-plot .scatterlayer")
        yield driver


def test_every_section_is_there_and_its_link_goes_to_it(page: Any) -> None:
    headings = [e.text for e in page.find_elements("css selector", "h2")]
    assert set(SECTIONS) <= set(headings)
    links = page.find_elements("css selector", "nav a")
    assert [e.text for e in links] == headings
    links[headings.index("Diagnosis")].click()
    top = page.execute_script("return document.querySelector('#diagnosis').getBoundingClientRect().top")
    assert -5 <= top < 900
    assert "costs most" in shown(page, "#diagnosis + p").text


def test_every_picture_is_drawn_and_nothing_is_fetched(page: Any) -> None:
    pictures = page.find_elements("css selector", "figure img")
    assert len(pictures) >= 9
    assert all(page.execute_script("return arguments[0].naturalWidth", p) > 400 for p in pictures)
    fetched = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


def test_the_front_is_drawn_with_its_trials_and_names(
    page: Any, finished: tuple[list[str], Path, dict]
) -> None:
    complete = [t for t in finished[2]["trials"] if t["state"] == "COMPLETE"]
    points = page.find_elements("css selector", ".js-plotly-plot .scatterlayer .points path")
    assert len(points) >= 2 * len(complete)
    labels = " ".join(e.text for e in page.find_elements("css selector", ".xtitle, .ytitle, .legendtext"))
    for word in ("(GB)", "(tokens/s)", "(nats per token)", "budget", "winner"):
        assert word in labels


def test_the_winner_stands_out_in_the_comparison(page: Any, finished: tuple[list[str], Path, dict]) -> None:
    rows = page.find_elements("css selector", "#against-the-baselines ~ table tr.strong")
    assert "winner" in rows[0].text
    body = page.find_element("css selector", "main").text
    assert all(f"baseline {name}" in body for name in finished[2]["baselines"])


@pytest.mark.parametrize("width", [1280, 1920])
def test_nothing_is_wider_than_the_page(page: Any, width: int) -> None:
    resize(page, width, 900)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    wide = page.execute_script(
        "const end = document.querySelector('main').getBoundingClientRect().right;"
        "return [...document.querySelectorAll('main > *')].filter("
        "e => e.getBoundingClientRect().right > end + 1).map(e => e.tagName)"
    )
    assert wide == []
