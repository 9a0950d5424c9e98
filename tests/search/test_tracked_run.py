"""What a real search leaves in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest

from search.engine import Search
from search.options import parse
from search.registry import sha256
from spaces.errors import UserError

Finished = tuple[list[str], Path, dict[str, Any]]


def opened(out: Path) -> tuple[Any, str, Any]:
    """Client, experiment and the study's run of a run folder."""
    uri = f"sqlite:///{out / 'mlflow.db'}"
    client: Any = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (parent,) = client.search_runs([experiment], "tags.kind = 'study'")
    return client, experiment, parent


def test_study_run_holds_pictures_files_and_figures_of_the_winner(finished: Finished) -> None:
    client, _, parent = opened(finished[1])
    assert parent.info.status == "FINISHED"
    held = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert {"pareto.html", "pareto.png", "result.json", "winner"} <= held
    winner = {f.path for f in client.list_artifacts(parent.info.run_id, "winner")}
    assert winner == {f"winner/{n}" for n in ("candidate.json", "recipe.json", "tensor-types.txt")}
    assert parent.data.metrics["winner_target_gb"] <= 0.003
    assert parent.data.metrics["winner_report_kl_nats"] > 0
    assert parent.data.metrics["winner_target_tokens_per_second"] > 0


def test_each_trial_is_a_run_and_finalists_have_their_report_scores(finished: Finished) -> None:
    client, experiment, parent = opened(finished[1])
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    by_number = {int(r.data.tags["trial"]): r.data for r in runs}
    assert len(by_number) == len(runs)
    assert {t["number"] for t in finished[2]["trials"]} <= by_number.keys()
    for trial in finished[2]["trials"]:
        shown = by_number[trial["number"]]
        assert shown.metrics["kl_nats"] == pytest.approx(trial["scores"]["kl"], rel=1e-5)
        assert shown.params["form"] == ("portable" if trial["portable"] else "ragged")
    for number, scores in finished[2]["finals"].items():
        if scores["report"] is not None:
            shown = by_number[int(number)]
            assert shown.metrics["report_kl_nats"] == pytest.approx(scores["report"]["kl"], rel=1e-5)
            assert shown.metrics["report_perplexity"] == pytest.approx(
                scores["report"]["perplexity"], rel=1e-5
            )


def test_winner_is_registered_where_it_lies_once(finished: Finished) -> None:
    client, _, parent = opened(finished[1])
    model = finished[1] / "winner" / "model.gguf"
    versions = client.search_model_versions("name = 'tiny'")
    keys = [v.tags["candidate"] for v in versions]
    assert len(keys) == len(set(keys)) >= 1
    newest = client.get_model_version_by_alias("tiny", "winner")
    assert newest.source == model.as_uri()
    assert newest.run_id == parent.info.run_id
    assert newest.tags["bytes"] == str(model.stat().st_size)
    assert newest.tags["sha256"] == sha256(model)


def test_a_bad_tracking_uri_is_told_before_the_first_stage(
    tiny_checkpoint: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = [
        "--budget", "3MB", "--model", str(tiny_checkpoint), "--workers", "0", "--text", str(texts[0]),
        "--calibration", str(texts[1]), "--tasks", "none", "--out", str(tmp_path / "out"),
        "--tracking-uri", "http://127.0.0.1:1",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--tracking-uri"):
        Search.open(parse(arguments)).run()
    assert not (tmp_path / "out" / "cache" / "calibration.npz").exists()
