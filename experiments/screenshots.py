"""Pictures of what a run shows: `python -m experiments.screenshots runs/NAME OUT [--report FILE.html]`.

Starts MLflow on the run's database and takes the run list, the comparison and the Pareto
front, and the report, 1280 and 1920 pixels wide. Needs Chromium with chromedriver, and Selenium.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.browser import browser, mlflow_ui, resize, shown
from experiments.mlflow_pages import Pages
from search.commands import run_command
from search.options import Parser
from spaces.errors import UserError

WIDTHS = {1280: 860, 1920: 1080}
"""Width of the page to its height."""


def _runs(driver: Any) -> None:
    shown(driver, ".ag-header-cell", "kl_nats")
    shown(driver, ".ag-row", "trial")


def _compare(driver: Any) -> None:
    shown(driver, ".js-plotly-plot .parcoords")


def _artifact(driver: Any) -> None:
    driver.switch_to.frame(shown(driver, "iframe"))
    shown(driver, ".js-plotly-plot .scatterlayer")
    driver.switch_to.default_content()


def take(driver: Any, url: str, ready: Callable[[Any], None], name: str, out: Path) -> None:
    """A page at each width."""
    driver.get("about:blank")  # a new fragment alone would not load the page anew
    driver.get(url)
    for width, height in WIDTHS.items():
        resize(driver, width, height)
        ready(driver)
        time.sleep(2.5)  # plots are drawn and rows fade in after they are there
        path = out / f"{name}-{width}.png"
        driver.save_screenshot(str(path))
        print(path, flush=True)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--report", type=Path, help="an HTML page to take as well, from its top")
    args = parser.parse_args()
    database, result = args.run.resolve() / "mlflow.db", args.run / "result.json"
    for file in filter(None, (database, result, args.report)):
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; give the folder of a finished run, and a report that is there"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    study = json.loads(result.read_text("utf-8"))["study"]
    with browser() as driver:
        with mlflow_ui(f"sqlite:///{database}") as address:
            pages = Pages.of(address, study)
            take(driver, pages.runs, _runs, "mlflow-runs", args.out)
            take(driver, pages.compare, _compare, "mlflow-compare", args.out)
            take(driver, pages.artifact("pareto.html"), _artifact, "mlflow-pareto", args.out)
        if args.report:
            take(driver, args.report.resolve().as_uri(), lambda d: shown(d, "body"), "report", args.out)


if __name__ == "__main__":
    run_command(main)
