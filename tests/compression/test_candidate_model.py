"""A model in memory is any candidate, and itself again afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3ForCausalLM

from compression import load
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint
from compression.checkpoint_export import export_checkpoint
from evaluators.texts import TextSet
from tests.compression.support import candidate, logits, mixed_types, provide

RAGGED = {1: (0, 2, 3, 6, 7), 2: (1, 4, 5)}
SAME_COUNT = {1: (0, 2, 3, 6, 7), 2: (1, 2, 4, 5, 7)}


@pytest.fixture
def windows(tiny_texts: dict[str, TextSet]) -> np.ndarray:
    return tiny_texts["search"].windows[:3]


def own_logits(model: CandidateModel, windows: np.ndarray) -> np.ndarray:
    """By the candidate model's own pass, not by transformers'."""
    with torch.inference_mode():
        return model.logits(model.hidden(torch.from_numpy(windows.astype(np.int64)))).numpy()


def original(model: CandidateModel, name: str) -> np.ndarray:
    """The uncompressed weights of a tensor, in GGUF's shape."""
    return model.weights.read(model.family.by_name[name])


def in_memory(model: CandidateModel, name: str) -> np.ndarray:
    """The weights of a tensor that the model computes with, in GGUF's shape."""
    part = model.family.by_name[name]
    pieces = [np.asarray(view).reshape(-1) for view in model.shell.views(part)]
    return part.encode(np.concatenate(pieces).reshape(part.tensor.shape))


def test_its_own_pass_is_transformers_forward(tiny_model: CandidateModel, windows: np.ndarray) -> None:
    expected = logits(tiny_model, windows)
    assert np.abs(own_logits(tiny_model, windows) - expected).max() <= 1e-5
    wanted = candidate(tiny_model.inventory, RAGGED, {2: 1}, mixed_types(tiny_model.inventory))
    tiny_model.apply(provide(tiny_model, wanted))
    compressed = logits(tiny_model, windows)
    assert np.abs(own_logits(tiny_model, windows) - compressed).max() <= 1e-5
    assert np.abs(compressed - expected).max() > 0.5


def test_a_token_does_not_see_what_follows(tiny_model: CandidateModel, windows: np.ndarray) -> None:
    changed = windows[:1].copy()
    changed[:, 40:] = 7
    first, second = own_logits(tiny_model, windows[:1]), own_logits(tiny_model, changed)
    assert np.abs(first[:, :40] - second[:, :40]).max() <= 1e-5
    assert np.abs(first[:, 40:] - second[:, 40:]).max() > 0.5


def test_layer_states_are_those_between_the_blocks(tiny_model: CandidateModel, windows: np.ndarray) -> None:
    tokens = torch.from_numpy(windows.astype(np.int64))
    with torch.inference_mode():
        states = tiny_model.layer_states(tokens)
        expected = tiny_model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        assert len(states) == tiny_model.inventory.layers + 1 == len(expected)
        # transformers gives the last one normalised.
        for state, other in zip([*states[:-1], tiny_model.norm(states[-1])], expected, strict=True):
            assert (state - other).abs().max() <= 1e-5
        for layer in range(tiny_model.inventory.layers):
            rest = tiny_model.run(states[layer], layer, tiny_model.inventory.layers)
            assert (rest - states[-1]).abs().max() <= 1e-5


def test_reset_restores_logits_and_weights_exactly(tiny_model: CandidateModel, windows: np.ndarray) -> None:
    before = logits(tiny_model, windows)
    state = {name: value.clone() for name, value in tiny_model.model.state_dict().items()}
    wanted = candidate(tiny_model.inventory, RAGGED, {1: 1}, mixed_types(tiny_model.inventory))
    tiny_model.apply(provide(tiny_model, wanted))
    assert np.abs(logits(tiny_model, windows) - before).max() > 0.5
    tiny_model.reset()
    assert np.array_equal(logits(tiny_model, windows), before)
    for name, value in tiny_model.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_candidate_does_not_depend_on_the_one_before(
    tiny_model: CandidateModel, windows: np.ndarray
) -> None:
    inventory = tiny_model.inventory
    first = provide(tiny_model, candidate(inventory, RAGGED, {2: 1}, mixed_types(inventory)))
    second = provide(tiny_model, candidate(inventory, {2: (0, 1, 6)}, {1: 1}, "Q8_0"))
    tiny_model.apply(second)
    expected = logits(tiny_model, windows)
    tiny_model.apply(first)
    assert np.abs(logits(tiny_model, windows) - expected).max() > 0.5
    tiny_model.apply(second)
    assert np.array_equal(logits(tiny_model, windows), expected)


def test_weights_in_memory_are_the_banks_blocks(tiny_model: CandidateModel) -> None:
    inventory = tiny_model.inventory
    wanted = provide(tiny_model, candidate(inventory, types=mixed_types(inventory)))
    tiny_model.apply(wanted)
    for name, type_name in wanted.types:
        blocks = np.array(tiny_model.bank.blocks(inventory.by_name[name], type_name))
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type_name])
        assert np.array_equal(in_memory(tiny_model, name), expected), name
        assert not np.array_equal(original(tiny_model, name), expected) or type_name == "BF16", name


