"""The shortcut that runs only the blocks an option changes gives what the full pass gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.calibration import Calibration
from compression.candidate_model import CandidateModel
from compression.expert_pruning import rankings
from evaluators.divergence import base_states, measure
from evaluators.sensitivity import Sensitivity
from evaluators.texts import TextSet
from spaces.space import Space
from tests.compression.support import logits, reader


@pytest.fixture
def space(tiny_model: CandidateModel, tiny_calibration: Calibration) -> Space:
    inventory = tiny_model.inventory
    return Space(inventory, rankings(tiny_calibration, inventory.moe_layers))


@pytest.fixture
def text(tiny_texts: dict[str, TextSet]) -> TextSet:
    return tiny_texts["search"].head(3 * 64)


@pytest.fixture
def sensitivity(tiny_model: CandidateModel, space: Space, text: TextSet) -> Sensitivity:
    for name in TYPES:
        add(tiny_model, name, "Q2_K" if tiny_model.inventory.by_name[name].row % 256 == 0 else "Q5_0")
    return Sensitivity(tiny_model, space, text)


TYPES = (
    "token_embd.weight", "output.weight", "blk.0.ffn_down.weight", "blk.0.attn_k_b.weight",
    "blk.1.ffn_gate_exps.weight", "blk.1.attn_v_b.weight", "blk.2.ffn_down_exps.weight",
    "blk.2.attn_output.weight",
)  # fmt: skip


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
    tiny_model: CandidateModel,
    sensitivity: Sensitivity,
    space: Space,
    text: TextSet,
    tmp_path: Path,
    name: str,
) -> None:
    type_name = "Q2_K" if tiny_model.inventory.by_name[name].row % 256 == 0 else "Q5_0"
    expected = full(tiny_model, text, tmp_path, name, type_name, space)
    assert expected > 1e-6
    assert sensitivity.kl(name, type_name) == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("choice", [(4, "reap"), (3, "mass"), (6, "paper")])
def test_a_pruning_alone_costs_what_the_full_pass_says(
    tiny_model: CandidateModel,
    sensitivity: Sensitivity,
    space: Space,
    text: TextSet,
    tmp_path: Path,
    layer: int,
    choice: tuple[int, str],
) -> None:
    expected = full(tiny_model, text, tmp_path, f"blk.{layer}.experts", choice, space)
    assert expected > 1e-5
    assert sensitivity.kl(f"blk.{layer}.experts", choice) == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_top_k_alone_costs_what_the_full_pass_says(
    tiny_model: CandidateModel,
    sensitivity: Sensitivity,
    space: Space,
    text: TextSet,
    tmp_path: Path,
    layer: int,
) -> None:
    expected = full(tiny_model, text, tmp_path, f"blk.{layer}.top_k", 1, space)
    assert expected > 1e-4
    assert sensitivity.kl(f"blk.{layer}.top_k", 1) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_measures_leave_no_trace_and_repeat(
    tiny_model: CandidateModel, sensitivity: Sensitivity, text: TextSet
) -> None:
    before = logits(tiny_model, text.windows)
    options: list[tuple[str, Any]] = [
        ("blk.1.experts", (3, "reap")), ("blk.1.top_k", 1), ("output.weight", "Q2_K"),
        ("token_embd.weight", "Q2_K"), ("blk.1.ffn_gate_exps.weight", "Q2_K"),
    ]  # fmt: skip
    first = [sensitivity.kl(*option) for option in options]
    assert np.array_equal(logits(tiny_model, text.windows), before)
    assert [sensitivity.kl(*option) for option in reversed(options)] == first[::-1]
    assert len(set(first)) == len(first)


def test_a_measure_that_fails_leaves_no_trace(
    tiny_model: CandidateModel, sensitivity: Sensitivity, text: TextSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = logits(tiny_model, text.windows)
    with monkeypatch.context() as patch:
        patch.setattr(tiny_model, "run", lambda *args: (_ for _ in ()).throw(MemoryError))
        for option in (("blk.1.experts", (3, "reap")), ("blk.1.ffn_gate_exps.weight", "Q2_K")):
            with pytest.raises(MemoryError):
                sensitivity.kl(*option)
    assert np.array_equal(logits(tiny_model, text.windows), before)


def test_nothing_changed_costs_nothing(sensitivity: Sensitivity) -> None:
    for option in (("blk.2.top_k", 2), ("blk.2.experts", (8, "reap"))):
        assert abs(sensitivity.kl(*option)) < 1e-7


def test_a_streamed_model_has_the_same_costs(
    tiny_model: CandidateModel, sensitivity: Sensitivity, space: Space, text: TextSet
) -> None:
    streamed = CandidateModel(tiny_model.checkpoint, tiny_model.inventory, tiny_model.bank, stream=True)
    other = Sensitivity(streamed, space, text)
    options: list[tuple[str, Any]] = [
        ("blk.1.experts", (3, "reap")), ("blk.2.experts", (5, "mass")), ("blk.1.top_k", 1),
        ("blk.1.ffn_gate_exps.weight", "Q2_K"), ("output.weight", "Q2_K"), ("token_embd.weight", "Q2_K"),
    ]  # fmt: skip
    for option in options:
        assert other.kl(*option) == sensitivity.kl(*option) > 0


def test_it_starts_from_the_uncompressed_model(
    tiny_model: CandidateModel, space: Space, text: TextSet
) -> None:
    expected = Sensitivity(tiny_model, space, text).kl("blk.1.top_k", 1)
    tiny_model.restrict(2, (0, 1), 1)
    assert Sensitivity(tiny_model, space, text).kl("blk.1.top_k", 1) == expected
