"""MLflow: one parent run per study, one child run per trial, written by the driver only.

One `log_batch` per trial: MLflow's asynchronous logging was measured 20 times
slower, and several writers on one SQLite file 4 times. Trials are written by one
thread, as a database waits for the disk longer than it computes; their artifacts
go straight into a local artifact folder. `experiments.tracking_time` measures it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from compression.files import write_text
from search.commands import exhausted
from search.locks import alone
from search.results import tensor_types
from search.tracking_view import VIEW_KEY, saved_view
from search.trial_row import row
from search.whole_file import make_database
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.inventory import Inventory

_PATIENCE = 60  # looks for what another driver is writing


class Tracker:
    """Writes a study to MLflow; goes on with the parent run of an earlier start.

    Args:
        study: Holds the ids of runs that exist already.
        uri: Tracking server; None is a SQLite file in `out`.
        out: Folder of the run.
        params: What the parent run is labelled with.
        inventory: Of the searched model.
        elsewhere: Tells of which finished trials another living driver takes care.

    Attributes:
        client: MLflow's client of the tracking server and its model registry.
        parent: Id of the study's run.

    Raises:
        UserError: MLflow cannot use the URI, or nothing answers there.
    """

    def __init__(
        self,
        study: Study,
        uri: str | None,
        out: Path,
        params: Mapping[str, Any],
        inventory: Inventory,
        elsewhere: Callable[[], Callable[[FrozenTrial], bool]] = lambda: lambda trial: False,
    ) -> None:
        self.study, self.inventory, self.elsewhere = study, inventory, elsewhere
        self.uri = tracking_uri(uri, out)
        with self.told("cannot be used"):
            self.client = _client(self.uri)
            with alone(out / "tracking.lock", "opening MLflow"):
                self.experiment = self._experiment(out if self.uri.startswith("sqlite:") else None)
                self.parent = self._parent(params)
            self._logged = self._known(clear=True)
        self._writer = ThreadPoolExecutor(1, "mlflow")
        self._queue: dict[str, Future[Any]] = {}

    def _known(self, clear: bool = False) -> dict[str, Any]:
        """Trial number to its run's info, of trials that are written; with `clear`, others' remains go."""
        runs = self.client.search_runs(
            [self.experiment], f"tags.`mlflow.parentRunId` = '{self.parent}'", max_results=50_000
        )
        if clear:
            others = self.elsewhere()
            busy = {str(t.number) for t in self.study.get_trials(deepcopy=False) if others(t)}
            for run in runs:
                if run.info.status != "FINISHED" and run.data.tags["trial"] not in busy:
                    self.client.delete_run(run.info.run_id)
        return {r.data.tags["trial"]: r.info for r in runs if r.info.status == "FINISHED"}

    def log_all(self, candidate: Callable[[FrozenTrial], Candidate]) -> None:
        """Has the finished trials written that are not yet, but for those another driver takes care of."""
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        others = self.elsewhere()
        for trial in self.study.get_trials(deepcopy=False, states=states):
            if "scores" in trial.user_attrs and not others(trial):
                self.log_trial(trial, candidate(trial))

    def told(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Turns what MLflow raises into one line on the tracking URI."""
        return _told(self.uri, what)

    def _experiment(self, out: Path | None) -> str:
        from mlflow.exceptions import MlflowException

        name = self.study.study_name
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # Without a location MLflow would put artifacts under the current folder.
        location = None if out is None else (out / "mlartifacts").as_uri()
        tags = {"mlflow.experimentKind": "custom_model_development", VIEW_KEY: saved_view()}
        try:
            return str(self.client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)  # of a driver on another machine, made a moment ago

    def _parent(self, params: Mapping[str, Any]) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        # Drivers that track to another place have a parent run of their own there.
        attribute = f"mlflow_run {tracking_place(self.uri)}"
        known = self.study.user_attrs.get(attribute)
        if known is not None:
            with contextlib.suppress(MlflowException):
                if self.client.get_run(known).info.lifecycle_stage == "active":
                    self.client.update_run(known, status="RUNNING")
                    return str(known)
        tags = {"mlflow.runName": f"study {self.study.study_name}", "kind": "study"}
        run = self.client.create_run(self.experiment, tags=tags)
        labels = [Param(key, str(value)[:500]) for key, value in params.items()]
        self.client.log_batch(run.info.run_id, params=labels)
        self.study.set_user_attr(attribute, run.info.run_id)
        return str(run.info.run_id)

    def log_trial(
        self, trial: FrozenTrial, candidate: Candidate, rank_correlation: float | None = None
    ) -> None:
        """Has a finished trial written as a child run, once; with how well the predictor ranked by then.

        A trial that a killed run was writing is written anew.

        Raises:
            UserError: An earlier trial could not be written.
        """
        number = str(trial.number)
        if number in self._logged or number in self._queue:
            return
        self._settle(waiting=False)
        params, figures = row(trial, candidate, self.inventory)
        if rank_correlation is not None:
            figures["predictor_rank_correlation"] = rank_correlation
        self._queue[number] = self._writer.submit(self._write, trial, candidate, params, figures)

    def _write(
        self, trial: FrozenTrial, candidate: Candidate, params: dict[str, str], figures: dict[str, float]
    ) -> Any:
        """Writes a trial; returns its run's info."""
        from mlflow.entities import Param

        begun, ended = _milliseconds(trial.datetime_start), _milliseconds(trial.datetime_complete)
        name = trial.user_attrs.get("baseline") or f"trial {trial.number}"
        own = {
            "mlflow.parentRunId": self.parent, "mlflow.runName": name,
            "trial": str(trial.number), "candidate": candidate.key,
        }  # fmt: skip
        with self.told("was lost"):
            run = self.client.create_run(self.experiment, start_time=begun, tags=own)
            self.client.log_batch(
                run.info.run_id,
                metrics=_metrics(figures, ended),
                params=[Param(k, v) for k, v in params.items()],
            )
            self._put(run.info, "candidate.json", candidate.to_json() + "\n")
            self._put(run.info, "tensor-types.txt", tensor_types(candidate.plan))
            self.client.set_terminated(run.info.run_id, "FINISHED", ended)
        return run.info

    def flush(self) -> None:
        """Waits until every trial is written.

        Raises:
            UserError: A trial could not be written.
        """
        self._settle(waiting=True)

    def _settle(self, waiting: bool) -> None:
        """Takes note of what is written, in the order it was queued; up to the first that is not yet."""
        while self._queue:
            number, written = next(iter(self._queue.items()))
            if not waiting and not written.done():
                return
            self._logged[number] = written.result()
            del self._queue[number]

    def close(self) -> None:
        """Waits until nothing is written any more; what failed was told, or is made good by the next run."""
        self._writer.shutdown(wait=True)

    def log_report(self, trial: FrozenTrial, figures: dict[str, float], content: dict[str, Any]) -> None:
        """Adds a finalist's scores on text no trial saw to its run, all of them as report.json."""
        self.flush()
        info = self._run_of(str(trial.number))
        with self.told("was lost"):
            # The time of the trial, so that a rerun writes nothing twice.
            self.client.log_batch(
                info.run_id, metrics=_metrics(figures, _milliseconds(trial.datetime_complete))
            )
            self._put(info, "report.json", json.dumps(content, indent=1) + "\n")

    def _run_of(self, number: str) -> Any:
        """The info of a trial's run, waited for where another driver is about to write it."""
        for _ in range(_PATIENCE):
            if number in self._logged:
                break
            self._logged |= self._known()
            time.sleep(0.5)
        if number not in self._logged:
            raise UserError(
                f"--tracking-uri {self.uri}: trial {number} is missing there; run the same command again"
            )
        return self._logged[number]

    def _put(self, info: Any, name: str, text: str) -> None:
        """Writes an artifact, in place where the artifact folder is on this machine."""
        where = urlparse(info.artifact_uri)
        if where.scheme in ("", "file"):
            write_text(Path(unquote(where.path)) / name, text)
        else:
            self.client.log_text(info.run_id, text, name)

    def finish(self, figures: dict[str, float], files: Mapping[str, Sequence[Path]], note: str) -> None:
        """Puts the study's outcome on the parent run.

        Args:
            figures: Metrics.
            files: Artifact folder (empty for the top one) to files; those that do not exist are left out.
            note: Markdown, shown as the run's description.
        """
        from mlflow.entities import RunTag

        self.flush()
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        complete = sum(t.state == TrialState.COMPLETE for t in done)
        counts = {"trials_complete": float(complete), "trials_stopped_early": float(len(done) - complete)}
        with self.told("was lost"):
            self.client.log_batch(
                self.parent,
                metrics=_metrics(figures | counts, _milliseconds(None)),
                tags=[RunTag("mlflow.note.content", note)],
            )
            for folder, paths in files.items():
                for path in filter(Path.is_file, paths):
                    self.client.log_artifact(self.parent, str(path), folder or None)
            self.client.set_terminated(self.parent, "FINISHED")


