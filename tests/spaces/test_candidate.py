"""Candidates survive JSON unchanged, and every rule of a valid one is checked."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spaces.candidate import Candidate, MoeLayer
from spaces.errors import UserError
from spaces.inventory import Inventory
from tests.spaces import tiny

MODEL = tiny.inventory()
GROUPED = tiny.inventory(**tiny.GROUPED)
UNIFORM = Candidate.uniform(MODEL, "Q4_K")
SPACE = tiny.space()


@st.composite
def candidates(draw: st.DrawFn) -> Candidate:
    rng = random.Random(draw(st.integers(0, 2**32)))
    return SPACE.candidate(tiny.random_params(SPACE, rng))


ANY_CANDIDATE = st.builds(
    Candidate,
    st.lists(
        st.builds(
            MoeLayer, st.integers(0, 99), st.lists(st.integers(-5, 300)).map(tuple), st.integers(-2, 9)
        ),
        max_size=3,
    ).map(tuple),
    st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=4).map(lambda d: tuple(d.items())),
)


@settings(deadline=None)
@given(st.one_of(candidates(), ANY_CANDIDATE))
def test_json_gives_the_same_candidate_back(candidate: Candidate) -> None:
    again = Candidate.from_json(candidate.to_json())
    assert again == candidate
    assert again.key == candidate.key
    assert again.to_json() == candidate.to_json()
    assert hash(again) == hash(candidate)


@settings(deadline=None)
@given(candidates(), candidates())
def test_keys_are_equal_exactly_for_equal_candidates(a: Candidate, b: Candidate) -> None:
    assert (a.key == b.key) == (a == b)


def test_any_change_changes_the_key() -> None:
    first, *rest = UNIFORM.layers
    changed = [
        replace(UNIFORM, layers=(replace(first, top_k=1), *rest)),
        replace(UNIFORM, layers=(replace(first, experts=(0, 1, 2)), *rest)),
        replace(UNIFORM, layers=(replace(first, experts=(0, 1, 3)), *rest)),
        replace(UNIFORM, types=((UNIFORM.types[0][0], "Q8_0"), *UNIFORM.types[1:])),
    ]
    assert len({c.key for c in (UNIFORM, *changed)}) == 5


@pytest.mark.parametrize("kind", ["IQ1_S", "Q4_K", "BF16", "F32"])
def test_a_uniform_candidate_is_valid_and_portable(kind: str) -> None:
    for model in (MODEL, GROUPED):
        candidate = Candidate.uniform(model, kind)
        candidate.validate(model)
        assert candidate.portable
        assert candidate.plan == model.uniform_plan(kind)


def with_layer(**changes: Any) -> Candidate:
    """The uniform candidate with its first MoE layer changed."""
    first, *rest = UNIFORM.layers
    return replace(UNIFORM, layers=(replace(first, **changes), *rest))


def with_type(position: int, name: str | None = None, kind: str = "Q4_K") -> Candidate:
    types = list(UNIFORM.types)
    types[position] = (name or types[position][0], kind)
    return replace(UNIFORM, types=tuple(types))


SHORT_ROWS = next(i for i, (n, _) in enumerate(UNIFORM.types) if "attn_k_b" in n)
SWAPPED = (UNIFORM.types[1], UNIFORM.types[0], *UNIFORM.types[2:])


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (replace(UNIFORM, layers=UNIFORM.layers[:-1]), "MoE layers"),
        (replace(UNIFORM, layers=UNIFORM.layers[::-1]), "MoE layers"),
        (replace(UNIFORM, layers=()), "MoE layers"),
        (with_layer(layer=0), "MoE layers"),
        (with_layer(experts=()), "distinct, ascending"),
        (with_layer(experts=(1, 0)), "distinct, ascending"),
        (with_layer(experts=(0, 0, 1)), "distinct, ascending"),
        (with_layer(experts=(-1, 0)), "within 0..7"),
        (with_layer(experts=(0, 8)), "within 0..7"),
        (with_layer(top_k=0), "top_k must be within 1..2"),
        (with_layer(top_k=3), "top_k must be within 1..2"),
        (with_layer(experts=(4,), top_k=2), "top_k must be within 1..1"),
        (replace(UNIFORM, types=UNIFORM.types[1:]), "token_embd.weight"),
        (replace(UNIFORM, types=SWAPPED), "their order"),
        (replace(UNIFORM, types=(*UNIFORM.types, ("extra.weight", "Q4_K"))), "extra.weight"),
        (with_type(0, name="output_norm.weight"), "output_norm.weight|token_embd.weight"),
        (with_type(0, kind="Q9_Z"), "unknown quantization type 'Q9_Z'"),
        (with_type(SHORT_ROWS, kind="Q4_K"), "blocks of 256"),
    ],
)
def test_a_broken_rule_is_named_in_one_line(candidate: Candidate, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        candidate.validate(MODEL, "file.json")
    assert "\n" not in str(error.value)


def test_group_limited_routing_needs_even_groups() -> None:
    uniform = Candidate.uniform(GROUPED, "Q4_K")

    def keep(*experts: int) -> Candidate:
        first, *rest = uniform.layers
        return replace(uniform, layers=(replace(first, experts=experts, top_k=1), *rest))

    keep(0, 1, 4, 5, 8, 9, 12, 13).validate(GROUPED)
    keep(2, 3, 4, 5, 8, 11, 12, 15).validate(GROUPED)
    for uneven in ((0, 1, 2, 3), (0, 4, 8), (0, 1, 4, 5, 8, 9, 12), (0, 1, 4, 8, 12)):
        with pytest.raises(UserError, match="each of the 4 groups"):
            keep(*uneven).validate(GROUPED)


@pytest.mark.parametrize(("model", "experts"), [(MODEL, (4,)), (GROUPED, (3, 4, 11, 12))])
def test_a_router_that_ranks_groups_by_two_experts_needs_two_of_each(
    model: Inventory, experts: tuple[int, ...]
) -> None:
    uniform = Candidate.uniform(model, "Q4_K")
    few = replace(uniform.layers[0], experts=experts, top_k=1)
    wanted = replace(uniform, layers=(few, *uniform.layers[1:]))
    with pytest.raises(UserError, match=r"layer 1: .* needs 2 experts kept per group, got 1"):
        wanted.validate(model)
    wanted.validate(replace(model, least_per_group=1))


def test_portable_means_one_count_and_one_top_k() -> None:
    assert not with_layer(experts=(0, 1, 2)).portable
    assert not with_layer(top_k=1).portable
    other = replace(UNIFORM, layers=tuple(replace(m, experts=(m.layer, 7)) for m in UNIFORM.layers))
    assert other.portable  # which experts stay may differ


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.floats(allow_infinity=False)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LAYER = st.one_of(JSON, st.fixed_dictionaries({"layer": JSON, "experts": JSON, "top_k": JSON}))
DOCUMENT = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {
            "version": st.one_of(st.just(1), JSON),
            "layers": st.one_of(JSON, st.lists(LAYER, max_size=2)),
            "types": st.one_of(JSON, st.dictionaries(st.text(max_size=5), JSON, max_size=2)),
        }
    ),
)


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.text(max_size=40), DOCUMENT.map(json.dumps)))
@example("[" * 100_000)
@example('{"version": 1, "layers": ' + "9" * 5000 + "}")
@example(UNIFORM.to_json()[:-1])
def test_hostile_json_is_never_more_than_a_user_error(text: str) -> None:
    try:
        candidate = Candidate.from_json(text, "file.json")
        candidate.validate(MODEL, "file.json")
    except UserError as error:
        message = str(error)
    else:
        pytest.fail(f"accepted as a candidate of the model: {text}")
    assert "\n" not in message


@pytest.mark.parametrize("field", ["layer", "top_k", "experts"])
def test_an_infinite_number_is_refused(field: str) -> None:
    data = json.loads(UNIFORM.to_json())
    data["layers"][0][field] = [float("inf")] if field == "experts" else float("inf")
    with pytest.raises(UserError):
        Candidate.from_json(json.dumps(data))


@pytest.mark.parametrize("version", [0, 2, None, "1", []])
def test_another_version_is_refused(version: Any) -> None:
    data = json.loads(UNIFORM.to_json()) | {"version": version}
    with pytest.raises(UserError, match="version must be 1"):
        Candidate.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("field", "value"), [("top_k", 1.7), ("top_k", "2"), ("top_k", True), ("experts", "0123"), ("layer", 1.2)]
)
def test_a_field_of_the_wrong_kind_is_refused(field: str, value: Any) -> None:
    data = json.loads(UNIFORM.to_json())
    data["layers"][0][field] = value
    with pytest.raises(UserError):
        Candidate.from_json(json.dumps(data))
