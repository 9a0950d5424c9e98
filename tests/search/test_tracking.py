"""What a study leaves in MLflow, read back through MLflow's own client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient

from search.registry import register, sha256
from search.tracking import Tracker
from search.trial_row import bits_per_weight
from spaces.candidate import Candidate
from spaces.errors import UserError
from tests.search import tracked
from tests.spaces.tiny import inventory

MODEL = inventory()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database MLflow made: it takes seconds."""
    out = tmp_path_factory.mktemp("empty")
    Tracker(optuna.create_study(study_name="empty"), None, out, {}, MODEL)
    return out / "mlflow.db"


@pytest.fixture
def start(empty: Path, tmp_path: Path) -> Callable[[optuna.Study], Tracker]:
    """Starts a tracker of a study in this test's folder."""
    shutil.copy(empty, tmp_path / "mlflow.db")
    return lambda study: Tracker(study, None, tmp_path, {"budget_gb": 5.0, "device": "laptop"}, MODEL)


def together(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Has two callers of a method of MLflow's client meet there, if both come within a moment."""
    real, both = getattr(MlflowClient, name), threading.Barrier(2)

    def met(self: MlflowClient, *args: Any, **options: Any) -> Any:
        found = real(self, *args, **options) if name.startswith("get") else None
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        return found if name.startswith("get") else real(self, *args, **options)

    monkeypatch.setattr(MlflowClient, name, met)


@pytest.mark.parametrize("name", ["get_experiment_by_name", "create_experiment", "create_run"])
def test_two_drivers_that_start_at_once_share_one_run(
    name: str, start: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(study_name="both", storage=storage)
    together(monkeypatch, name)
    made: list[Tracker] = []

    def driver() -> None:
        made.append(start(optuna.load_study(study_name="both", storage=storage)))

    drivers = [threading.Thread(target=driver) for _ in range(2)]
    for thread in drivers:
        thread.start()
    for thread in drivers:
        thread.join()
    one, other = made
    assert (one.experiment, one.parent) == (other.experiment, other.parent)
    assert [r.info.run_id for r in one.client.search_runs([one.experiment])] == [one.parent]


def test_an_experiment_that_another_machine_made_meanwhile_is_shared(
    start: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tracked.study("elsewhere")
    first, real, missed = start(study), MlflowClient.get_experiment_by_name, []

    def too_early(self: MlflowClient, name: str) -> Any:
        missed.append(name)
        return None if len(missed) == 1 else real(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", too_early)
    assert start(study).experiment == first.experiment
    assert len(missed) == 2


@pytest.mark.parametrize("name", ["a?b=c", "a%20b", "a b", "a#b"])
def test_a_folder_of_any_name_holds_what_is_tracked(name: str, empty: Path, tmp_path: Path) -> None:
    out = tmp_path / name
    out.mkdir()
    shutil.copy(empty, out / "mlflow.db")
    tracker = Tracker(tracked.study("named"), None, out, {}, MODEL)
    write(tracker)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and out not in p.parents]
    assert sorted(p.name for p in out.iterdir()) == ["mlartifacts", "mlflow.db", "tracking.lock"]
    assert artifact(tracker, children(tracker)["trial 1"], "candidate.json")


def test_a_tracker_is_closed_when_all_is_written(
    start: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = start(tracked.study("closed"))
    create, trials = tracker.client.create_run, tracker.study.get_trials()

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return create(*args, **options)

    monkeypatch.setattr(tracker.client, "create_run", slowly)
    for trial in trials:
        tracker.log_trial(trial, tracked.candidate(MODEL, trial.number))
    tracker.close()
    found = children(tracker).values()
    assert [r.info.status for r in found] == ["FINISHED"] * len(trials)


def write(tracker: Tracker) -> None:
    for trial in tracker.study.get_trials(deepcopy=False):
        tracker.log_trial(trial, tracked.candidate(MODEL, trial.number), 0.5)
    tracker.flush()


def children(tracker: Tracker) -> dict[str, Any]:
    """Name to run, of all child runs that are there."""
    found = tracker.client.search_runs(
        [tracker.experiment], f"tags.`mlflow.parentRunId` = '{tracker.parent}'"
    )
    assert len({r.info.run_name for r in found}) == len(found)
    return {r.info.run_name: r for r in found}


def artifact(tracker: Tracker, run: Any, name: str) -> str:
    return Path(tracker.client.download_artifacts(run.info.run_id, name)).read_text("utf-8")


def test_each_trial_is_a_child_run_with_decisions_and_results(start: Callable[..., Tracker]) -> None:
    tracker = start(tracked.study("children"))
    write(tracker)
    runs = children(tracker)
    assert runs.keys() == {"uniform", "trial 1", "trial 2"}
    data, own = runs["trial 1"].data, tracked.candidate(MODEL, 1)
    assert data.params["form"] == "ragged"
    assert data.params["state"] == "complete"
    assert data.params["proposed_by"] == "sampler"
    assert float(data.params["experts_kept_mean"]) == pytest.approx(20 / 3, abs=1e-3)
    assert data.metrics["kl_nats"] == 0.25
    assert data.metrics["target_gb"] == pytest.approx(4.1)
    assert data.metrics["target_tokens_per_second"] == 19
    assert data.metrics["predicted_kl_nats"] == 0.2
    assert data.metrics["predictor_rank_correlation"] == 0.5
    assert data.tags["candidate"] == own.key
    assert runs["uniform"].data.params["proposed_by"] == "uniform"
    assert runs["trial 2"].data.params["state"] == "stopped early"
    assert runs["trial 1"].info.end_time - runs["trial 1"].info.start_time == 1000
    assert Candidate.from_json(artifact(tracker, runs["trial 1"], "candidate.json")) == own
    lines = artifact(tracker, runs["trial 1"], "tensor-types.txt").splitlines()
    assert [line.rsplit("=")[-1].upper() for line in lines] == [t for _, t in own.types]


def test_every_parameter_is_a_number_or_one_of_few_words(start: Callable[..., Tracker]) -> None:
    tracker = start(tracked.study("columns", 6))
    write(tracker)
    rows = [r.data.params for r in children(tracker).values()]
    assert len({tuple(sorted(row)) for row in rows}) == 1
    for name in rows[0]:
        words = {row[name] for row in rows if not row[name].replace(".", "").isdigit()}
        assert len(words) <= 3, f"{name}: {words}"


def test_bits_per_weight_are_those_of_the_weights_that_stay() -> None:
    routed, other = bits_per_weight(tracked.candidate(MODEL, 3), MODEL)
    assert routed == other == 8.5  # Q8_0: 32 weights in 34 bytes
    mixed = Candidate(
        tracked.candidate(MODEL, 3).layers,
        tuple((n, "Q4_K" if "_exps" in n else t) for n, t in tracked.candidate(MODEL, 3).types),
    )
    assert bits_per_weight(mixed, MODEL) == (4.5, 8.5)


def test_a_second_start_goes_on_and_writes_nothing_twice(start: Callable[..., Tracker]) -> None:
    study = tracked.study("again")
    first = start(study)
    write(first)
    trial = study.get_trials()[1]
    first.log_report(trial, {"report_kl_nats": 0.3}, {"report": {"kl": 0.3}})
    second = start(study)
    assert second.parent == first.parent
    assert second.client.get_run(second.parent).info.status == "RUNNING"
    write(second)
    second.log_report(trial, {"report_kl_nats": 0.3}, {"report": {"kl": 0.3}})
    runs = children(second)
    assert len(runs) == 3
    history = second.client.get_metric_history(runs["trial 1"].info.run_id, "report_kl_nats")
    assert [m.value for m in history] == [0.3]
    assert json.loads(artifact(second, runs["trial 1"], "report.json")) == {"report": {"kl": 0.3}}


def test_a_trial_that_was_cut_short_is_written_anew(start: Callable[..., Tracker]) -> None:
    study = tracked.study("killed")
    tracker = start(study)
    tags = {"mlflow.parentRunId": tracker.parent, "mlflow.runName": "trial 1", "trial": "1"}
    tracker.client.create_run(tracker.experiment, tags=tags)
    write(start(study))
    runs = children(tracker)
    assert len(runs) == 3
    assert runs["trial 1"].data.metrics["kl_nats"] == 0.25


def test_outcome_is_on_the_parent_run(start: Callable[..., Tracker], tmp_path: Path) -> None:
    tracker = start(tracked.study("outcome"))
    write(tracker)
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "candidate.json").write_text("{}")
    files = {
        "": [tmp_path / "result.json", tmp_path / "report.html"], "winner": [tmp_path / "candidate.json"],
    }  # fmt: skip
    tracker.finish({"winner_report_kl_nats": 0.3}, files, "**Winner**: trial 1")
    run = tracker.client.get_run(tracker.parent)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"budget_gb": "5.0", "device": "laptop"}
    assert run.data.metrics == {
        "winner_report_kl_nats": 0.3, "trials_complete": 2, "trials_stopped_early": 1,
    }  # fmt: skip
    assert run.data.tags["mlflow.note.content"] == "**Winner**: trial 1"
    assert {f.path for f in tracker.client.list_artifacts(tracker.parent)} == {"result.json", "winner"}
    assert [f.path for f in tracker.client.list_artifacts(tracker.parent, "winner")] == [
        "winner/candidate.json"
    ]


def test_a_winner_is_one_version_however_often_it_is_registered(
    start: Callable[..., Tracker], tmp_path: Path
) -> None:
    tracker = start(tracked.study("registry"))
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    for kl in ("0.3", "0.2"):
        tags = {"candidate": "abc", "kl_nats": kl}
        assert register(tracker.client, "registry", model, tracker.parent, tags, f"KL {kl}") == "1"
    assert register(tracker.client, "registry", model, tracker.parent, {"candidate": "def"}, "") == "2"
    versions = {str(v.version): v for v in tracker.client.search_model_versions("name = 'registry'")}
    assert versions.keys() == {"1", "2"}
    assert versions["1"].source == model.as_uri()
    assert versions["1"].run_id == tracker.parent
    old = {"candidate": "abc", "kl_nats": "0.2", "path": str(model)}
    assert versions["1"].tags == old | {"superseded_by": "2"}
    assert versions["1"].description == "KL 0.2"
    assert tracker.client.get_model_version_by_alias("registry", "winner").version == versions["2"].version


def test_only_a_file_of_some_size_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model"
    file.write_bytes(b"abc")
    assert sha256(file) == hashlib.sha256(b"abc").hexdigest()
    assert sha256(tmp_path) is None
    monkeypatch.setattr("search.registry.HASHED", 2)
    assert sha256(file) is None


def test_a_write_that_fails_is_one_line_and_not_lost(
    start: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    tracker = start(tracked.study("lost"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MlflowException("gone\nfor good")

    monkeypatch.setattr(tracker.client, "create_run", fail)
    trials = tracker.study.get_trials()
    tracker.log_trial(trials[0], tracked.candidate(MODEL, 0))
    with pytest.raises(UserError, match=r"was lost \(gone\)") as caught:
        tracker.flush()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="was lost"):
        tracker.log_trial(trials[1], tracked.candidate(MODEL, 1))


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://127.0.0.1:CLOSED", "no server answers"),
        ("http://127.0.0.1:port", "no server answers"),
        ("carrier-pigeon://home", "cannot be used"),
        ("mysql+nothing://host/name", "cannot be used"),
        ("sqlite:///FOLDER/no-database", "cannot be used"),
        ("FOLDER/mlruns", "cannot be used"),
    ],
)
def test_a_bad_uri_is_one_line_that_names_the_option(uri: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "no-database").write_text("text" * 100)
    uri = uri.replace("FOLDER", str(tmp_path)).replace("CLOSED", str(closed_port()))
    with pytest.raises(UserError, match=says) as caught:
        Tracker(tracked.study("bad"), uri, tmp_path, {}, MODEL)
    assert "--tracking-uri" in str(caught.value)
    assert "\n" not in str(caught.value)
