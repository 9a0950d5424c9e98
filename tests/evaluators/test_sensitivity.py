"""An option's setting is the whole model with that one change, and costs what that costs, in any company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compression.calibration import Calibration
from compression.candidate_model import CandidateModel
from compression.expert_pruning import rankings
from compression.setting import Settings
from evaluators.divergence import base_states, measure
from evaluators.population import Population
from evaluators.sensitivity import alone
from evaluators.texts import TextSet
from spaces.space import Space
from tests.compression.support import logits, reader

Costs = Callable[..., list[float]]
"""(decision, choice) pairs to the KL of each alone, on the resident model or on that of the keyword `of`."""


@pytest.fixture
def space(tiny_model: CandidateModel, tiny_calibration: Calibration) -> Space:
    inventory = tiny_model.inventory
    return Space(inventory, rankings(tiny_calibration, inventory.moe_layers))


@pytest.fixture
def text(tiny_texts: dict[str, TextSet]) -> TextSet:
    return tiny_texts["search"].head(3 * 64)


@pytest.fixture
def costs(tiny_model: CandidateModel, space: Space, text: TextSet, tmp_path: Path) -> Costs:
    for name in TYPES:
        add(tiny_model, name, low(tiny_model, name))
    base_states(tiny_model, text, tmp_path / "states.npy")
    states, settings = np.load(tmp_path / "states.npy"), Settings(tiny_model.inventory)

    def measured(*options: tuple[str, Any], of: CandidateModel = tiny_model) -> list[float]:
        population = [alone(settings, space, *option) for option in options]
        return [d.mean_kl for d in Population(of).measure(population, text, states)]

    return measured


TYPES = (
    "token_embd.weight", "output.weight", "blk.0.ffn_down.weight", "blk.0.attn_k_b.weight",
    "blk.1.ffn_gate_exps.weight", "blk.1.attn_v_b.weight", "blk.2.ffn_down_exps.weight",
    "blk.2.attn_output.weight",
)  # fmt: skip


def low(model: CandidateModel, name: str) -> str:
    """A type of few bits that the tensor's rows can take."""
    return "Q2_K" if model.inventory.by_name[name].row % 256 == 0 else "Q5_0"


def add(model: CandidateModel, name: str, type_name: str) -> None:
    tensor = model.inventory.by_name[name]
    ((_, key, _),) = model.bank.add(tensor, [type_name], reader(model, name), None, "tiny")
    model.bank.register(name, type_name, key)


def full(
    model: CandidateModel, text: TextSet, folder: Path, decision: str, choice: Any, space: Space
) -> float:
    """The KL of the whole model with one change, by the path trials are scored with."""
    model.reset()
    base_states(model, text, folder / "base.npy")
    if decision.endswith(".top_k"):
        model.restrict(int(decision.split(".")[1]), None, choice)
    elif decision.endswith(".experts"):
        layer = int(decision.split(".")[1])
        model.restrict(layer, space.experts(layer, *choice))
    else:
        model.set_type(decision, choice)
    result = measure(model, text, np.load(folder / "base.npy")).mean_kl
    model.reset()
    return result


@pytest.mark.parametrize("name", TYPES)
def test_a_type_alone_costs_what_the_full_pass_says(
    tiny_model: CandidateModel, costs: Costs, space: Space, text: TextSet, tmp_path: Path, name: str
) -> None:
    type_name = low(tiny_model, name)
    expected = full(tiny_model, text, tmp_path, name, type_name, space)
    assert expected > 1e-6
    assert costs((name, type_name)) == pytest.approx([expected], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("choice", [(4, "reap"), (3, "mass"), (6, "paper")])
def test_a_pruning_alone_costs_what_the_full_pass_says(
    tiny_model: CandidateModel,
    costs: Costs,
    space: Space,
    text: TextSet,
    tmp_path: Path,
    layer: int,
    choice: tuple[int, str],
) -> None:
    expected = full(tiny_model, text, tmp_path, f"blk.{layer}.experts", choice, space)
    assert expected > 1e-5
    assert costs((f"blk.{layer}.experts", choice)) == pytest.approx([expected], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_top_k_alone_costs_what_the_full_pass_says(
    tiny_model: CandidateModel, costs: Costs, space: Space, text: TextSet, tmp_path: Path, layer: int
) -> None:
    expected = full(tiny_model, text, tmp_path, f"blk.{layer}.top_k", 1, space)
    assert expected > 1e-4
    assert costs((f"blk.{layer}.top_k", 1)) == pytest.approx([expected], rel=1e-3, abs=1e-7)


MANY: list[tuple[str, Any]] = [
    ("blk.1.experts", (3, "reap")), ("blk.2.experts", (5, "mass")), ("blk.1.top_k", 1),
    ("output.weight", "Q2_K"), ("token_embd.weight", "Q2_K"), ("blk.1.ffn_gate_exps.weight", "Q2_K"),
    ("blk.0.ffn_down.weight", "Q2_K"),
]  # fmt: skip


def test_many_options_together_cost_what_the_full_pass_says_of_each(
    tiny_model: CandidateModel, costs: Costs, space: Space, text: TextSet, tmp_path: Path
) -> None:
    expected = [full(tiny_model, text, tmp_path, *option, space) for option in MANY]
    assert costs(*MANY) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_measures_leave_no_trace_and_repeat(tiny_model: CandidateModel, costs: Costs, text: TextSet) -> None:
    before = logits(tiny_model, text.windows)
    first = [costs(option)[0] for option in MANY]
    assert [costs(option)[0] for option in reversed(MANY)] == first[::-1]
    assert len(set(first)) == len(first)
    tiny_model.reset()
    assert np.array_equal(logits(tiny_model, text.windows), before)


def test_a_measure_that_fails_leaves_no_trace(
    tiny_model: CandidateModel, costs: Costs, text: TextSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, expected, run = logits(tiny_model, text.windows), costs(*MANY), tiny_model.run

    def broken(states: torch.Tensor, first: int, last: int) -> torch.Tensor:
        if first == 2:
            raise MemoryError
        return run(states, first, last)

    for option in MANY:
        with monkeypatch.context() as patch:
            patch.setattr(tiny_model, "run", broken)
            with pytest.raises(MemoryError):
                costs(option)
        assert costs(*MANY) == expected
    tiny_model.reset()
    assert np.array_equal(logits(tiny_model, text.windows), before)


def test_nothing_changed_costs_nothing(costs: Costs) -> None:
    for option in (("blk.2.top_k", 2), ("blk.2.experts", (8, "reap"))):
        assert abs(costs(option)[0]) < 1e-7


def test_a_streamed_model_has_the_same_costs(tiny_model: CandidateModel, costs: Costs) -> None:
    streamed = CandidateModel(tiny_model.checkpoint, tiny_model.inventory, tiny_model.bank, stream=True)
    found = costs(*MANY, of=streamed)
    assert found == costs(*MANY)
    assert min(found) > 0


def test_it_starts_from_the_uncompressed_model(tiny_model: CandidateModel, costs: Costs) -> None:
    expected = costs(("blk.1.top_k", 1))
    tiny_model.restrict(2, (0, 1), 1)
    tiny_model.set_type("output.weight", "Q2_K")
    assert costs(("blk.1.top_k", 1)) == expected
