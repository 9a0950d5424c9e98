"""Rankings follow their published formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compression.calibration import Calibration
from compression.expert_pruning import CRITERIA, importance, protected, rankings
from tests.compression.support import EVERY


def calibration(**routing: Any) -> Calibration:
    """Statistics of two layers of four experts; what is not given is 1 everywhere."""
    names = ("tokens", "score", "mass", "reap", "peak")
    values = {name: np.array(routing.get(name, np.ones((2, 4))), np.float64) for name in names}
    return Calibration({}, values, 100, "text")


MEASURED = calibration(
    tokens=[[10, 40, 0, 30], [5, 5, 10, 20]],
    score=[[0.9, 0.3, 0.0, 0.6], [0.5, 0.25, 0.1, 0.2]],
    mass=[[3, 9, 0, 1], [1, 2, 3, 4]],
    reap=[[7, 1, 0, 2], [4, 3, 2, 1]],
)


def test_the_papers_score_mixes_frequency_and_router_score_over_the_layers_maximum() -> None:
    found = importance(MEASURED, "paper", alpha=0.25)
    expected = [
        [0.25 * 10 / 40 + 0.75 * 1, 0.25 * 1 + 0.75 * 0.3 / 0.9, 0, 0.25 * 0.75 + 0.75 * 0.6 / 0.9],
        [0.25 * 0.25 + 0.75, 0.25 * 0.25 + 0.75 * 0.5, 0.25 * 0.5 + 0.75 * 0.2, 0.25 + 0.75 * 0.4],
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_layer_without_tokens_has_no_importance_but_a_ranking() -> None:
    empty = calibration(**dict.fromkeys(("tokens", "score", "mass", "reap", "peak"), np.zeros((2, 4))))
    assert not importance(empty, "paper").any()
    for ranking in rankings(empty, (3, 4)).values():
        assert ranking == {3: (0, 1, 2, 3), 4: (0, 1, 2, 3)}


def test_every_criterion_ranks_every_layer_by_its_own_statistic() -> None:
    found = rankings(MEASURED, (3, 7))
    assert tuple(found) == CRITERIA
    assert found["reap"] == {3: (0, 3, 1, 2), 7: (0, 1, 2, 3)}
    assert found["mass"] == {3: (1, 0, 3, 2), 7: (3, 2, 1, 0)}
    # Layer 3: 0.625, 0.667, 0, 0.708; layer 7: 0.625, 0.375, 0.35, 0.7.
    assert found["paper"] == {3: (3, 1, 0, 2), 7: (3, 0, 1, 2)}


def test_equal_experts_keep_their_order() -> None:
    assert rankings(calibration(), (0, 1))["reap"] == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}


def test_super_experts_come_first_whatever_the_criterion() -> None:
    outlier = calibration(
        peak=[[1, 1, 1, 10.5], [1, 1, 1, 9.5]], reap=[[4, 3, 2, 1]] * 2, mass=[[4, 3, 2, 1]] * 2
    )
    assert protected(outlier) == [(3,), ()]
    for criterion in ("reap", "mass"):
        assert rankings(outlier, (0, 1))[criterion] == {0: (3, 0, 1, 2), 1: (0, 1, 2, 3)}


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"criterion must be one of .* got 'random'"):
        importance(MEASURED, "random")


def test_rankings_of_a_real_calibration_name_every_expert_once(tiny_calibration: Calibration) -> None:
    found = rankings(tiny_calibration, (1, 2))
    for ranking in found.values():
        for order in ranking.values():
            assert sorted(order) == list(EVERY)
    assert len({str(ranking) for ranking in found.values()}) > 1
