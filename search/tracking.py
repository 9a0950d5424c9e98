"""MLflow: one parent run per study, one child run per trial, written by the driver only.

One `log_batch` per trial: asynchronous logging was measured 20 times slower,
and several writers on one SQLite file 4 times.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.trial import FrozenTrial

from spaces.candidate import Candidate
from spaces.errors import UserError

_METRICS = {
    "kl": "kl_nats",
    "kl_se": "kl_se_nats",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
    "top1": "top1_agreement",
    "tokens": "scored_tokens",
    "target_bytes": "target_bytes",
    "model_bytes": "model_bytes",
    "device_memory_bytes": "device_memory_bytes",
    "tokens_per_second": "target_tokens_per_second",
}


class Tracker:
    """Writes a study to MLflow; goes on with the parent run of an earlier start.

    Args:
        study: Holds the ids of runs that exist already.
        uri: Tracking server; None is a SQLite file in `out`.
        out: Folder of the run.
        params: What the parent run is labelled with.
    """

    def __init__(self, study: Study, uri: str | None, out: Path, params: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
        import mlflow
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self.study = study
        self.uri = uri or f"sqlite:///{out / 'mlflow.db'}"
        try:
            self.client = mlflow.MlflowClient(tracking_uri=self.uri)
            self.experiment = self._experiment(out if uri is None else None)
            self.parent = self._parent(params)
        except (MlflowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"--tracking-uri {self.uri}: MLflow cannot use it ({reason})") from error
        runs = self.client.search_runs(
            [self.experiment], f"tags.`mlflow.parentRunId` = '{self.parent}'", max_results=50_000
        )
        self._logged = {r.data.tags.get("trial"): r.info.run_id for r in runs}

    def _experiment(self, out: Path | None) -> str:
        name = self.study.study_name
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # Without a location MLflow would put artifacts under the current folder.
        location = None if out is None else (out / "mlartifacts").as_uri()
        return str(self.client.create_experiment(name, artifact_location=location))

    def _parent(self, params: dict[str, Any]) -> str:
        from mlflow.exceptions import MlflowException

        known = self.study.user_attrs.get("mlflow_run")
        if known is not None:
            with contextlib.suppress(MlflowException):
                self.client.get_run(known)
                return str(known)
        tags = {"mlflow.runName": f"study {self.study.study_name}", "kind": "study"}
        run = self.client.create_run(self.experiment, tags=tags)
        for key, value in params.items():
            self.client.log_param(run.info.run_id, key, str(value)[:500])
        self.study.set_user_attr("mlflow_run", run.info.run_id)
        return str(run.info.run_id)

    def log_trial(
        self, trial: FrozenTrial, candidate: Candidate, rank_correlation: float | None = None
    ) -> None:
        """Writes a finished trial as a child run, once; with how well the predictor ranked by then."""
        from mlflow.entities import Metric, Param, RunTag

        if str(trial.number) in self._logged:
            return
        now = int(time.time() * 1000)
        begun = int(trial.datetime_start.timestamp() * 1000) if trial.datetime_start else now
        name = trial.user_attrs.get("baseline") or f"trial {trial.number}"
        tags = {"mlflow.parentRunId": self.parent, "mlflow.runName": name, "trial": str(trial.number)}
        run = self.client.create_run(self.experiment, start_time=begun, tags=tags)
        scores, plan = trial.user_attrs["scores"], candidate.plan
        kept, top_k = [n for _, n in plan.kept], [k for _, k in plan.top_k]
        summary = {
            "form": "portable" if candidate.portable else "ragged",
            "experts_kept": ",".join(map(str, kept)),
            "top_k": ",".join(map(str, top_k)),
            "baseline": trial.user_attrs.get("baseline", ""),
        }
        metrics = {_METRICS[k]: float(v) for k, v in scores.items() if k in _METRICS}
        metrics |= {"experts_kept_mean": sum(kept) / len(kept), "top_k_mean": sum(top_k) / len(top_k)}
        metrics["predicted_kl_nats"] = float(trial.user_attrs["predicted_kl"])
        if rank_correlation is not None:
            metrics["predictor_rank_correlation"] = rank_correlation
        self.client.log_batch(
            run.info.run_id,
            metrics=[Metric(k, v, now, 0) for k, v in metrics.items()],
            params=[Param(k, v) for k, v in summary.items()],
            tags=[RunTag("state", trial.state.name), RunTag("candidate", candidate.key)],
        )
        self.client.log_dict(run.info.run_id, json.loads(candidate.to_json()), "candidate.json")
        self.client.set_terminated(run.info.run_id, "FINISHED")
        self._logged[str(trial.number)] = run.info.run_id

    def finish(self, metrics: dict[str, float], files: list[Path]) -> None:
        """Puts the study's outcome and pictures on the parent run."""
        for key, value in metrics.items():
            self.client.log_metric(self.parent, key, value)
        for file in files:
            self.client.log_artifact(self.parent, str(file))
        self.client.set_terminated(self.parent, "FINISHED")
