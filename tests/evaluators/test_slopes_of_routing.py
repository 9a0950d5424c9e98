"""Slopes of expert counts and top-k are what a block's changed output does to the divergence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.calibration import Calibration
from compression.candidate_model import CandidateModel
from compression.expert_pruning import rankings
from compression.setting import Setting, Settings
from evaluators.divergence import base_states, measure
from evaluators.sensitivity import alone
from evaluators.slopes import Option, Slope, Slopes
from evaluators.texts import TextSet
from spaces.space import Space
from tests.compression.support import candidate, provide

TYPES = ("Q2_K", "Q8_0")
TOP_K: list[Option] = [("blk.1.top_k", 1), ("blk.2.top_k", 1)]
OPTIONS: list[Option] = [
    *TOP_K,
    *((f"blk.{layer}.experts", (n, c)) for layer in (1, 2) for n in (7, 6, 2) for c in ("reap", "paper")),
]


@pytest.fixture
def space(tiny_model: CandidateModel, tiny_calibration: Calibration) -> Space:
    inventory = tiny_model.inventory
    found = Space(inventory, rankings(tiny_calibration, inventory.moe_layers), types=TYPES)
    for which in (0, -1):
        types = {t.name: found.ladder(t)[which] for t in inventory.quantizable}
        provide(tiny_model, candidate(inventory, types=types))
    return found


@pytest.fixture
def text(tiny_texts: dict[str, TextSet]) -> TextSet:
    whole = tiny_texts["search"]
    return replace(whole, windows=whole.windows[:4, :32], sources=("x",) * 4)


@pytest.fixture
def states(tiny_model: CandidateModel, text: TextSet, tmp_path: Path) -> np.ndarray:
    base_states(tiny_model, text, tmp_path / "states.npy")
    found: np.ndarray = np.load(tmp_path / "states.npy")
    return found


def coarse(space: Space, experts: dict[int, tuple[int, ...]] | None = None) -> Setting:
    """Everything in the lowest type."""
    of = Settings(space.inventory)
    setting = of.of_types({t.name: space.ladder(t)[0] for t in space.inventory.quantizable})
    for layer, kept in (experts or {}).items():
        setting = of.routed(setting, layer, kept)
    return setting


def use(model: CandidateModel, setting: Setting) -> None:
    for layer, block in enumerate(setting.blocks):
        model.set_block(layer, block)


def test_at_the_uncompressed_model_they_are_about_the_measured_cost(
    tiny_model: CandidateModel, space: Space, text: TextSet, states: np.ndarray
) -> None:
    settings = Settings(space.inventory)
    found = Slopes(tiny_model, space).at(settings.base, text, states, probes=8, routing=OPTIONS)
    costs = []
    for option in OPTIONS:
        use(tiny_model, alone(settings, space, *option))
        costs.append(measure(tiny_model, text, states).mean_kl)
    second = [found[option].second for option in OPTIONS]
    assert all(found[option].first == 0 for option in OPTIONS)
    assert min(costs) > 5e-4
    assert (np.abs(np.log(np.array(second) / costs)) < np.log(2.5)).all()
    assert np.corrcoef(np.log(second), np.log(costs))[0, 1] > 0.9


def test_the_first_order_is_the_slope_of_a_part_of_the_change(
    tiny_model: CandidateModel, space: Space, text: TextSet, states: np.ndarray
) -> None:
    """Where no later block has a choice of experts."""
    setting = coarse(space, {1: (0, 3), 2: (2, 5)})
    found = Slopes(tiny_model, space).at(setting, text, states, probes=0, routing=TOP_K)
    windows = torch.from_numpy(text.windows.astype(np.int64))
    base = (torch.from_numpy(states) @ tiny_model.base_output.T).log_softmax(-1)

    def kl(layer: int, leaving: torch.Tensor) -> float:
        last = tiny_model.run(leaving, layer + 1, space.inventory.layers)
        own = tiny_model.logits(tiny_model.norm(last)).log_softmax(-1)
        return float((base.exp() * (base - own)).sum(-1).mean())

    for decision, k in TOP_K:
        layer = int(decision.split(".")[1])
        with torch.no_grad():
            use(tiny_model, setting)
            entering, leaving = [x.clone() for x in tiny_model.layer_states(windows)][layer : layer + 2]
            tiny_model.set_block(layer, replace(setting.blocks[layer], top_k=1))
            change = tiny_model.run(entering, layer, layer + 1) - leaving
            expected = (kl(layer, leaving + 0.05 * change) - kl(layer, leaving - 0.05 * change)) / 0.1
        assert abs(expected) > 1e-4
        assert found[decision, k].first == pytest.approx(expected, rel=0.05, abs=2e-5)


def test_types_have_the_slopes_they_have_alone(
    tiny_model: CandidateModel, space: Space, text: TextSet, states: np.ndarray
) -> None:
    slopes, setting = Slopes(tiny_model, space), coarse(space)
    plain = slopes.at(setting, text, states, probes=1)
    tiny_model.reset()
    found = slopes.at(setting, text, states, probes=1, routing=OPTIONS)
    assert found.keys() == plain.keys() | set(OPTIONS)
    assert {option: found[option] for option in plain} == plain


def test_what_a_setting_has_changes_nothing(
    tiny_model: CandidateModel, space: Space, text: TextSet, states: np.ndarray
) -> None:
    setting = coarse(space, {1: space.experts(1, 6, "reap")})
    same: list[Option] = [("blk.1.experts", (6, "reap")), ("blk.1.top_k", 2), ("blk.2.top_k", 2)]
    found = Slopes(tiny_model, space).at(setting, text, states, probes=1, routing=[*same, *TOP_K])
    assert [found[option] for option in same] == [Slope(0, 0)] * 3
    assert all(found[option].second > 0 for option in TOP_K)


@pytest.mark.parametrize("held", [0, 10**5, 10**6])
def test_gradients_projected_in_pieces_are_the_same_slopes(
    tiny_model: CandidateModel,
    space: Space,
    text: TextSet,
    states: np.ndarray,
    held: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slopes, setting = Slopes(tiny_model, space), coarse(space)
    whole = slopes.at(setting, text, states, probes=2, routing=TOP_K)
    tiny_model.reset()
    monkeypatch.setattr("evaluators.projection._HELD", held)
    pieces = slopes.at(setting, text, states, probes=2, routing=TOP_K)
    assert pieces.keys() == whole.keys()
    for option, slope in whole.items():  # products are rounded otherwise
        assert pieces[option].first == pytest.approx(slope.first, rel=1e-3, abs=1e-7), option
        assert pieces[option].second == pytest.approx(slope.second, rel=1e-3, abs=1e-9), option


def test_where_nothing_diverges_no_gradient_of_it_is_taken(
    tiny_model: CandidateModel, space: Space, text: TextSet, states: np.ndarray
) -> None:
    base, slopes = Settings(space.inventory).base, Slopes(tiny_model, space)
    found = slopes.at(base, text, states, probes=1, routing=TOP_K)
    assert {slope.first for slope in found.values()} == {0.0}
    assert all(slope.second > 0 for option, slope in found.items() if option[1] != "Q8_0")
    # A base that is wrong moves nothing there.
    tiny_model.reset()
    assert slopes.at(base, text, states + 1, probes=1, routing=TOP_K) == found
    assert slopes.tokens(text, 1, base=True) == slopes.tokens(text, 1) - 2 * text.windows.size


def test_an_option_takes_as_much_as_a_blocks_pass(
    tiny_model: CandidateModel, space: Space, text: TextSet
) -> None:
    slopes, layers = Slopes(tiny_model, space), space.inventory.layers
    plain, size = slopes.tokens(text, 2), text.windows.size
    assert slopes.tokens(text, 2, layers) == plain + size
    assert slopes.tokens(text, 2, 2 * layers) == plain + 2 * size
    assert 0 < slopes.tokens(text, 2, 1) - plain - size / layers < 1
