"""What MLflow's own page shows of a study, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from experiments.browser import browser, missing, shown
from experiments.mlflow_pages import Pages
from tests.browser.conftest import TRIALS

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def pages(address: str) -> Pages:
    return Pages.of(address, "seen")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def texts(driver: Any, css: str) -> list[str]:
    return [e.text for e in driver.find_elements("css selector", css)]


def test_run_list_has_a_row_per_trial_and_the_metrics_as_columns(driver: Any, pages: Pages) -> None:
    driver.get(pages.runs)
    shown(driver, ".ag-row", "trial 6")
    lines = [line for row in texts(driver, ".ag-row") for line in row.splitlines()]
    names = [line for line in lines if line.startswith(("trial", "uniform"))]
    # Best first, and without the one that was stopped early.
    assert names == [*(f"trial {n}" for n in range(TRIALS - 2, 0, -1)), "uniform"]
    shown(driver, ".ag-header-cell", "kl_nats")
    shown(driver, ".ag-header-cell", "perplexity")
    cells = [e.text for e in driver.find_elements("css selector", "[col-id='metrics.`kl_nats`'].ag-cell")]
    assert [float(c) for c in cells] == pytest.approx([0.5 / n for n in range(TRIALS - 1, 0, -1)], rel=1e-5)


def test_all_trials_are_children_of_the_study(driver: Any, pages: Pages) -> None:
    driver.get(pages.study)
    shown(driver, "main, body", "winner_report_kl_nats")
    page = shown(driver, "body", "uniform").text
    assert all(f"trial {n}" in page for n in range(1, TRIALS))
    assert "0.071" in page
    assert "seen" in page
    assert "v1" in page  # the registered model


def test_pareto_front_is_drawn_in_the_artifact_view(driver: Any, pages: Pages) -> None:
    driver.get(pages.artifact("pareto.html"))
    driver.switch_to.frame(shown(driver, "iframe"))
    try:
        shown(driver, ".js-plotly-plot .scatterlayer")
        assert len(driver.find_elements("css selector", ".js-plotly-plot")) == 2
        points = driver.find_elements("css selector", ".js-plotly-plot .scatterlayer .points path")
        assert len(points) >= 2 * (TRIALS - 1)
        labels = " ".join(texts(driver, ".annotation-text, .legendtext, .xtitle, .ytitle"))
        for word in ("uniform", "winner, portable", "budget, 5 GB", "(GB)", "(tokens/s)", "(nats per token)"):
            assert word in labels
    finally:
        driver.switch_to.default_content()


def test_compare_view_draws_decisions_against_kl(driver: Any, pages: Pages) -> None:
    driver.get(pages.compare)
    shown(driver, "body", f"Comparing {TRIALS - 1} Runs")
    shown(driver, ".js-plotly-plot .parcoords")
    axes = texts(driver, ".parcoords .axis-title")
    assert axes[-1] == "kl_nats"
    assert {"expert_bits_per_weight", "experts_kept_mean"} <= set(axes)


def test_winner_is_in_the_model_registry(driver: Any, pages: Pages) -> None:
    driver.get(f"{pages.address}/#/models/seen")
    shown(driver, "body", "Version 1")
    assert "winner" in shown(driver, "body", "bytes").text
