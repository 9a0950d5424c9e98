"""A made-up study of a small model, for what is written to MLflow and drawn."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.pareto import front_of
from spaces.candidate import Candidate, MoeLayer
from spaces.inventory import Inventory

STARTED = datetime(2026, 1, 2, 3, 4, 5)


def scores(number: int) -> dict[str, Any]:
    """Lower KL and speed with every trial; all within 5 GB."""
    return {
        "kl": 0.5 / (1 + number), "kl_se": 0.01, "perplexity": 40.0 - number, "bits_per_byte": 1.5,
        "top1": 0.75, "tokens": 512, "target_bytes": 4 * 10**9 + number * 10**8, "model_bytes": 4 * 10**6,
        "device_memory_bytes": 6 * 10**9, "tokens_per_second": 20.0 - number, "tasks": {},
    }  # fmt: skip


def study(name: str, trials: int = 3) -> optuna.Study:
    """The first trial is a baseline, the last was stopped early."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = optuna.create_study(study_name=name)
    for number in range(trials):
        attributes = {"scores": scores(number), "predicted_kl": 0.4 / (1 + number)}
        if number == 0:
            attributes["baseline"] = "uniform"
        stopped = number == trials - 1
        trial = create_trial(
            state=TrialState.PRUNED if stopped else TrialState.COMPLETE,
            value=attributes["scores"]["kl"],
            params={"x": number / trials},
            distributions={"x": FloatDistribution(0, 1)},
            user_attrs=attributes,
        )
        trial.datetime_start = STARTED + timedelta(seconds=number)
        trial.datetime_complete = STARTED + timedelta(seconds=number + 1)
        made.add_trial(trial)
    return made


def candidate(model: Inventory, number: int) -> Candidate:
    """Portable where `number` is even; fewer experts and more bits with every trial."""
    types = Candidate.uniform(model, ("Q3_K", "Q4_K", "Q6_K", "Q8_0")[number % 4]).types
    kept = max(2, model.experts - number)
    layers = tuple(
        MoeLayer(layer, tuple(range(kept - (number % 2 and i == 0))), 1)
        for i, layer in enumerate(model.moe_layers)
    )
    return Candidate(layers, types)


def result(of: optuna.Study, model: Inventory) -> dict[str, Any]:
    """What result.json holds of it that pictures need."""

    def record(t: FrozenTrial) -> dict[str, Any]:
        own = candidate(model, t.number)
        return {
            "number": t.number, "state": t.state.name, "baseline": t.user_attrs.get("baseline"),
            "portable": own.portable, "candidate": json.loads(own.to_json()),
            "scores": t.user_attrs["scores"], "predicted_kl": t.user_attrs["predicted_kl"],
        }  # fmt: skip

    records = [record(t) for t in of.get_trials(deepcopy=False)]
    complete = [r for r in records if r["state"] == "COMPLETE"]
    best = {
        form: min((r["number"] for r in complete if r["portable"] == (form == "portable")), default=None)
        for form in ("portable", "ragged")
    }
    return {
        "trials": records, "front": front_of(records), "winners": best, "budget_bytes": 5 * 10**9,
        "target": "big", "model": model.name, "device": "laptop", "study": of.study_name,
    }  # fmt: skip
