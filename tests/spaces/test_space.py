"""Every set of parameters in the space means a valid candidate, and one spelling means one candidate."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.families import open_inventory
from spaces.errors import UserError
from spaces.quant_types import ladder
from spaces.space import PORTABLE, RAGGED, SET, Space, pick
from tests.spaces import tiny


def sets(space: Space, seed: int = 0) -> dict[int, dict[int, tuple[int, ...]]]:
    """Random experts of every layer and count but the full one, as many per group."""
    rng, everyone = random.Random(seed), range(space.inventory.experts)
    return {
        layer: {
            n: pick(tuple(rng.sample(everyone, len(everyone))), n, space.inventory.groups)
            for n in space.kept_options[:-1]
        }
        for layer in space.inventory.moe_layers
    }


def with_sets(space: Space, seed: int = 0) -> Space:
    return replace(space, sets=sets(space, seed))


SPACES = [
    tiny.space(),
    tiny.space("llama.cpp"),
    tiny.space("transformers", **tiny.GROUPED),
    tiny.space("llama.cpp", **tiny.GROUPED),
    tiny.space(n_routed_experts=7, num_experts_per_tok=3),
    tiny.space(n_routed_experts=3, num_experts_per_tok=3),
    tiny.space(n_routed_experts=2, num_experts_per_tok=1),
    tiny.space(n_routed_experts=64, num_hidden_layers=2, n_group=8),
    tiny.space(first_k_dense_replace=0, qk_nope_head_dim=48, kv_lora_rank=96),
    with_sets(tiny.space()),
    with_sets(tiny.space("llama.cpp", **tiny.GROUPED)),
]
POSITIONS = st.integers(0, len(SPACES) - 1)
SEEDS = st.integers(0, 2**32).map(random.Random)


@settings(deadline=None, max_examples=150)
@given(POSITIONS, SEEDS)
def test_every_sample_is_a_valid_candidate(position: int, rng: random.Random) -> None:
    space = SPACES[position]
    params = tiny.random_params(space, rng)
    candidate = space.candidate(params)
    candidate.validate(space.inventory)
    if params["form"] == PORTABLE:
        assert candidate.portable


@settings(deadline=None)
@given(SEEDS)
def test_a_runtime_with_one_count_only_gets_portable_candidates(rng: random.Random) -> None:
    space = SPACES[1]
    assert space.forms == (PORTABLE,)
    assert not [name for name in space.distributions if name.endswith((".kept", ".top_k"))]
    assert space.candidate(tiny.random_params(space, rng)).portable


def test_a_runtime_that_takes_both_gets_both() -> None:
    space = SPACES[0]
    rng = random.Random(0)
    seen = {space.candidate(tiny.random_params(space, rng)).portable for _ in range(40)}
    assert seen == {True, False}


def test_an_unknown_runtime_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'llama\.cpp'"):
        tiny.space("llamacpp")


def random_choice(space: Space, rng: random.Random, *, ragged: bool) -> tuple[Any, Any, Any, Any]:
    layers = space.inventory.moe_layers
    types = {t.name: rng.choice(ladder(t.row)) for t in space.inventory.quantizable}
    criteria = {i: rng.choice(space.criteria) for i in layers}
    if not ragged:
        return types, rng.choice(space.kept_options), criteria, rng.choice(space.top_k_options)
    kept = {i: rng.choice(space.kept_options) for i in layers}
    return types, kept, criteria, {i: rng.choice(space.top_k_options) for i in layers}


@settings(deadline=None, max_examples=60)
@given(POSITIONS, SEEDS, st.booleans())
def test_parameters_mean_what_they_were_made_of(position: int, rng: random.Random, ragged: bool) -> None:
    space = SPACES[position]
    ragged = ragged and RAGGED in space.forms
    types, kept, criteria, top_k = random_choice(space, rng, ragged=ragged)
    params = space.params(types, kept, criteria, top_k)
    assert params.keys() == space.distributions.keys()
    for name, distribution in space.distributions.items():
        assert distribution.to_internal_repr(params[name]) >= 0
    candidate = space.candidate(params)
    assert dict(candidate.types) == types
    assert params["form"] == (PORTABLE if candidate.portable else RAGGED)
    for m in candidate.layers:
        count = kept if isinstance(kept, int) else kept[m.layer]
        assert m.experts == space.experts(m.layer, count, criteria[m.layer])
        assert m.top_k == (top_k if isinstance(top_k, int) else top_k[m.layer])


def test_counts_that_agree_are_spelled_as_portable() -> None:
    space = SPACES[0]
    types = {t.name: "BF16" for t in space.inventory.quantizable}
    layers = space.inventory.moe_layers
    spelled = space.params(types, dict.fromkeys(layers, 4), "reap", dict.fromkeys(layers, 1))
    assert spelled == space.params(types, 4, "reap", 1)
    assert spelled["form"] == PORTABLE


def test_all_experts_of_the_model_are_active_unless_said_otherwise() -> None:
    space = SPACES[0]
    types = {t.name: "BF16" for t in space.inventory.quantizable}
    candidate = space.candidate(space.params(types, 8, "reap"))
    assert {m.top_k for m in candidate.layers} == {space.inventory.top_k}


@st.composite
def picks(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    groups = draw(st.integers(1, 4))
    size = draw(st.integers(1, 5))
    order = draw(st.permutations(range(groups * size)))
    return tuple(order), groups * draw(st.integers(1, size)), groups


@given(picks())
def test_the_best_experts_of_every_group_stay(case: tuple[tuple[int, ...], int, int]) -> None:
    order, count, groups = case
    chosen = pick(order, count, groups)
    assert list(chosen) == sorted(set(chosen))
    size = len(order) // groups
    for group in range(groups):
        members = [e for e in order if e // size == group]
        assert {e for e in chosen if e // size == group} == set(members[: count // groups])


@given(picks(), st.integers(1, 5))
def test_keeping_more_keeps_the_same_and_more(case: tuple[tuple[int, ...], int, int], more: int) -> None:
    order, count, groups = case
    larger = min(len(order), count + groups * more)
    assert set(pick(order, count, groups)) <= set(pick(order, larger, groups))


@pytest.mark.parametrize("space", SPACES, ids=range(len(SPACES)))
def test_expert_counts_are_whole_per_group_and_reach_from_a_quarter_to_all(space: Space) -> None:
    model, counts = space.inventory, space.kept_options
    assert list(counts) == sorted(set(counts))
    assert counts[-1] == model.experts
    assert counts[0] >= max(model.top_k, model.experts // 4)
    assert all(n % model.groups == 0 for n in counts)
    if model.groups > 1:
        assert counts[0] >= 2 * model.groups


def test_digest_tells_spaces_apart_and_nothing_else() -> None:
    assert tiny.space().digest == tiny.space().digest
    model = tiny.inventory()
    others = [
        tiny.space("llama.cpp"),
        tiny.space(num_hidden_layers=5),
        Space(model, tiny.rankings(model, seed=1)),
        tiny.space(qk_nope_head_dim=256),
        with_sets(tiny.space()),
        with_sets(tiny.space(), seed=1),
    ]
    assert len({s.digest for s in (tiny.space(), *others)}) == 7


def test_sets_are_the_last_criterion_and_give_their_own_experts() -> None:
    plain = tiny.space(**tiny.GROUPED)
    space = with_sets(plain)
    assert space.criteria == ("reap", "mass", "paper", SET)
    everyone = tuple(range(16))
    for layer, by in space.sets.items():
        for count, kept in by.items():
            assert space.experts(layer, count, SET) == kept
            assert space.experts(layer, count, "reap") == plain.experts(layer, count, "reap")
        assert space.experts(layer, 16, SET) == everyone
    added = set(space.distributions) ^ set(plain.distributions)
    assert not added
    assert [n for n in plain.distributions if plain.distributions[n] != space.distributions[n]] == [
        f"blk.{layer}.criterion" for layer in space.inventory.moe_layers
    ]


def test_without_sets_nothing_changes() -> None:
    plain, empty = tiny.space(), replace(tiny.space(), sets={})
    assert (empty.criteria, empty.digest, empty.distributions) == (
        plain.criteria,
        plain.digest,
        plain.distributions,
    )
    with pytest.raises(KeyError):
        plain.experts(1, 4, SET)


@pytest.mark.parametrize("gap", ["layer", "count"])
def test_sets_with_a_gap_are_refused(gap: str) -> None:
    space = tiny.space()
    found = sets(space)
    del (found if gap == "layer" else found[2])[2 if gap == "layer" else 4]
    with pytest.raises(UserError, match=r"none of . experts in layer 2"):
        replace(space, sets=found)


def test_the_number_of_candidates_is_counted() -> None:
    # One MoE layer, so that every factor can be written down.
    space = tiny.space("llama.cpp", num_hidden_layers=2)
    long_rows = [t for t in space.inventory.quantizable if t.row % 256 == 0]
    short_rows = [t for t in space.inventory.quantizable if t.row % 256]
    expected = 15 ** len(long_rows) * 4 ** len(short_rows) * len(space.kept_options) * 2 * 3
    assert 10**space.log10_size == pytest.approx(expected, rel=1e-9)


def test_deepseek_v3_spans_more_configs_than_could_ever_be_tried() -> None:
    model = open_inventory("deepseek-v3")
    space = Space(model, {"reap": {i: tuple(range(256)) for i in model.moe_layers}})
    assert space.log10_size > 500
    assert space.kept_options == tuple(range(64, 257, 16))
