"""The list of trials that MLflow's page has under Views: what is worth seeing, best first.

MLflow's page keeps saved views as experiment tags; one that does not know this
form ignores it.
"""

from __future__ import annotations

import json
import time

VIEW = "trials"
TRAINING = "workflowType=machine_learning"
"""Query of a page that hides what MLflow has for language model applications."""
VIEW_KEY = f"mlflow.sharedViewState.{VIEW}"

_COLUMNS = {
    "metrics": (
        "kl_nats",
        "report_kl_nats",
        "perplexity",
        "target_gb",
        "target_tokens_per_second",
        "predicted_kl_nats",
    ),
    "params": ("form", "proposed_by", "experts_kept_mean", "top_k_mean", "expert_bits_per_weight"),
}


def saved_view() -> str:
    """Complete trials by KL, with decisions and results as columns."""
    state = {
        "searchFilter": "params.state = 'complete'",
        "orderByKey": "metrics.`kl_nats`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [f"{kind}.`{name}`" for kind, names in _COLUMNS.items() for name in names],
        "runsHiddenMode": "SHOW_ALL",
    }
    now = int(time.time() * 1000)
    return json.dumps(
        {"name": "Complete trials by KL", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    )


def view_link(experiment: str) -> str:
    """Where a page of MLflow shows the view."""
    return f"#/experiments/{experiment}/runs?viewStateShareKey={VIEW}&{TRAINING}"
