"""An empty model has a place for every tensor, and its routers forget experts and remember them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compression.checkpoint import Checkpoint
from compression.families import family
from compression.router import Router
from compression.shell import Shell
from spaces.inventory import read_config
from tests.compression.support import logits, refused

WINDOWS = np.arange(48).reshape(2, 24)


@pytest.fixture
def shell(tiny: Checkpoint) -> Shell:
    return Shell(tiny.family)


def fill(shell: Shell, checkpoint: Checkpoint) -> Any:
    for part in checkpoint.family.parts:
        shell.fill(part, checkpoint.weights)
    return shell.model


def test_an_empty_shell_takes_no_memory(shell: Shell) -> None:
    assert all(value.is_meta for value in shell.model.state_dict().values())


def test_every_parameter_is_filled_by_the_parts(shell: Shell, tiny: Checkpoint) -> None:
    model = fill(shell, tiny)
    left = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, value in left if value.is_meta] == []
    assert {value.dtype for _, value in left} == {torch.float32}
    layers = {part.tensor.layer for part in tiny.family.parts}
    assert sum(len(shell.parts(layer)) for layer in layers) == len(tiny.family.parts)
    assert layers == {None, 0, 1, 2}


def test_a_layer_is_emptied_and_filled_again(shell: Shell, tiny: Checkpoint) -> None:
    model = fill(shell, tiny)
    expected = logits(model, WINDOWS)
    shell.router(1).keep((1, 5, 6), 1)
    assert not np.array_equal(logits(model, WINDOWS), expected)
    hooks = len(model.model.layers[1].mlp.gate._forward_hooks)
    shell.empty(1)
    assert all(value.is_meta for value in model.model.layers[1].state_dict().values())
    assert not any(value.is_meta for value in model.model.layers[2].state_dict().values())
    for part in shell.parts(1):
        shell.fill(part, tiny.weights)
    shell.router(1).keep(None, tiny.inventory.top_k)
    assert len(model.model.layers[1].mlp.gate._forward_hooks) == hooks
    assert np.array_equal(logits(model, WINDOWS), expected)


def test_one_expert_is_written_alone(shell: Shell, tiny: Checkpoint) -> None:
    fill(shell, tiny)
    gate, up = (tiny.family.by_name[f"blk.1.ffn_{role}_exps.weight"] for role in ("gate", "up"))
    parameter = shell.model.model.layers[1].mlp.experts.gate_up_proj
    before = parameter.clone()
    shell.write(up, np.full(up.tensor.shape[1:], 3.0, np.float32), 5)
    half = gate.tensor.shape[1]
    assert (parameter[5, half:] == 3).all()
    parameter[5, half:] = before[5, half:]
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "self_attn.kv_a_proj_with_mqa.bias"),
        ({"tie_word_embeddings": True}, None),
    ],
    ids=["biases", "tied"],
)
def test_an_option_that_adds_parameters_is_refused_by_their_name(
    tiny: Checkpoint, changes: dict[str, Any], named: str | None
) -> None:
    of_family = family({**read_config(tiny.path), **changes}, "a model")
    if named is None:
        shell = Shell(of_family)
        assert "output.weight" not in of_family.by_name
        assert shell.model.lm_head.weight is shell.model.model.embed_tokens.weight
    else:
        refused(lambda: Shell(of_family), "a model", "deepseek_v3", "does not place", named, "config.json")


def test_a_part_without_a_parameter_is_refused_by_its_name(tiny: Checkpoint) -> None:
    of_family = family(read_config(tiny.path), "a model")
    # What the family says of its parts is computed once; an option the model does not have follows.
    of_family.config.q_lora_rank = None
    assert "self_attn.q_proj.weight" in str([p.path for p in of_family.parts])
    of_family.config.q_lora_rank = 128
    refused(lambda: Shell(of_family), "a model", "self_attn.q_", "config.json")


def test_a_config_transformers_cannot_make_a_model_of_is_refused(tiny: Checkpoint) -> None:
    of_family = family({**read_config(tiny.path), "hidden_act": "magic"}, "a model")
    refused(lambda: Shell(of_family), "a model", "magic")


def test_tied_embeddings_stay_one_after_every_fill(tiny: Checkpoint) -> None:
    of_family = family({**read_config(tiny.path), "tie_word_embeddings": True}, "a model")
    shell, part = Shell(of_family), of_family.by_name["token_embd.weight"]
    shell.write(part, np.full(part.tensor.shape, 2.0, np.float32))
    shell.write(part, np.full(part.tensor.shape, 4.0, np.float32))
    assert shell.model.lm_head.weight is shell.model.model.embed_tokens.weight
    assert (shell.model.lm_head.weight == 4).all()


def test_a_shrunk_layer_is_the_pruned_one(shell: Shell, tiny: Checkpoint) -> None:
    kept, whole = (1, 4, 6), Shell(tiny.family)
    fill(whole, tiny)
    whole.router(2).keep(kept, 1)
    shell.shrink(2, len(kept), 1)
    for part in tiny.family.parts:
        values = tiny.weights.read(part)
        shell.write(part, values[list(kept)] if part.tensor.per_expert and part.tensor.layer == 2 else values)
    assert shell.expert_module(2).down_proj.shape[0] == len(kept)
    assert shell.expert_module(1).down_proj.shape[0] == tiny.inventory.experts
    assert np.abs(logits(shell.model, WINDOWS) - logits(whole.model, WINDOWS)).max() <= 1e-5


# Routers.


class Plain(nn.Module):
    """A router of transformers' kind: what it returns follows its rows, biases and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
        self.inner = nn.Module()
        self.inner.register_buffer("bias", torch.arange(6) / 10)
        self.other = nn.Parameter(torch.ones(2))
        self.num_experts, self.top_k = 6, 3

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = x @ self.weight.T + self.inner.bias
        assert logits.shape[-1] == self.num_experts
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, weights, chosen


X = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plain() -> Plain:
    return Plain()


@pytest.fixture
def router(plain: Plain) -> Iterator[Router]:
    router = Router(plain, {"weight": 0, "inner.bias": 0}, ("num_experts", "n_routed_experts"))
    yield router
    router.close()


def test_a_router_of_all_is_the_module_itself(plain: Plain, router: Router) -> None:
    expected = plain(X)
    router.keep(None, 3)
    assert all(torch.equal(a, b) for a, b in zip(plain(X), expected, strict=True))


def test_a_restricted_router_is_the_pruned_one_with_its_experts_renumbered(
    plain: Plain, router: Router
) -> None:
    kept = (0, 3, 5)
    pruned = Plain()
    pruned.weight = nn.Parameter(pruned.weight[list(kept)])
    pruned.inner.bias = pruned.inner.bias[list(kept)]
    pruned.num_experts, pruned.top_k = 3, 2
    logits, weights, chosen = pruned(X)
    router.keep(kept, 2)
    found = plain(X)
    assert torch.equal(found[0], logits)
    assert torch.equal(found[1], weights)
    assert torch.equal(found[2], torch.tensor(kept)[chosen])
    assert set(found[2].unique().tolist()) == set(kept)
    assert not hasattr(plain, "n_routed_experts")


def test_restrictions_follow_one_another_without_a_trace(plain: Plain, router: Router) -> None:
    before = plain(X)
    router.keep((1, 2), 1)
    first = plain(X)
    router.keep((0, 4, 5), 3)
    assert plain(X)[2].max() == 5
    router.keep((1, 2), 1)
    assert all(torch.equal(a, b) for a, b in zip(plain(X), first, strict=True))
    router.keep(None, 3)
    assert all(torch.equal(a, b) for a, b in zip(plain(X), before, strict=True))
    assert (plain.num_experts, plain.top_k) == (6, 3)
    assert isinstance(plain.weight, nn.Parameter)
    assert set(plain.state_dict()) == set(Plain().state_dict())


def test_a_closed_router_leaves_the_module_alone(plain: Plain, router: Router) -> None:
    router.keep((2, 4), 2)
    router.close()
    assert not plain._forward_hooks
    assert set(plain(X)[2].unique().tolist()) == {0, 1}


def test_axes_need_not_be_the_first() -> None:
    module = Plain()
    module.register_buffer("scale", torch.arange(12.0).reshape(2, 6))
    router = Router(module, {"weight": 0, "inner.bias": 0, "scale": 1}, ("num_experts",))
    router.keep((1, 5), 1)
    assert module.scale.tolist() == [[1, 5], [7, 11]]
    router.keep(None, 3)
    assert module.scale.shape == (2, 6)


def test_the_model_keeps_no_row_of_a_pruned_expert(tiny: Checkpoint, tmp_path: Path) -> None:
    shell = Shell(tiny.family)
    fill(shell, tiny)
    gate = shell.model.model.layers[1].mlp.gate
    full = gate.weight.clone()
    shell.router(1).keep((2, 3, 6), 2)
    assert torch.equal(gate.weight, full[[2, 3, 6]])
    assert gate.e_score_correction_bias.shape == (3,)
    shell.router(1).keep(None, 2)
    assert torch.equal(gate.weight, full)
