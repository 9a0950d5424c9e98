"""The parts a candidate is taken apart into."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from compression.setting import Setting, Settings
from evaluators.contributions import LEVERS, parts, role_of
from spaces.candidate import Candidate, MoeLayer
from tests.spaces import tiny

SPACE = tiny.space(num_hidden_layers=3)
INVENTORY = SPACE.inventory
SETTINGS = Settings(INVENTORY)
CANDIDATE = Candidate(
    tuple(MoeLayer(i, tuple(range(INVENTORY.experts - 1)), 1) for i in INVENTORY.moe_layers),
    tuple((t.name, SPACE.ladder(t)[0]) for t in INVENTORY.quantizable),
)
PARTS = {(p.kind, p.name): p.setting for p in parts(SETTINGS, CANDIDATE)}


def types_of(setting: Setting) -> Mapping[str, str]:
    """Tensors that are quantized."""
    pairs = [*setting.entry, *(t for b in setting.blocks for t in b.types), *setting.exit]
    return {n: t for n, t in pairs if t is not None}


def test_all_of_it_is_the_candidate() -> None:
    assert PARTS["all", ""] == SETTINGS.of(CANDIDATE)


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_alone_and_all_without_it_share_nothing_and_make_up_the_whole(lever: str) -> None:
    only, without = PARTS["only", lever], PARTS["without", lever]
    assert (types_of(only) == dict(CANDIDATE.types)) == (lever == "types")
    assert (types_of(without) == {}) == (lever == "types")
    for layer in INVENTORY.moe_layers:
        a, b = only.blocks[layer], without.blocks[layer]
        assert (a.experts is not None) == (lever == "experts")
        assert (b.experts is None) == (lever == "experts")
        assert (a.top_k is not None) == (lever == "top-k")
        assert (b.top_k is None) == (lever == "top-k")


def test_roles_share_out_the_types() -> None:
    found = [types_of(s) for (kind, _), s in PARTS.items() if kind == "role"]
    assert sum(map(len, found)) == len(CANDIDATE.types)
    assert {n: t for some in found for n, t in some.items()} == dict(CANDIDATE.types)


def test_layers_share_out_what_lies_inside_them() -> None:
    for layer in range(INVENTORY.layers):
        names = set(types_of(PARTS["layer types", str(layer)]))
        assert names == {t.name for t in INVENTORY.quantizable if t.layer == layer}
    for m in CANDIDATE.layers:
        setting = PARTS["layer experts", str(m.layer)]
        changed = [i for i, b in enumerate(setting.blocks) if b != SETTINGS.base.blocks[i]]
        assert changed == [m.layer]


def test_every_tensor_has_a_role_that_people_know() -> None:
    known = {"embedding", "output", "attention", "dense feed-forward", "shared expert",
             "routed experts, gate and up", "routed experts, down"}  # fmt: skip
    assert {role_of(t) for t in INVENTORY.quantizable} <= known
    assert {role_of(t) for t in INVENTORY.quantizable if t.per_expert} == {
        "routed experts, gate and up",
        "routed experts, down",
    }
