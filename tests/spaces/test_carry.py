"""Decisions carried to a target fit it, keep their meaning, and cost exactly the bytes predicted."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.families import open_inventory
from spaces.candidate import Candidate, MoeLayer
from spaces.carry import Carry
from spaces.gguf_layout import header, padded
from spaces.inventory import Inventory
from spaces.quant_types import ladder, quant_type
from tests.spaces import tiny

TINY = tiny.inventory()
DEEPSEEK = open_inventory("deepseek-v3")
REFERENCE = tiny.inventory(n_routed_experts=16, num_experts_per_tok=4, num_hidden_layers=5)
PAIRS = [
    (TINY, TINY),
    (TINY, tiny.inventory()),
    (TINY, DEEPSEEK),
    (REFERENCE, DEEPSEEK),
    (tiny.inventory(first_k_dense_replace=0), DEEPSEEK),  # the target has a role the source lacks
    (REFERENCE, tiny.inventory(first_k_dense_replace=0)),  # and the other way round
    (tiny.inventory(num_hidden_layers=9), tiny.inventory(num_hidden_layers=3)),  # a source too deep
    (REFERENCE, tiny.inventory(**tiny.GROUPED)),
]
CARRIES = [Carry(a, b) for a, b in PAIRS]
POSITIONS = st.integers(0, len(PAIRS) - 1)
SEEDS = st.integers(0, 2**32).map(random.Random)


@settings(deadline=None)
@given(SEEDS)
def test_a_model_carried_to_itself_is_itself(rng: random.Random) -> None:
    for model in (TINY, REFERENCE, tiny.inventory(**tiny.GROUPED)):
        plan = tiny.random_plan(model, rng)
        assert Carry(model, model).plan(plan) == plan


@settings(deadline=None)
@given(SEEDS)
def test_a_model_carried_to_a_copy_of_itself_is_itself(rng: random.Random) -> None:
    plan = tiny.random_plan(TINY, rng)
    assert Carry(TINY, tiny.inventory()).plan(plan) == plan


@settings(deadline=None, max_examples=40)
@given(POSITIONS, SEEDS)
def test_a_carried_plan_is_a_valid_one_of_the_target(position: int, rng: random.Random) -> None:
    carry = CARRIES[position]
    source, target = carry.source, carry.target
    plan = carry.plan(tiny.random_plan(source, rng))
    per_group = target.experts // target.groups
    layers = []
    for (layer, kept), (_, top_k) in zip(plan.kept, plan.top_k, strict=True):
        assert kept % target.groups == 0
        assert top_k <= kept
        experts = [g * per_group + i for g in range(target.groups) for i in range(kept // target.groups)]
        layers.append(MoeLayer(layer, tuple(experts), top_k))
    Candidate(tuple(layers), plan.types).validate(target)


@settings(deadline=None, max_examples=40)
@given(POSITIONS, SEEDS)
def test_bytes_of_the_decisions_and_the_fixed_part_are_the_file(position: int, rng: random.Random) -> None:
    carry = CARRIES[position]
    source, target = carry.source, carry.target
    plan = tiny.random_plan(source, rng)
    kept, carried = dict(plan.kept), carry.plan(plan)
    decisions = sum(
        carry.bytes(name, kind, kept.get(source.by_name[name].layer or 0, source.experts))
        for name, kind in plan.types
    )
    fixed = len(header(target.plan_metadata(carried), target.infos(carried))) + target.tokenizer_bytes
    target_kept = dict(carried.kept)
    for t in target.tensors:
        if not t.quantizable:
            fixed += padded(t.bytes("F32", None if t.layer is None else target_kept.get(t.layer)))
    assert padded(decisions + fixed) == target.file_bytes(carried)


@pytest.mark.parametrize("source", [TINY, REFERENCE])
def test_keeping_everything_keeps_everything(source: Inventory) -> None:
    carried = Carry(source, DEEPSEEK).plan(source.uniform_plan("Q4_K"))
    assert carried == DEEPSEEK.uniform_plan("Q4_K")


def test_shares_of_experts_and_top_k_are_kept() -> None:
    carry = Carry(REFERENCE, DEEPSEEK)
    assert [carry.kept(n) for n in (4, 8, 12, 16)] == [64, 128, 192, 256]
    assert [carry.top_k(k, 256) for k in (1, 2, 3, 4)] == [2, 4, 6, 8]
    assert carry.top_k(4, 5) == 5


@pytest.mark.parametrize("measure", [lambda c, n: c.kept(n), lambda c, n: c.top_k(n, 10**6)])
def test_keeping_more_of_the_source_never_keeps_less_of_the_target(
    measure: Callable[[Carry, int], int],
) -> None:
    for a, b in PAIRS:
        carry = Carry(a, b)
        counts = [measure(carry, n) for n in range(1, a.experts + 1)]
        assert counts == sorted(counts)
        assert counts[0] >= 1


def test_layers_follow_the_source_in_order_and_share_it_evenly() -> None:
    layer_of = Carry(REFERENCE, DEEPSEEK).layer_of
    followed = [layer_of[i] for i in DEEPSEEK.moe_layers]
    assert followed == sorted(followed)
    counts = [followed.count(i) for i in REFERENCE.moe_layers]
    assert sum(counts) == 58
    assert max(counts) - min(counts) <= 1


def test_a_tensor_follows_its_own_role() -> None:
    carry = Carry(REFERENCE, DEEPSEEK)
    for target, source in carry.tensor_of.items():
        assert DEEPSEEK.by_name[target].role == REFERENCE.by_name[source].role
    assert carry.tensor_of["output.weight"] == "output.weight"
    assert sum(len(v) for v in carry.targets_of.values()) == len(DEEPSEEK.quantizable)


def test_a_layers_experts_and_their_tensors_follow_the_same_source_layer() -> None:
    carry = Carry(REFERENCE, DEEPSEEK)
    for layer in DEEPSEEK.moe_layers:
        for role in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            source = carry.tensor_of[f"blk.{layer}.{role}.weight"]
            assert REFERENCE.by_name[source].layer == carry.layer_of[layer]


def test_a_role_the_source_lacks_follows_the_most_similar_one() -> None:
    carry = Carry(tiny.inventory(first_k_dense_replace=0), DEEPSEEK)
    assert carry.tensor_of["blk.0.ffn_gate.weight"].split(".")[2].startswith("ffn_gate")
    assert carry.tensor_of["blk.2.ffn_down.weight"].split(".")[2].startswith("ffn_down")


@settings(deadline=None)
@given(POSITIONS, SEEDS)
def test_a_type_with_fewer_bits_never_takes_more_bytes(position: int, rng: random.Random) -> None:
    carry = CARRIES[position]
    tensor = rng.choice(carry.source.quantizable)
    kinds = sorted(ladder(tensor.row), key=lambda name: quant_type(name).bits_per_weight)
    full = [carry.bytes(tensor.name, kind, carry.source.experts) for kind in kinds]
    if tensor.row % 256 == 0 and all(
        carry.target.by_name[n].row % 256 == 0 for n in carry.targets_of[tensor.name]
    ):
        assert full == sorted(full)
    half = [carry.bytes(tensor.name, kind, carry.source.experts // 2) for kind in kinds]
    assert all(a <= b for a, b in zip(half, full, strict=True))
