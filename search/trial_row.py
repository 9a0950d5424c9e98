"""What MLflow shows of a trial: decisions as parameters, results as metrics, units in the names."""

from __future__ import annotations

from typing import Any

from optuna.trial import FrozenTrial, TrialState

from spaces.candidate import Candidate
from spaces.inventory import Inventory
from spaces.space import PORTABLE, RAGGED

_METRICS = {
    "kl": ("kl_nats", 1.0),
    "kl_se": ("kl_se_nats", 1.0),
    "perplexity": ("perplexity", 1.0),
    "bits_per_byte": ("bits_per_byte", 1.0),
    "top1": ("top1_agreement", 1.0),
    "tokens": ("scored_tokens", 1.0),
    "target_bytes": ("target_gb", 1e-9),
    "model_bytes": ("model_gb", 1e-9),
    "device_memory_bytes": ("device_memory_gb", 1e-9),
    "tokens_per_second": ("target_tokens_per_second", 1.0),
}
"""Score to its metric's name and factor; a GB is 10^9 bytes."""

FINAL = ("kl", "perplexity", "top1")
"""Scores on the selection and report texts that a finalist's run shows."""


def metrics(scores: dict[str, Any], prefix: str = "", only: tuple[str, ...] = ()) -> dict[str, float]:
    """Scores under the names of their metrics, in 6 digits: tables show no more.

    Args:
        scores: Fields of `Scores`; others are left out.
        prefix: Of every name.
        only: The fields to take; empty for all.
    """
    return {
        prefix + name: float(f"{float(scores[field]) * factor:.6g}")
        for field, (name, factor) in _METRICS.items()
        if field in scores and (not only or field in only)
    }


def bits_per_weight(candidate: Candidate, inventory: Inventory) -> tuple[float, float]:
    """Mean bits of the weights that stay: of routed experts, and of all other quantizable tensors.

    Args:
        candidate: Of the searched model.
        inventory: Of the searched model.
    """
    kept, types = dict(candidate.plan.kept), dict(candidate.types)
    sums = {True: [0, 0], False: [0, 0]}
    for t in inventory.quantizable:
        experts = kept.get(t.layer) if t.layer is not None else None
        weights = 1
        for axis in t.kept_shape(experts):
            weights *= axis
        sums[t.per_expert][0] += 8 * t.bytes(types[t.name], experts)
        sums[t.per_expert][1] += weights
    routed, other = (bits / max(1, weights) for bits, weights in (sums[True], sums[False]))
    return routed, other


def row(
    trial: FrozenTrial, candidate: Candidate, inventory: Inventory
) -> tuple[dict[str, str], dict[str, float]]:
    """Parameters and metrics of a finished trial.

    Parameters are few, and numbers or words of a small set, so that MLflow's parallel
    coordinates and scatter plots take them as they are.
    """
    plan = candidate.plan
    kept, top_k = [n for _, n in plan.kept], [k for _, k in plan.top_k]
    routed, other = bits_per_weight(candidate, inventory)
    params = {
        "expert_bits_per_weight": f"{routed:.3f}",
        "other_bits_per_weight": f"{other:.3f}",
        "experts_kept_mean": f"{sum(kept) / len(kept):.3f}",
        "top_k_mean": f"{sum(top_k) / len(top_k):.3f}",
        "form": PORTABLE if candidate.portable else RAGGED,
        "proposed_by": trial.user_attrs.get("baseline") or "sampler",
        "state": "complete" if trial.state == TrialState.COMPLETE else "stopped early",
    }
    found = metrics(trial.user_attrs["scores"])
    found["predicted_kl_nats"] = float(f"{trial.user_attrs['predicted_kl']:.6g}")
    return params, found
