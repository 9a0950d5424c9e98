"""Packing alone: everything that is asked is scored once, in its own context and nothing else's."""

from __future__ import annotations

import numpy as np
import pytest

from evaluators.shared_prefix import BRANCHES, LENGTH, Item, pack, share, unique_rows


def random_requests(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Items of one to four continuations of up to nine tokens, in a mixed order."""
    generator = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        context = generator.integers(0, 50, generator.integers(1, 30)).tolist()
        for _ in range(generator.integers(1, 5)):
            out.append((context, generator.integers(0, 50, generator.integers(1, 10)).tolist()))
    return [out[i] for i in generator.permutation(len(out))]


def test_every_target_is_scored_after_its_own_context_and_continuation_alone() -> None:
    requests = random_requests(0, 40)
    items, places = share(requests, 100)
    assert len(items) == len({tuple(context) for context, _ in requests})
    seen = {}
    for p in pack(items, 64):
        attends = p.attends()
        for score, place in enumerate(p.scores):
            chosen = p.owners == score
            # A token sees what it attends to in the order of positions, each position once.
            row = p.rows[chosen][-1]
            order = np.flatnonzero(attends[row])
            order = order[np.argsort(p.positions[order])]
            assert p.positions[order].tolist() == list(range(len(order)))
            seen[place] = (p.tokens[order].tolist(), p.targets[chosen].tolist())
    for place, (context, after) in zip(places, requests, strict=True):
        assert seen[place] == (context + after[:-1], after)


def test_a_context_is_computed_once_for_all_its_continuations() -> None:
    context = list(range(90))
    items, places = share([(context, [i, 1, 2, 3]) for i in range(4)], 200)
    (only,) = pack(items, 256)
    assert places == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert len(only.tokens) == items[0].length == 90 + 4 * 3  # request by request: 4 * 93
    rows, index, targets = unique_rows([only], len(only.tokens))
    assert len(rows) == 1 + 4 * 3  # what comes first is read off one token
    assert rows[index].tolist() == only.rows.tolist()
    assert targets.tolist() == [t for i in range(4) for t in (i, 1, 2, 3)]


def test_requests_that_are_equal_are_computed_once() -> None:
    items, places = share([([1, 2], [3]), ([1, 2], [3]), ([1], [2, 3])], 10)
    assert places == [(0, 0), (0, 0), (1, 0)]
    assert sum(i.length for i in items) == 4


def test_a_context_of_very_many_continuations_is_several_items() -> None:
    after = [[i, *range(i % 9)] for i in range(1000)]
    items, places = share([([1, 2], c) for c in after + after], 100)
    assert places[:1000] == places[1000:]
    assert [list(items[i].continuations[b]) for i, b in places[:1000]] == after
    assert {item.context for item in items} == {(1, 2)}
    assert max(item.length for item in items) <= 2 + LENGTH
    assert max(len(item.continuations) for item in items) <= BRANCHES
    assert len(items) < 25
    # Four long choices stay together where the context is long too.
    items, _ = share([(list(range(500)), [i] * 100) for i in range(4)], 1000)
    assert len(items) == 1


def test_what_is_too_long_loses_its_start() -> None:
    context = list(range(10))
    items, places = share([(context, [7]), (context, [7, 7]), (context, [8, 8])], 6)
    assert [items[i].context for i, _ in places] == [(4, 5, 6, 7, 8, 9), (5, 6, 7, 8, 9), (5, 6, 7, 8, 9)]
    # The last token is not seen, so that six are.
    assert [len(items[i].context) + len(items[i].continuations[b]) - 1 for i, b in places] == [6, 6, 6]
    for bad in ([], [7] * 7):
        with pytest.raises(ValueError, match="at most 6"):
            share([(context, bad)], 6)
    with pytest.raises(ValueError, match="a context of 0 tokens"):
        share([([], [7])], 6)


def test_packs_keep_to_their_limits_and_hold_everything() -> None:
    items, _ = share(random_requests(1, 60), 100)
    items.append(Item(tuple(range(200)), ((1,),)))
    packs = pack(items, 64, 6)
    assert [len(p.tokens) for p in packs if len(p.tokens) > 64] == [200]
    assert max(len(p.scores) for p in packs) <= 6
    assert sorted(s for p in packs for s in p.scores) == [
        (i, b) for i, item in enumerate(items) for b in range(len(item.continuations))
    ]
    assert sum(len(p.tokens) for p in packs) == sum(i.length for i in items)
    full = max(sum(i.length for i in items) / 64, sum(len(i.continuations) for i in items) / 6)
    assert len(packs) < 1.2 * full


def test_sums_are_of_a_continuations_own_targets() -> None:
    (p,) = pack([Item((1,), ((5, 6), (7,)))], 10)
    assert p.targets.tolist() == [5, 6, 7]
    sums = p.sums(np.array([-1.0, -2.0, -4.0]), np.array([True, False, True]))
    assert sums == {(0, 0): (-3.0, False), (0, 1): (-4.0, True)}
