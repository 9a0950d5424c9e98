"""What was used last is kept, never more than there is room for, and a model that uses it is unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint
from compression.recent import Recent
from evaluators.texts import TextSet
from tests.compression.support import candidate, logits, mixed_types, provide

NAMES = "abcdef"


def held(cache: Recent[str, Any]) -> list[str]:
    """What a cache holds, the longest unused first; looking at it changes no order."""
    found = [name for name in cache._held if name in NAMES]
    assert all(cache.get(name) is not None for name in found)
    return found


def filled(capacity: int, *sizes: int) -> Recent[str, str]:
    cache: Recent[str, str] = Recent(capacity)
    for name, size in zip(NAMES, sizes, strict=False):
        cache.put(name, name.upper, size)
    return cache


def unwanted() -> str:
    raise AssertionError("nothing should be made")


def test_a_value_is_given_back_until_it_is_forgotten() -> None:
    cache = filled(10, 4, 4)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == ("A", "B", None)
    cache.put("c", lambda: "C", 4)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (None, "B", "C")


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = filled(12, 4, 4, 4)
    cache.get("a")
    cache.put("d", lambda: "D", 4)
    assert held(cache) == ["c", "a", "d"]


def test_as_many_go_as_have_to() -> None:
    cache = filled(12, 4, 4, 4)
    cache.put("d", lambda: "D", 8)
    assert held(cache) == ["c", "d"]
    assert cache.size == 12


def test_what_has_no_place_at_all_displaces_nothing_and_is_not_made() -> None:
    cache = filled(8, 4, 4)
    cache.put("c", unwanted, 9)
    assert held(cache) == ["a", "b"]
    Recent[str, str](0).put("a", unwanted, 1)


def test_what_is_held_is_not_made_again() -> None:
    cache = filled(8, 4, 4)
    cache.put("a", unwanted, 4)
    assert (cache.get("a"), cache.size) == ("A", 8)


uses = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 9), st.booleans()), max_size=40)


@given(st.integers(0, 20), uses)
def test_it_is_a_list_ordered_by_use(capacity: int, steps: list[tuple[str, int, bool]]) -> None:
    cache: Recent[str, tuple[str, int]] = Recent(capacity)
    expected: list[tuple[str, int]] = []
    for name, size, put in steps:
        known = next((entry for entry in expected if entry[0] == name), None)
        if put:
            cache.put(name, lambda entry=(name, size): entry, size)
            if known is None and size <= capacity:
                while sum(s for _, s in expected) + size > capacity:
                    expected.pop(0)
                expected.append((name, size))
        else:
            assert cache.get(name) == known
            if known is not None:
                expected.remove(known)
                expected.append(known)
        assert cache.size == sum(s for _, s in expected) <= capacity
    assert [cache.get(name) for name in held(cache)] == expected


@pytest.fixture
def windows(tiny_texts: dict[str, TextSet]) -> np.ndarray:
    return tiny_texts["search"].windows[:2, :24]


def cached(tiny: Checkpoint, like: CandidateModel, capacity: int, stream: bool = False) -> CandidateModel:
    return CandidateModel(tiny, tiny.inventory, like.bank, stream, capacity)


@pytest.mark.parametrize("capacity", [10**9, 3 * 10**6], ids=["everything", "a few tensors"])
def test_a_model_with_a_cache_is_every_candidate_that_one_without_is(
    tiny: Checkpoint, tiny_model: CandidateModel, windows: np.ndarray, capacity: int
) -> None:
    inventory, model = tiny.inventory, cached(tiny, tiny_model, capacity)
    first = provide(tiny_model, candidate(inventory, {1: (0, 2, 6)}, {2: 1}, mixed_types(inventory)))
    second = provide(tiny_model, candidate(inventory, {2: (1, 4, 5)}))
    seen = []
    for wanted in (first, second, None, second, first, None, first):
        for m in (tiny_model, model):
            m.reset() if wanted is None else m.apply(wanted)
        seen.append(logits(tiny_model, windows))
        assert np.array_equal(logits(model, windows), seen[-1])
        assert 0 < sum(v.nbytes for views, _ in model._recent._held.values() for v in views) <= capacity
    assert np.abs(seen[0] - seen[1]).max() > 0.1 < np.abs(seen[1] - seen[2]).max()
    state = model.model.state_dict()
    for name, value in tiny_model.model.state_dict().items():
        assert np.array_equal(state[name], value), name


def test_a_model_reads_nothing_that_lies_in_its_cache(
    tiny: Checkpoint, tiny_model: CandidateModel, windows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory, model = tiny.inventory, cached(tiny, tiny_model, 10**9)
    wanted = provide(tiny_model, candidate(inventory, types=mixed_types(inventory)))
    base = logits(model, windows)
    model.apply(wanted)
    expected = logits(model, windows)
    monkeypatch.setattr(model.bank, "blocks", lambda *args: pytest.fail("read again"))
    monkeypatch.setattr(type(tiny.weights), "read", lambda *args: pytest.fail("read again"))
    monkeypatch.setattr(type(tiny.weights), "parameter", lambda *args: pytest.fail("read again"))
    for _ in range(2):
        model.reset()
        assert np.array_equal(logits(model, windows), base)
        model.apply(wanted)
        assert np.array_equal(logits(model, windows), expected)


@pytest.mark.parametrize(("capacity", "stream"), [(0, False), (10**9, True)])
def test_a_streamed_model_and_one_without_room_keep_nothing(
    tiny: Checkpoint, tiny_model: CandidateModel, windows: np.ndarray, capacity: int, stream: bool
) -> None:
    model = cached(tiny, tiny_model, capacity, stream)
    model.apply(provide(tiny_model, candidate(tiny.inventory)))
    logits(model, windows)
    assert model._recent.size == 0
