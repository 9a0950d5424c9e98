"""How routing of a candidate compares with the base model's, on a small random model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compression.candidate_model import CandidateModel
from compression.setting import Settings
from evaluators.routing import LayerRouting, routing
from evaluators.texts import TextSet


def measured(
    model: CandidateModel, text: TextSet, keep: tuple[int, ...] | None, top_k: int | None = None
) -> list[LayerRouting]:
    """Routing with the same experts kept in every layer."""
    settings = Settings(model.inventory)
    setting = settings.base
    for layer in model.inventory.moe_layers:
        setting = settings.routed(setting, layer, keep, top_k)
    return routing(model, setting, settings.base, text, lambda ours: None)


@pytest.fixture
def text(tiny_texts: dict[str, TextSet]) -> TextSet:
    return tiny_texts["search"].head(256)


def test_the_base_model_routes_as_itself(tiny_model: CandidateModel, text: TextSet) -> None:
    for row in measured(tiny_model, text, None):
        assert row.kept_mass == pytest.approx(1.0)
        assert row.agreement == 1.0
        assert row.entropy == row.entropy_base
        assert row.load == row.load_base
        assert sum(row.load) == pytest.approx(1.0, abs=1e-4)
        assert 0 < row.entropy <= np.log(tiny_model.inventory.top_k) + 1e-9


def test_pruned_experts_get_nothing_and_their_mass_is_lost(tiny_model: CandidateModel, text: TextSet) -> None:
    keep = (1, 2, 4, 5, 7)
    gone = [e for e in range(tiny_model.inventory.experts) if e not in keep]
    rows = measured(tiny_model, text, keep)
    for row in rows:
        assert sum(row.load[e] for e in gone) == 0
        assert sum(row.load[e] for e in keep) == pytest.approx(1.0, abs=1e-4)
        assert 0 < row.kept_mass < 1
    # Before the first MoE layer nothing differs, so there every kept choice of the base model is made again.
    lost = sum(rows[0].load_base[e] for e in gone)
    assert rows[0].agreement == pytest.approx(1 - lost, abs=1e-4)


def test_fewer_active_experts_agree_less_but_keep_all_mass(tiny_model: CandidateModel, text: TextSet) -> None:
    for row in measured(tiny_model, text, None, 1):
        assert row.kept_mass == pytest.approx(1.0)
        assert row.agreement <= 0.5 + 1e-9
        assert row.entropy == pytest.approx(0.0, abs=1e-6)


def test_the_model_is_told_when_its_repairs_count(tiny_model: CandidateModel, text: TextSet) -> None:
    said: list[bool] = []
    settings = Settings(tiny_model.inventory)
    routing(tiny_model, settings.base, settings.base, replace(text, windows=text.windows[:1]), said.append)
    assert said == [False, True]
