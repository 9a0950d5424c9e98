"""Slopes are the derivatives of the measured divergence, of every type of every tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compression import ggml
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint, open_checkpoint
from compression.setting import Setting, Settings
from compression.variant_bank import VariantBank
from evaluators.divergence import base_states, measure
from evaluators.population import Population
from evaluators.slopes import Slope, Slopes
from evaluators.texts import TextSet
from experiments import zoo
from spaces.space import Space
from tests.compression.support import candidate, provide

TYPES = ("Q2_K", "Q8_0")  # short rows: Q4_0 and Q8_0
FEW = {1: (0, 3), 2: (2, 5)}
"""As many experts as a token uses: the divergence then has no steps."""
SPREAD = (
    "token_embd.weight", "blk.0.attn_k_b.weight", "blk.0.ffn_down.weight", "blk.1.attn_v_b.weight",
    "blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight", "blk.2.attn_output.weight",
    "blk.2.ffn_down_shexp.weight", "output.weight",
)  # fmt: skip


def prepared(model: CandidateModel) -> Space:
    """Puts every type of the space into the bank."""
    space = Space(model.inventory, {}, types=TYPES)
    for which in (0, -1):
        provide(model, candidate(model.inventory, types={
            t.name: space.ladder(t)[which] for t in model.inventory.quantizable
        }))  # fmt: skip
    return space


@pytest.fixture
def space(tiny_model: CandidateModel) -> Space:
    return prepared(tiny_model)


@pytest.fixture
def text(tiny_texts: dict[str, TextSet]) -> TextSet:
    whole = tiny_texts["search"]
    return replace(whole, windows=whole.windows[:4, :32], sources=("x",) * 4)


@pytest.fixture
def states(tiny_model: CandidateModel, text: TextSet, tmp_path: Path) -> np.ndarray:
    return states_now(tiny_model, text, tmp_path)


def states_now(model: CandidateModel, text: TextSet, folder: Path) -> np.ndarray:
    """Of what the model is, uncompressed or not."""
    base_states(model, text, folder / "states.npy")
    found: np.ndarray = np.load(folder / "states.npy")
    return found


def lowest(space: Space) -> dict[str, str]:
    return {t.name: space.ladder(t)[0] for t in space.inventory.quantizable}


def pruned(model: CandidateModel, types: dict[str, str]) -> Setting:
    """A setting in which no token has a choice of experts."""
    of = Settings(model.inventory)
    setting = of.of_types(types)
    for layer, experts in FEW.items():
        setting = of.routed(setting, layer, experts)
    return setting


def values(model: CandidateModel, name: str, type_name: str | None) -> np.ndarray:
    part = model.family.by_name[name]
    if type_name is None:
        return np.array(model.weights.read(part))
    return ggml.dequantize(model.bank.blocks(part.tensor, type_name), type_name)


def moved(
    model: CandidateModel,
    name: str,
    here: str | None,
    there: str,
    step: float,
    text: TextSet,
    states: np.ndarray,
) -> float:
    """Mean KL of what the model is, but for one tensor a step of the way to another type."""
    part, start = model.family.by_name[name], values(model, name, here)
    model.shell.write(part, start + np.float32(step) * (values(model, name, there) - start))
    kl = measure(model, text, states).mean_kl
    model.shell.write(part, start)
    return kl


def test_every_type_of_every_tensor_is_answered(
    tiny_model: CandidateModel, space: Space, text: TextSet, states: np.ndarray
) -> None:
    types = lowest(space)
    setting = Settings(tiny_model.inventory).of_types(types)
    found = Slopes(tiny_model, space).at(setting, text, states, probes=1)
    quantizable = tiny_model.inventory.quantizable
    assert set(found) == {(t.name, k) for t in quantizable for k in space.ladder(t)}
    assert {"token_embd.weight", "output.weight"} <= {name for name, _ in found}
    for (name, type_name), slope in found.items():
        assert np.isfinite([slope.first, slope.second]).all()
        if types[name] == type_name:
            assert slope == Slope(0, 0), name
        else:
            assert slope.first != 0
            assert slope.second > 0


def test_the_first_order_is_the_measured_slope_at_a_compressed_setting(
    tiny_model: CandidateModel, space: Space, text: TextSet, states: np.ndarray
) -> None:
    types = lowest(space)
    found = Slopes(tiny_model, space).at(pruned(tiny_model, types), text, states, probes=0)
    assert measure(tiny_model, text, states).mean_kl > 0.2  # it is left in the setting
    for name in SPREAD:
        there = space.ladder(space.inventory.by_name[name])[-1]
        up, down = (moved(tiny_model, name, types[name], there, s, text, states) for s in (0.05, -0.05))
        expected = (up - down) / 0.1
        assert abs(expected) > 1e-5, name
        assert found[name, there].first == pytest.approx(expected, rel=0.05, abs=2e-5), name
        assert found[name, there].second == 0


def test_where_experts_are_chosen_the_last_tensors_have_the_measured_slope(
    tiny_model: CandidateModel, space: Space, text: TextSet, states: np.ndarray
) -> None:
    types = lowest(space)
    setting = Settings(tiny_model.inventory).of_types(types)
    found = Slopes(tiny_model, space).at(setting, text, states, probes=0)
    for name in ("blk.2.ffn_down_exps.weight", "blk.2.ffn_gate_exps.weight", "output.weight"):
        up, down = (moved(tiny_model, name, types[name], "Q8_0", s, text, states) for s in (0.05, -0.05))
        assert found[name, "Q8_0"].first == pytest.approx((up - down) / 0.1, rel=0.05, abs=2e-5), name


@pytest.mark.parametrize("few", [True, False])
def test_where_nothing_diverges_the_second_order_is_the_cost_of_a_change(
    tiny_model: CandidateModel, space: Space, text: TextSet, tmp_path: Path, few: bool
) -> None:
    setting = pruned(tiny_model, {}) if few else Settings(tiny_model.inventory).base
    for layer, block in enumerate(setting.blocks):
        tiny_model.set_block(layer, block)
    own = states_now(tiny_model, text, tmp_path)
    found = Slopes(tiny_model, space).at(setting, text, own, probes=12)
    names = SPREAD if few else ("blk.2.ffn_down_exps.weight", "output.weight")
    for name in names:
        there = space.ladder(space.inventory.by_name[name])[0]
        slope = found[name, there]
        # Part of the way: small enough for two orders, large enough to measure.
        cost = moved(tiny_model, name, None, there, 0.3, text, own) / 0.3**2
        assert cost > 1e-4, name
        assert abs(slope.first) < 0.02 * cost, name
        assert cost / 2 < slope.second < cost * 2, name
    finest = found["output.weight", "Q8_0"].second
    assert finest < found["output.weight", "Q2_K"].second / 100


def test_draws_repeat_with_their_seed(
    tiny_model: CandidateModel, space: Space, text: TextSet, states: np.ndarray
) -> None:
    setting = Settings(tiny_model.inventory).of_types(lowest(space))
    slopes = Slopes(tiny_model, space)
    first = slopes.at(setting, text, states, probes=2, seed=3)
    tiny_model.reset()
    assert slopes.at(setting, text, states, probes=2, seed=3) == first
    other = slopes.at(setting, text, states, probes=2, seed=4)
    assert {k: s.first for k, s in other.items()} == {k: s.first for k, s in first.items()}
    drawn = [k for k, s in first.items() if s.second]
    assert drawn
    assert all(other[k].second != first[k].second for k in drawn)


def test_tokens_count_both_passes(tiny_model: CandidateModel, space: Space, text: TextSet) -> None:
    slopes = Slopes(tiny_model, space)
    assert [slopes.tokens(text, probes) for probes in (0, 1, 2)] == [128 * 4, 128 * 6, 128 * 8]
    assert slopes.tokens(text.head(33), 2) == 64 * 8


@pytest.mark.parametrize("cache", [0, 2**28])
def test_scoring_and_slopes_take_turns(
    tiny: Checkpoint, tiny_model: CandidateModel, space: Space, text: TextSet, states: np.ndarray, cache: int
) -> None:
    types = lowest(space)
    settings = [pruned(tiny_model, types), Settings(tiny_model.inventory).of_types(types)]
    expected = [Slopes(tiny_model, space).at(s, text, states, probes=1) for s in settings]
    model = CandidateModel(tiny, tiny.inventory, tiny_model.bank, cache=cache)
    slopes, population = Slopes(model, space), Population(model)
    scores = [d.kl.tolist() for d in population.measure(settings, text, states)]
    for setting, wanted in zip(settings, expected, strict=True):
        found = slopes.at(setting, text, states, probes=1)
        assert set(found) == set(wanted)
        for key, slope in wanted.items():  # elsewhere in memory, products are rounded otherwise
            assert found[key].first == pytest.approx(slope.first, rel=1e-3, abs=1e-7), key
            assert found[key].second == pytest.approx(slope.second, rel=1e-3, abs=1e-9), key
        assert not any(p.requires_grad for p in model.model.parameters())
        assert [d.kl.tolist() for d in population.measure(settings, text, states)] == scores


def test_a_streamed_model_is_refused(tiny_model: CandidateModel, space: Space) -> None:
    streamed = CandidateModel(tiny_model.checkpoint, tiny_model.inventory, tiny_model.bank, stream=True)
    with pytest.raises(ValueError, match="memory"):
        Slopes(streamed, space)


@pytest.mark.parametrize("name", ["granitemoe", "ernie4_5_moe", "gpt_oss"])
def test_embeddings_that_are_tied_or_scaled_have_the_measured_slope(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(zoo.save(zoo.make(name), tmp_path / name))
    model = CandidateModel(checkpoint, checkpoint.inventory, VariantBank(tmp_path / "bank"))
    inventory, space = model.inventory, prepared(model)
    windows = np.random.default_rng(0).integers(1, 8192, (3, 24)).astype(np.int32)
    text = TextSet("x", windows, ("x",) * 3, 1.0)
    states = states_now(model, text, tmp_path)
    types, of = lowest(space), Settings(inventory)
    setting = of.of_types(types)
    for layer in inventory.moe_layers:
        setting = of.routed(setting, layer, tuple(range(layer, layer + inventory.top_k)))
    found = Slopes(model, space).at(setting, text, states, probes=1)
    assert set(found) == {(t.name, k) for t in inventory.quantizable for k in space.ladder(t)}
    gates = f"blk.{inventory.layers - 1}.ffn_gate_exps.weight"
    for tensor in ("token_embd.weight", "blk.1.attn_v.weight", gates):
        there = space.ladder(inventory.by_name[tensor])[-1]
        up, down = (moved(model, tensor, types[tensor], there, s, text, states) for s in (0.1, -0.1))
        assert found[tensor, there].first == pytest.approx((up - down) / 0.2, rel=0.05, abs=2e-6), tensor
