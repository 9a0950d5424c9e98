"""A tracking server in place of a database."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.registry import register
from search.tracking import Tracker
from spaces.candidate import Candidate
from tests.search import tracked
from tests.spaces.tiny import inventory


def test_a_server_holds_what_a_database_does(
    address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, file = inventory(), tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    tracker = Tracker(tracked.study("served"), address, tmp_path, {"budget_gb": 5.0}, model)
    for trial in tracker.study.get_trials(deepcopy=False):
        tracker.log_trial(trial, tracked.candidate(model, trial.number))
    (tmp_path / "candidate.json").write_text("{}")
    tracker.finish({"winner_report_kl_nats": 0.3}, {"winner": [tmp_path / "candidate.json"]}, "**won**")
    assert "View run" not in capfd.readouterr().out

    runs = tracker.client.search_runs([tracker.experiment], "params.state = 'complete'")
    assert {r.info.run_name for r in runs} == {"uniform", "trial 1"}
    own = next(r for r in runs if r.info.run_name == "trial 1")
    assert own.info.artifact_uri.startswith("mlflow-artifacts:")
    text = Path(tracker.client.download_artifacts(own.info.run_id, "candidate.json")).read_text("utf-8")
    assert Candidate.from_json(text) == tracked.candidate(model, 1)

    for _ in range(2):
        tags = {"candidate": "abc"}
        assert register(tracker.client, "served", file, tracker.parent, tags, "best") == "1"
    (version,) = tracker.client.search_model_versions("name = 'served'")
    assert version.source == f"runs:/{tracker.parent}/winner"
    assert version.tags["path"] == str(file)
