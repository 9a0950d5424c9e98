"""The pages of MLflow that a study is looked at on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from search.tracking_view import TRAINING, view_link
from spaces.errors import UserError


@dataclass(frozen=True)
class Pages:
    """Addresses of a study's pages.

    Attributes:
        address: Of the server.
        experiment: Id of the study's experiment.
        parent: Id of the study's run.
        best: Ids of the complete trials with the lowest KL.
    """

    address: str
    experiment: str
    parent: str
    best: tuple[str, ...]

    @classmethod
    def of(cls, address: str, study: str, compared: int = 30) -> Pages:
        """Asks the server.

        Raises:
            UserError: It has no such study.
        """
        import mlflow

        client: Any = mlflow.MlflowClient(tracking_uri=address)
        found = client.get_experiment_by_name(study)
        if found is None:
            raise UserError(f"{address}: has no study {study!r}; give the folder search.run wrote")
        ids = [found.experiment_id]
        parent = client.search_runs(ids, "tags.kind = 'study'")[0].info.run_id
        order = ["metrics.kl_nats ASC"]
        best = client.search_runs(ids, "params.state = 'complete'", order_by=order, max_results=compared)
        return cls(address, found.experiment_id, parent, tuple(r.info.run_id for r in best))

    @property
    def runs(self) -> str:
        """Complete trials by KL."""
        return f"{self.address}/{view_link(self.experiment)}"

    @property
    def study(self) -> str:
        """The study's run."""
        return f"{self.address}/#/experiments/{self.experiment}/runs/{self.parent}?{TRAINING}"

    def artifact(self, name: str) -> str:
        """A file of the study's run."""
        run = f"#/experiments/{self.experiment}/runs/{self.parent}"
        return f"{self.address}/{run}/artifacts/{name}?{TRAINING}"

    @property
    def compare(self) -> str:
        """The best trials side by side."""
        runs, experiments = quote(json.dumps(self.best)), quote(json.dumps([self.experiment]))
        return f"{self.address}/#/compare-runs?runs={runs}&experiments={experiments}&{TRAINING}"
