"""Which experts of a layer stay: rankings from calibration, and the choice they lead to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compression.calibration import Calibration

CRITERIA = ("reap", "mass", "paper")
"""REAP saliency; router mass; the paper's I = alpha * f + (1 - alpha) * s (arXiv 2509.25689)."""

PAPER_ALPHA = 0.5

# A super expert's largest output towers over its layer's: pruning one alone breaks a model.
_SUPER_PEAK = 10.0


def importance(calibration: Calibration, criterion: str, alpha: float = PAPER_ALPHA) -> np.ndarray:
    """(MoE layers, experts) importance, higher stays longer.

    The paper's score adds activation frequency and mean router score, both
    divided by the layer's maximum.
    """
    routing = calibration.routing
    if criterion == "paper":
        frequency, score = routing["tokens"], routing["score"]
        return np.asarray(
            alpha * frequency / np.maximum(frequency.max(1, keepdims=True), 1e-30)
            + (1 - alpha) * score / np.maximum(score.max(1, keepdims=True), 1e-30)
        )
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
    return routing[criterion]


def protected(calibration: Calibration) -> list[tuple[int, ...]]:
    """Super experts per MoE layer: their peak output exceeds ten times the layer's median."""
    peak = calibration.routing["peak"]
    limit = _SUPER_PEAK * np.median(peak, axis=1, keepdims=True)
    return [tuple(int(e) for e in np.flatnonzero(row)) for row in peak > limit]


def rankings(calibration: Calibration, layers: Sequence[int]) -> dict[str, dict[int, tuple[int, ...]]]:
    """criterion -> layer -> experts, most important first, super experts ahead of all."""
    supers = protected(calibration)
    out: dict[str, dict[int, tuple[int, ...]]] = {}
    for criterion in CRITERIA:
        score = importance(calibration, criterion)
        out[criterion] = {}
        for position, layer in enumerate(layers):
            order = np.argsort(-score[position], kind="stable")
            first = [e for e in order if e in supers[position]]
            rest = [e for e in order if e not in supers[position]]
            out[criterion][layer] = tuple(int(e) for e in (*first, *rest))
    return out
