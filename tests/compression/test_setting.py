"""A setting says all that a candidate does, block by block, and says the same thing in one way only."""

from __future__ import annotations

import random
from importlib import resources
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.families import describe
from compression.setting import BlockSetting, Setting, Settings
from spaces.candidate import Candidate
from spaces.inventory import published_targets, read_config
from tests.compression.support import EVERY, candidate
from tests.spaces import tiny

INVENTORY = tiny.inventory()
OF = Settings(INVENTORY)
SPACE = tiny.space()
FEW = (0, 2, 5, 7)

DENSE, STACK, OUTPUT, EMBEDDING = (
    "blk.0.ffn_up.weight", "blk.2.ffn_up_exps.weight", "output.weight", "token_embd.weight",
)  # fmt: skip


def differing(one: Setting, other: Setting) -> list[int | str]:
    """Where two settings differ."""
    pairs = zip(one.blocks, other.blocks, strict=True)
    found: list[int | str] = [i for i, (a, b) in enumerate(pairs) if a != b]
    return found + [part for part in ("entry", "exit") if getattr(one, part) != getattr(other, part)]


def test_a_candidate_is_in_its_setting_whole() -> None:
    params = tiny.random_params(SPACE, random.Random(3)) | {"form": "ragged"}
    wanted = SPACE.candidate(params)
    setting = OF.of(wanted)
    types = [*setting.entry, *(pair for block in setting.blocks for pair in block.types), *setting.exit]
    assert sorted(types) == sorted(wanted.types)
    for m in wanted.layers:
        block = setting.blocks[m.layer]
        assert (block.experts or EVERY) == m.experts
        assert (block.top_k or INVENTORY.top_k) == m.top_k
    assert len({len(m.experts) for m in wanted.layers}) > 1


def test_blocks_hold_their_own_tensors() -> None:
    setting = OF.base
    assert len(setting.blocks) == INVENTORY.layers
    for layer, block in enumerate(setting.blocks):
        names = {name for name, _ in block.types}
        assert names == {t.name for t in INVENTORY.quantizable if t.layer == layer}
    assert [name for name, _ in setting.entry] == [EMBEDDING]
    assert [name for name, _ in setting.exit] == [OUTPUT]


def test_the_base_is_as_in_the_model() -> None:
    types = [*OF.base.entry, *(pair for block in OF.base.blocks for pair in block.types), *OF.base.exit]
    assert {type_name for _, type_name in types} == {None}
    assert {(block.experts, block.top_k) for block in OF.base.blocks} == {(None, None)}


@pytest.mark.parametrize("name", [t.name for t in INVENTORY.quantizable])
def test_one_type_changes_one_place(name: str) -> None:
    layer = INVENTORY.by_name[name].layer
    place = {OUTPUT: "exit", EMBEDDING: "entry"}.get(name, layer)
    assert differing(OF.of_types({name: "Q8_0"}), OF.base) == [place]


def test_a_matrix_that_is_embedding_and_output_is_in_both_places() -> None:
    tied = tiny.inventory(tie_word_embeddings=True)
    assert OUTPUT not in tied.by_name
    of = Settings(tied)
    changed = of.of_types({EMBEDDING: "Q8_0"})
    assert changed.entry == changed.exit == ((EMBEDDING, "Q8_0"),)
    assert differing(changed, of.base) == ["entry", "exit"]


def test_routing_changes_one_block_and_leaves_its_types() -> None:
    start = OF.of_types({STACK: "Q4_K", OUTPUT: "Q6_K"})
    for experts, top_k in ((FEW, None), (None, 1), (FEW, 1)):
        changed = OF.routed(start, 2, experts, top_k)
        assert differing(changed, start) == [2]
        assert changed.blocks[2] == BlockSetting(start.blocks[2].types, experts, top_k)
    assert OF.routed(OF.routed(start, 2, FEW, 1), 2, None) == start


def test_what_is_as_in_the_model_is_said_in_one_way() -> None:
    for experts, top_k in ((EVERY, None), (None, INVENTORY.top_k), (EVERY, INVENTORY.top_k)):
        assert OF.routed(OF.base, 1, experts, top_k) == OF.base
    eight = Candidate.uniform(INVENTORY, "Q8_0")
    assert OF.of(eight) == OF.of_types(dict(eight.types))


def test_candidates_share_the_blocks_in_which_they_agree() -> None:
    one = candidate(INVENTORY, {1: FEW}, {2: 1})
    other = candidate(INVENTORY, {1: FEW}, types={DENSE: "Q4_K"})
    assert differing(OF.of(one), OF.of(other)) == [0, 2]
    assert hash(OF.of(one).blocks[1]) == hash(OF.of(other).blocks[1])


seeds = st.integers(0, 2**32)


@settings(deadline=None, max_examples=40)
@given(seeds, seeds)
def test_settings_are_equal_just_when_candidates_are(one: int, other: int) -> None:
    first, second, again = (
        SPACE.candidate(tiny.random_params(SPACE, random.Random(seed))) for seed in (one, other, one)
    )
    assert OF.of(first) == OF.of(again)
    assert hash(OF.of(first)) == hash(OF.of(again))
    assert (OF.of(first) == OF.of(second)) == (first == second)


blocks = st.builds(
    BlockSetting,
    st.tuples(*(st.tuples(st.just(n), st.sampled_from([None, "Q8_0", "Q4_K"])) for n in ("a", "b"))),
    st.sampled_from([None, (0,), (0, 3), (1, 2, 3)]),
    st.sampled_from([None, 1, 2]),
)


@given(st.lists(blocks, max_size=12))
def test_blocks_are_ordered_so_that_equal_types_are_neighbours(some: list[BlockSetting]) -> None:
    ordered = sorted(some, key=lambda block: block.order)
    for part in ("types", "experts"):
        runs = [(b.types, b.experts) if part == "experts" else b.types for b in ordered]
        changes = sum(a != b for a, b in pairwise(runs))
        assert changes == max(0, len(set(runs)) - 1)


@given(blocks, blocks)
def test_the_order_tells_blocks_apart(one: BlockSetting, other: BlockSetting) -> None:
    assert (one.order == other.order) == (one == other)


@pytest.mark.parametrize("name", published_targets())
def test_every_published_model_has_settings(name: str) -> None:
    with resources.as_file(resources.files("spaces").joinpath("configs")) as folder:
        inventory = describe(read_config(folder / f"{name}.json"), name)
    setting = Settings(inventory).of(Candidate.uniform(inventory, "Q4_K"))
    names = [n for part in (setting.entry, *(b.types for b in setting.blocks), setting.exit) for n, _ in part]
    assert set(names) == {t.name for t in inventory.quantizable}
    assert setting.exit