def tracking_uri(uri: str | None, out: Path) -> str:
    """The tracking server's URI: as given, or a SQLite file in the run's folder."""
    path = str(out / "mlflow.db").replace("%", "%25").replace("?", "%3F")  # mean something in a URL
    return uri or f"sqlite:///{path}"


def tracking_place(uri: str) -> str:
    """A name of what a URI leads to from here, the same for all who write to it; it hides passwords."""
    local = urlparse(uri).scheme in ("", "file", "sqlite")
    return hashlib.sha256(f"{platform.node() if local else ''} {uri}".encode()).hexdigest()[:16]


def _metrics(figures: Mapping[str, float], timestamp: int) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(name, value, timestamp, 0) for name, value in figures.items()]


def _milliseconds(moment: datetime | None) -> int:
    return int((moment.timestamp() if moment else time.time()) * 1000)


def check_tracking(uri: str) -> None:
    """Asks a tracking server for an experiment; a SQLite file that is not there yet is made.

    Raises:
        UserError: MLflow cannot use the URI, or nothing answers there.
    """
    with _told(uri, "cannot be used"):
        _client(uri).search_experiments(max_results=1)


@contextlib.contextmanager
def _told(uri: str, what: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except UserError:
        raise
    except (MlflowException, SQLAlchemyError, ImportError, OSError, ValueError) as error:
        failed = exhausted(error)
        if failed is not None:
            raise UserError(f"--tracking-uri {uri}: {what}: {failed}") from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UserError(
            f"--tracking-uri {uri}: {what} ({reason}); give a URI MLflow can write to, as "
            "sqlite:///FILE or http://HOST:PORT, and run the same command again"
        ) from error


def _client(uri: str) -> Any:
    """MLflow's client, which tells nobody and is quiet."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    # A server's client would print two lines for every trial.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    # It logs errors in full before it raises them; `told` makes a line of them.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    _answers(uri)
    make_database(uri, _make_tables)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_tables(uri: str) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, "./mlruns").engine.dispose()


def _answers(uri: str) -> None:
    """Tries a server's port: MLflow itself would try for minutes."""
    where = urlparse(uri)
    if where.scheme not in ("http", "https"):
        return
    try:
        port = where.port or (443 if where.scheme == "https" else 80)
        socket.create_connection((where.hostname or "", port), timeout=3).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tracking-uri {uri}: no server answers there ({error}); start one with `mlflow server`, "
            "or leave the option out"
        ) from error
