"""Option costs are measured once, whatever happens in between, and each effort uses its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from search.costs import FULL, LEAN, STREAMED, CostModel, Effort, Option
from search.stages import CostFile, measure_costs
from spaces.candidate import Candidate
from tests.search import synthetic
from tests.search.fake_pool import FakePool, SlopeRows
from tests.spaces import tiny

SPACE = tiny.space(num_hidden_layers=2)
ERRORS = synthetic.errors(SPACE)
PRICES = synthetic.measured(SPACE) | synthetic.measured(SPACE, effort=FULL)


def cost(option: Option, tokens: int) -> float:
    """Costs hang on the tokens they are measured on."""
    return PRICES[option] * (1 + 100 / tokens)


def slopes(candidate: Candidate | None) -> SlopeRows:
    assert candidate is None
    return [(name, kind, -1.0, 2.0 * error) for (name, kind), error in ERRORS.items()]


def pool() -> FakePool:
    return FakePool(slopes=slopes, cost=cost)


def measure(of: FakePool, cache: Path, effort: Effort) -> tuple[CostModel, int]:
    progress: list[tuple[int, int]] = []
    model, spent = measure_costs(of, SPACE, ERRORS, cache, lambda *at: progress.append(at), effort)
    assert progress[-1][0] == progress[-1][1] > 0
    return model, spent


@pytest.mark.parametrize("effort", [FULL, LEAN, STREAMED], ids=["full", "lean", "streamed"])
def test_costs_are_measured_once_and_found_again(effort: Effort, tmp_path: Path) -> None:
    first, again = pool(), pool()
    model, spent = measure(first, tmp_path, effort)
    assert len(set(first.priced)) == len(first.priced)
    assert {option for option, _ in first.priced} == set(synthetic.measured(SPACE, effort=effort))
    assert first.sloped == ([None] if effort.slope_tokens else [])
    for option, tokens in first.priced:
        assert model.costs[model.index[option]] == cost(option, tokens)
    found, again_spent = measure(again, tmp_path, effort)
    assert not again.priced
    assert not again.sloped
    assert found.costs.tolist() == model.costs.tolist()
    # What it takes in all, now or earlier: a probe of slopes is a pass forward and one back.
    tokens = sum(t for _, t in first.priced) + effort.slope_tokens * (4 + 2 * effort.slope_probes)
    assert spent == again_spent == tokens


def test_types_without_a_measurement_cost_what_the_gradients_say(tmp_path: Path) -> None:
    model, _ = measure(pool(), tmp_path, LEAN)
    for tensor in (t for t in SPACE.inventory.quantizable if not t.per_expert):
        for kind in SPACE.ladder(tensor):
            assert model.costs[model.index[tensor.name, kind]] == 2 * ERRORS[tensor.name, kind]


def cut(file: Path, estimate: bool) -> None:
    """Cuts a line in the middle, as a crash does: the last one, or one of the middle of the estimates."""
    lines = file.read_text("utf-8").splitlines(keepends=True)
    at = sum(json.loads(line)[2] == 0 for line in lines) // 2 if estimate else len(lines) - 1
    file.write_text("".join(lines[:at]) + lines[at][:9], "utf-8")


def test_a_line_cut_short_is_measured_again_and_no_other(tmp_path: Path) -> None:
    first, again = pool(), pool()
    model, _ = measure(first, tmp_path, FULL)
    cut(tmp_path / "costs.jsonl", estimate=False)
    found, _ = measure(again, tmp_path, FULL)
    assert again.priced == first.priced[-1:]
    assert not again.sloped
    assert found.costs.tolist() == model.costs.tolist()


def test_what_was_measured_after_a_line_cut_short_is_found_again(tmp_path: Path) -> None:
    measure(pool(), tmp_path, FULL)
    cut(tmp_path / "costs.jsonl", estimate=False)
    measure(pool(), tmp_path, FULL)
    third = pool()
    measure(third, tmp_path, FULL)
    assert not third.priced


def test_estimates_cut_short_are_made_again(tmp_path: Path) -> None:
    model, _ = measure(pool(), tmp_path, LEAN)
    cut(tmp_path / "costs.jsonl", estimate=True)
    again = pool()
    found, _ = measure(again, tmp_path, LEAN)
    assert again.sloped == [None]
    assert found.costs.tolist() == model.costs.tolist()


@pytest.mark.parametrize("order", [(LEAN, FULL), (FULL, LEAN), (STREAMED, FULL)])
def test_costs_on_other_numbers_of_tokens_are_not_mixed(order: tuple[Effort, Effort], tmp_path: Path) -> None:
    for name in ("alone", "shared"):
        (tmp_path / name).mkdir()
    alone, _ = measure(pool(), tmp_path / "alone", order[1])
    measure(pool(), tmp_path / "shared", order[0])
    after, _ = measure(pool(), tmp_path / "shared", order[1])
    assert after.costs.tolist() == alone.costs.tolist()


def test_what_is_no_cost_is_passed_over(tmp_path: Path) -> None:
    file = CostFile(tmp_path / "costs.jsonl")
    file.append([("blk.1.experts", (4, "reap"), 2048, 0.5), ("a.weight", "Q4_K", 0, 0.25)])
    with file.file.open("a", encoding="utf-8") as stream:
        stream.write('[1, 2]\nnull\n{"a": 1}\nnonsense\n')
    file.append([("blk.1.top_k", 1, 512, 0.125)])
    measured, estimated = file.read()
    assert measured == {
        (("blk.1.experts", (4, "reap")), 2048): 0.5,
        (("blk.1.top_k", 1), 512): 0.125,
    }
    assert estimated == {("a.weight", "Q4_K"): 0.25}
    assert json.loads(file.file.read_text("utf-8").splitlines()[0])[2] == 2048
