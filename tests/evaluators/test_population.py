"""A population costs each of its members what it costs alone, and computes what they share once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compression.candidate_model import CandidateModel
from compression.setting import Setting, Settings
from evaluators.divergence import Divergence, base_states, measure
from evaluators.population import Population, Work
from evaluators.texts import TextSet
from spaces.candidate import Candidate
from tests.compression.support import candidate, mixed_types, provide

LENGTH = 16
FEW = (1, 4, 6)


def pool(model: CandidateModel) -> list[Candidate]:
    """Candidates that differ in one thing, in everything, in their last block only, or in nothing."""
    inventory = model.inventory
    mixed = mixed_types(inventory)
    eight = dict(inventory.uniform_plan("Q8_0").types)
    wanted = [
        candidate(inventory),
        candidate(inventory, types=mixed),
        candidate(inventory, {1: FEW, 2: FEW}),  # portable
        candidate(inventory, {1: (0, 2, 3, 6, 7), 2: FEW}, {1: 1}, mixed),  # ragged
        candidate(inventory, top_k={2: 1}),
        candidate(inventory, {2: FEW}),
        candidate(inventory, {2: FEW}, {2: 1}),
        candidate(inventory, {1: FEW}),
        candidate(inventory, types={**eight, "output.weight": "Q4_K"}),
        candidate(inventory, types={**eight, "token_embd.weight": "Q4_K"}),
        candidate(inventory, types={**eight, "blk.1.attn_output.weight": "Q4_K"}),
        candidate(inventory, types={**eight, "blk.0.ffn_down.weight": "Q4_K", "output.weight": "Q4_K"}),
        candidate(inventory, {2: FEW}, types={**eight, "blk.2.ffn_up_exps.weight": "Q4_K"}),
    ]
    for c in wanted:
        provide(model, c)
    return [*wanted, wanted[3], wanted[0]]


@pytest.fixture
def candidates(tiny_model: CandidateModel) -> list[Candidate]:
    return pool(tiny_model)


@pytest.fixture
def of(tiny_model: CandidateModel) -> Settings:
    return Settings(tiny_model.inventory)


@pytest.fixture
def text(tiny_texts: dict[str, TextSet]) -> TextSet:
    """More windows than a block takes at once."""
    whole = tiny_texts["calibration"]
    return replace(whole, windows=whole.windows[:11, :LENGTH], sources=("x",) * 11)


@pytest.fixture
def short(text: TextSet) -> TextSet:
    return replace(text, windows=text.windows[:2, :12], sources=("x",) * 2)


def states_of(model: CandidateModel, text: TextSet, folder: Path) -> np.ndarray:
    model.reset()
    base_states(model, text, folder / "states.npy")
    found: np.ndarray = np.load(folder / "states.npy")
    return found


@pytest.fixture
def states(tiny_model: CandidateModel, text: TextSet, tmp_path: Path) -> np.ndarray:
    return states_of(tiny_model, text, tmp_path)


def one_by_one(
    model: CandidateModel, candidates: Sequence[Candidate], text: TextSet, states: np.ndarray
) -> list[Divergence]:
    out = []
    for c in candidates:
        model.apply(c)
        out.append(measure(model, text, states))
    return out


def check(found: Sequence[Divergence], expected: Sequence[Divergence]) -> None:
    """Both say the same of every window, but for rounding."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.kl, other.kl, rtol=0, atol=1e-6)
        np.testing.assert_allclose(one.nll, other.nll, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(one.top1, other.top1, rtol=0, atol=1e-6)
        assert (one.length, one.bytes_per_token) == (other.length, other.bytes_per_token)


def test_members_score_as_they_do_one_at_a_time(
    tiny_model: CandidateModel, candidates: list[Candidate], of: Settings, text: TextSet, states: np.ndarray
) -> None:
    expected = one_by_one(tiny_model, candidates, text, states)
    distinct = {d.mean_kl for d in expected}
    assert len(distinct) == len(candidates) - 2
    assert min(distinct) > 1e-5
    found = Population(tiny_model).measure([of.of(c) for c in candidates], text, states)
    check(found, expected)
    assert all(d.kl.shape == (11,) for d in found)


def test_the_uncompressed_model_scores_nothing_among_others(
    tiny_model: CandidateModel, candidates: list[Candidate], of: Settings, text: TextSet, states: np.ndarray
) -> None:
    population = [of.of(candidates[3]), of.base, of.of(candidates[1])]
    first, base, last = Population(tiny_model).measure(population, text, states)
    assert abs(base.mean_kl) < 1e-6
    assert base.top1.min() == 1
    assert min(first.mean_kl, last.mean_kl) > 1e-3


def test_little_memory_means_fewer_windows_at_a_time_and_the_same_scores(
    tiny_model: CandidateModel,
    candidates: list[Candidate],
    of: Settings,
    text: TextSet,
    states: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    population, sizes, run = [of.of(c) for c in candidates], set(), tiny_model.run

    def watched(entering: torch.Tensor, first: int, last: int) -> torch.Tensor:
        sizes.add(len(entering))
        return run(entering, first, last)

    monkeypatch.setattr(tiny_model, "run", watched)
    roomy, tight = Population(tiny_model), Population(tiny_model, memory=1)
    expected = roomy.measure(population, text, states)
    assert sizes == {11}
    sizes.clear()
    check(tight.measure(population, text, states), expected)
    assert sizes == {8, 3}
    assert tight.work == roomy.work


def test_states_take_no_more_than_the_memory(
    tiny_model: CandidateModel,
    of: Settings,
    tiny_texts: dict[str, TextSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tiny_texts["calibration"]
    text = replace(whole, windows=whole.windows[:, :8], sources=("x",) * 16)
    states, sizes, embed = states_of(tiny_model, text, tmp_path), [], tiny_model.embed
    population = [of.routed(of.base, 1, FEW[:n]) for n in (2, 3, 2)]
    monkeypatch.setattr(tiny_model, "embed", lambda tokens: (sizes.append(len(tokens)), embed(tokens))[1])
    # Of two distinct candidates, what enters a block and what leaves it, in float32.
    enough = 2 * 2 * 4 * text.windows.size * tiny_model.inventory.hidden
    for memory, expected in ((enough, [16]), (enough - 1, [8, 8])):
        sizes.clear()
        Population(tiny_model, memory).measure(population, text, states)
        assert sizes == expected


def work_of(model: CandidateModel, population: Sequence[Setting], text: TextSet, states: np.ndarray) -> Work:
    """What scoring costs, in passes of the whole text."""
    measured = Population(model)
    measured.measure(population, text, states)
    done = [measured.work.tokens, measured.work.block_tokens, measured.work.head_tokens]
    assert all(n % text.windows.size == 0 for n in done)
    return Work(*(n // text.windows.size for n in done))


def test_what_members_have_in_common_is_computed_once(
    tiny_model: CandidateModel, of: Settings, text: TextSet, states: np.ndarray, candidates: list[Candidate]
) -> None:
    def work(*population: Setting) -> tuple[int, int, int]:
        found = work_of(tiny_model, population, text, states)
        return found.tokens, found.block_tokens, found.head_tokens

    def typed(name: str) -> Setting:
        return of.of_types({name: "Q8_0"})

    base = of.base
    assert work() == (0, 0, 0)
    assert work(base) == (1, 3, 1)
    assert work(base, of.of_types({}), base) == (3, 3, 1)
    assert work(base, typed("output.weight")) == (2, 3, 2)
    assert work(base, typed("token_embd.weight")) == (2, 6, 2)
    assert work(base, typed("blk.2.attn_output.weight")) == (2, 4, 2)
    assert work(base, typed("blk.1.attn_output.weight")) == (2, 5, 2)
    assert work(base, typed("blk.0.attn_output.weight")) == (2, 6, 2)
    assert work(base, of.routed(base, 2, FEW), of.routed(base, 2, FEW, 1)) == (3, 5, 3)
    # The same last block after another first one has other states to start from.
    last = of.routed(base, 2, FEW)
    assert work(last, of.routed(typed("blk.0.attn_output.weight"), 2, FEW)) == (2, 6, 2)


def options(of: Settings, layer: int, count: int) -> list[Setting]:
    """Options of one block, one at a time."""
    names = [t.name for t in of.inventory.quantizable if t.layer == layer]
    return [of.of_types({name: "Q8_0"}) for name in names[:count]]


def test_options_of_the_last_block_share_all_that_is_before_it(
    tiny_model: CandidateModel, of: Settings, text: TextSet, states: np.ndarray, candidates: list[Candidate]
) -> None:
    found = work_of(tiny_model, options(of, 2, 9), text, states)
    assert found == Work(tokens=9, block_tokens=2 + 9, head_tokens=9)


def test_options_spread_evenly_run_their_own_block_and_what_follows(
    tiny_model: CandidateModel, of: Settings, text: TextSet, states: np.ndarray, candidates: list[Candidate]
) -> None:
    spread = [option for layer in range(3) for option in options(of, layer, 5)]
    found = work_of(tiny_model, spread, text, states)
    # And once the uncompressed blocks before the last options.
    assert found == Work(tokens=15, block_tokens=(1 + 5) + (1 + 10) + 15, head_tokens=15)


def test_the_account_runs_on(
    tiny_model: CandidateModel, of: Settings, text: TextSet, states: np.ndarray
) -> None:
    population, size = Population(tiny_model), text.windows.size
    for times in (1, 2):
        population.measure([of.base, of.base], text, states)
        assert population.work == Work(2 * times * size, 3 * times * size, times * size)


def test_nobody_has_no_scores(tiny_model: CandidateModel, text: TextSet, states: np.ndarray) -> None:
    assert Population(tiny_model).measure([], text, states) == []


@pytest.fixture
def streamed(tiny_model: CandidateModel) -> CandidateModel:
    return CandidateModel(tiny_model.checkpoint, tiny_model.inventory, tiny_model.bank, stream=True)


def memory_of_layers(model: CandidateModel) -> list[str]:
    found = [*model.model.named_parameters(), *model.model.named_buffers()]
    return [name for name, value in found if ".layers." in name and not value.is_meta]


def test_a_streamed_model_gives_the_same_and_fills_each_layer_once(
    tiny_model: CandidateModel,
    streamed: CandidateModel,
    candidates: list[Candidate],
    of: Settings,
    text: TextSet,
    states: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filled: Counter[Any] = Counter()
    fill = streamed._fill
    monkeypatch.setattr(streamed, "_fill", lambda layer: (filled.update([layer]), fill(layer))[1])
    expected = one_by_one(tiny_model, candidates, text, states)
    found = Population(streamed).measure([of.of(c) for c in candidates], text, states)
    assert filled == {0: 1, 1: 1, 2: 1}
    check(found, expected)
    assert memory_of_layers(streamed) == []
    filled.clear()
    check(one_by_one(streamed, candidates[:3], text, states), expected[:3])
    assert filled == {0: 3, 1: 3, 2: 3}


def test_a_streamed_pass_that_fails_gives_its_memory_back(
    streamed: CandidateModel,
    candidates: list[Candidate],
    of: Settings,
    text: TextSet,
    states: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any) -> None:
        raise MemoryError("too much")

    population = [of.of(c) for c in candidates[:4]]
    expected = Population(streamed).measure(population, text, states)
    with monkeypatch.context() as patch:
        patch.setattr(streamed.model.model.layers[1].self_attn.o_proj, "forward", broken)
        with pytest.raises(MemoryError, match="too much"):
            Population(streamed).measure(population, text, states)
        assert memory_of_layers(streamed) == []
    check(Population(streamed).measure(population, text, states), expected)


@pytest.fixture
def alone(
    tiny_model: CandidateModel, candidates: list[Candidate], short: TextSet, tmp_path: Path
) -> tuple[np.ndarray, list[Divergence]]:
    """Base states of the short text, and each candidate's scores on it."""
    states = states_of(tiny_model, short, tmp_path)
    return states, one_by_one(tiny_model, candidates, short, states)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 14), min_size=1, max_size=15))
@example(list(range(15)))
@example(list(reversed(range(15))))
def test_scores_depend_on_neither_order_nor_company(
    tiny_model: CandidateModel,
    candidates: list[Candidate],
    of: Settings,
    short: TextSet,
    alone: tuple[np.ndarray, list[Divergence]],
    chosen: list[int],
) -> None:
    states, expected = alone
    assert len(candidates) == 15
    found = Population(tiny_model).measure([of.of(candidates[i]) for i in chosen], short, states)
    check(found, [expected[i] for i in chosen])