def test_every_weight_of_the_model_has_one_gguf_name(tiny_model: CandidateModel) -> None:
    inventory = tiny_model.inventory
    views = {t.name: tiny_model.shell.views(tiny_model.family.by_name[t.name]) for t in inventory.tensors}
    for tensor in inventory.tensors:
        assert np.array_equal(in_memory(tiny_model, tensor.name), original(tiny_model, tensor.name))
    weights = {n: v.clone() for n, v in tiny_model.model.state_dict().items()}
    try:
        for pieces in views.values():
            for view in pieces:
                view.fill_(7)
        assert all((v == 7).all() for v in tiny_model.model.state_dict().values())
        count = sum(view.numel() for pieces in views.values() for view in pieces)
        assert count == sum(v.numel() for v in weights.values())
    finally:
        tiny_model.model.load_state_dict(weights)


def test_uncompressed_weights_are_given_whatever_the_model_is(tiny_model: CandidateModel) -> None:
    inventory = tiny_model.inventory
    plain = [t.name for t in inventory.tensors if not t.quantizable]
    before = {n: tiny_model.plain(n).copy() for n in plain}
    weights = {t.name: original(tiny_model, t.name) for t in inventory.quantizable}
    tiny_model.apply(provide(tiny_model, candidate(inventory, RAGGED, types=mixed_types(inventory))))
    for name, value in before.items():
        assert np.array_equal(tiny_model.plain(name), value), name
    for name, value in weights.items():
        assert np.array_equal(original(tiny_model, name), value), name


def physically_pruned(tiny: Checkpoint, experts: Mapping[int, tuple[int, ...]]) -> DeepseekV3ForCausalLM:
    """A transformers model made with fewer experts, its weights cut out of the checkpoint's."""
    count = len(experts[1])
    config = AutoConfig.from_pretrained(tiny.path)
    config.n_routed_experts = config.num_local_experts = count
    whole = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).state_dict()
    for layer, kept in experts.items():
        prefix = f"model.layers.{layer}.mlp."
        for name in (
            "gate.weight",
            "gate.e_score_correction_bias",
            "experts.gate_up_proj",
            "experts.down_proj",
        ):
            whole[prefix + name] = whole[prefix + name][list(kept)]
    model = DeepseekV3ForCausalLM(config).float().eval()
    assert model.model.layers[1].mlp.experts.down_proj.shape[0] == count
    model.load_state_dict(whole)
    return model


def test_restricted_experts_are_a_model_without_the_others(
    tiny_model: CandidateModel, tiny: Checkpoint, windows: np.ndarray
) -> None:
    for layer, kept in SAME_COUNT.items():
        tiny_model.restrict(layer, kept)
    expected = logits(physically_pruned(tiny, SAME_COUNT), windows)
    assert np.abs(logits(tiny_model, windows) - expected).max() <= 1e-5
    tiny_model.reset()
    assert np.abs(logits(tiny_model, windows) - expected).max() > 0.5


def test_a_ragged_candidate_is_the_folder_written_of_it(
    tiny_model: CandidateModel, tiny: Checkpoint, windows: np.ndarray, tmp_path: Path
) -> None:
    wanted = provide(tiny_model, candidate(tiny.inventory, RAGGED, {2: 1}))
    export_checkpoint(tiny_model, wanted, tiny, tmp_path / "ragged")
    tiny_model.apply(wanted)
    expected = logits(load(tmp_path / "ragged"), windows)
    assert np.abs(logits(tiny_model, windows) - expected).max() <= 1e-5


@pytest.mark.parametrize(("kept", "top_k"), [((3, 5), 1), ((0, 7), 2)])
def test_as_few_experts_as_are_active_can_stay(
    tiny_model: CandidateModel, windows: np.ndarray, kept: tuple[int, ...], top_k: int
) -> None:
    tiny_model.restrict(2, kept, top_k)
    chosen: list[Any] = []
    gate = tiny_model.model.model.layers[2].mlp.gate
    handle = gate.register_forward_hook(lambda m, args, out: chosen.append(out[2]))
    assert np.isfinite(logits(tiny_model, windows)).all()
    handle.remove()
    assert set(torch.cat(chosen).flatten().tolist()) == set(kept)


def test_a_smaller_top_k_is_that_of_the_config(
    tiny_model: CandidateModel, tiny: Checkpoint, windows: np.ndarray
) -> None:
    for layer in tiny.inventory.moe_layers:
        tiny_model.restrict(layer, None, 1)
    config = AutoConfig.from_pretrained(tiny.path)
    config.num_experts_per_tok = 1
    expected = AutoModelForCausalLM.from_pretrained(tiny.path, config=config, dtype=torch.float32).eval()
    assert expected.model.layers[1].mlp.gate.top_k == 1
    assert np.abs(logits(tiny_model, windows) - logits(expected, windows)).max() <= 1e-5
    tiny_model.reset()
    assert np.abs(logits(tiny_model, windows) - logits(expected, windows)).max() > 0.1
