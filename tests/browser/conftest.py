"""A made-up study in MLflow's database, and MLflow's server on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.browser import mlflow_ui
from search.pareto_html import write_html
from search.pareto_png import write_png
from search.registry import register
from search.tracking import Tracker
from tests.search import tracked
from tests.spaces.tiny import inventory

TRIALS = 8


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study, as the driver writes it."""
    out, model = tmp_path_factory.mktemp("seen"), inventory()
    study = tracked.study("seen", TRIALS)
    tracker = Tracker(study, None, out, {"budget_gb": 5.0}, model)
    for trial in study.get_trials(deepcopy=False):
        tracker.log_trial(trial, tracked.candidate(model, trial.number))
    result = tracked.result(study, model)
    write_html(result, out / "pareto.html")
    write_png(result, out / "pareto.png")
    file = out / "model.gguf"
    file.write_bytes(b"GGUF")
    pictures = [out / "pareto.html", out / "pareto.png"]
    tracker.finish({"winner_report_kl_nats": 0.071}, {"": pictures}, "**won**")
    register(tracker.client, "seen", file, tracker.parent, {"candidate": "abc", "bytes": "4"}, "best")
    return out / "mlflow.db"


@pytest.fixture(scope="session")
def address(database: Path) -> Iterator[str]:
    with mlflow_ui(f"sqlite:///{database}") as started:
        yield started
