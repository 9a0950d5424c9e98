"""Option costs are measured once, whatever happens in between, and each effort uses its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compression.checkpoint import load_tokenizer
from search.costs import FULL, LEAN, STREAMED, CostModel, Effort, Option, routing_estimates
from search.options import REFERENCE_MODEL, SHIPPED_TEXTS
from search.stages import CostFile, keep_texts, measure_costs, prepare_texts, stale
from spaces.candidate import Candidate
from spaces.errors import UserError
from tests.search import synthetic
from tests.search.fake_pool import FakePool, SlopeRows
from tests.spaces import tiny

SPACE = tiny.space(num_hidden_layers=2, num_experts_per_tok=4)
ERRORS = synthetic.errors(SPACE)
PRICE = synthetic.pricing(SPACE)
ROUGH, ROUGHER = (
    Effort(tokens, probes, (), (), 0, 512, 1, (0.5, 0.75), top_k=False)
    for tokens, probes in ((1024, 2), (512, 1))
)
"""Gradients for all but counts."""


def cost(option: Option, tokens: int) -> float:
    """Costs hang on the tokens they are measured on."""
    return PRICE(option) * (1 + 100 / tokens)


def slopes(candidate: Candidate | None, tokens: int, probes: int) -> SlopeRows:
    """So do slopes, and on the draws of labels."""
    assert candidate is None
    return [(n, k, -1.0, 2.0 * error * (1 + 1 / tokens + 1 / probes)) for (n, k), error in ERRORS.items()]


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
    # What it takes in all, now or earlier.
    assert spent == again_spent == sum(t for _, t in first.priced) + effort.estimate_tokens(SPACE)
    # Two passes forward, and a pass forward and one back for every draw of labels.
    assert effort.estimate_tokens(SPACE) >= effort.slope_tokens * (2 + 2 * effort.slope_probes)


def test_types_and_top_k_without_a_measurement_cost_what_the_gradients_say(tmp_path: Path) -> None:
    model, _ = measure(pool(), tmp_path, ROUGH)
    estimates = {(name, kind): second for name, kind, _, second in slopes(None, 1024, 2)}
    found = {option: model.costs[model.index[option]] for option in estimates}
    assert len({round(found[o] / estimates[o], 6) for o in estimates if estimates[o]}) == 2
    assert routing_estimates(SPACE, ROUGH)
    for option in routing_estimates(SPACE, ROUGH):
        assert model.costs[model.index[option]] == cost(option, 1024)


def cut(file: Path, estimate: bool) -> None:
    """Cuts a line in the middle, as a crash does: the last one, or one of the middle of the estimates."""
    lines = file.read_text("utf-8").splitlines(keepends=True)
    at = sum(len(json.loads(line)[0]) == 5 for line in lines) // 2 if estimate else len(lines) - 1
    file.write_text("".join(lines[:at]) + lines[at][:9], "utf-8")


def test_a_line_cut_short_is_measured_again_and_no_other(tmp_path: Path) -> None:
    first, again = pool(), pool()
    model, _ = measure(first, tmp_path, FULL)
    cut(tmp_path / "option_costs.jsonl", estimate=False)
    found, _ = measure(again, tmp_path, FULL)
    assert again.priced == first.priced[-1:]
    assert not again.sloped
    assert found.costs.tolist() == model.costs.tolist()


def test_what_was_measured_after_a_line_cut_short_is_found_again(tmp_path: Path) -> None:
    measure(pool(), tmp_path, FULL)
    cut(tmp_path / "option_costs.jsonl", estimate=False)
    measure(pool(), tmp_path, FULL)
    third = pool()
    measure(third, tmp_path, FULL)
    assert not third.priced


def test_estimates_cut_short_are_made_again(tmp_path: Path) -> None:
    model, _ = measure(pool(), tmp_path, ROUGH)
    cut(tmp_path / "option_costs.jsonl", estimate=True)
    again = pool()
    found, _ = measure(again, tmp_path, ROUGH)
    assert again.sloped == [None]
    assert found.costs.tolist() == model.costs.tolist()


@pytest.mark.parametrize(
    "order",
    [(LEAN, FULL), (FULL, LEAN), (STREAMED, FULL), (LEAN, STREAMED), (ROUGH, ROUGHER), (ROUGHER, ROUGH)],
)
def test_costs_of_two_efforts_are_not_mixed(order: tuple[Effort, Effort], tmp_path: Path) -> None:
    for name in ("alone", "shared"):
        (tmp_path / name).mkdir()
    alone, _ = measure(pool(), tmp_path / "alone", order[1])
    measure(pool(), tmp_path / "shared", order[0])
    after, _ = measure(pool(), tmp_path / "shared", order[1])
    assert after.costs.tolist() == alone.costs.tolist()


def test_what_is_no_cost_is_passed_over(tmp_path: Path) -> None:
    file = CostFile(tmp_path / "option_costs.jsonl")
    file.append([("blk.1.experts", (4, "reap"), 2048, 0.5), ("a.weight", "Q4_K", 1024, 0.25, 2)])
    file.append([("a.weight", "Q4_K", 1024, 0.75, 4), ("a.weight", "Q4_K", 1024, 1.0)])
    with file.file.open("a", encoding="utf-8") as stream:
        stream.write('[1, 2]\nnull\n{"a": 1}\nnonsense\n')
    file.append([("blk.1.top_k", 1, 512, 0.125), ("blk.1.top_k", 1, 512, 0.5, 1)])
    measured, estimated = file.read()
    assert measured == {
        (("blk.1.experts", (4, "reap")), 2048): 0.5,
        (("blk.1.top_k", 1), 512): 0.125,
        (("a.weight", "Q4_K"), 1024): 1.0,
    }
    assert estimated == {
        (("a.weight", "Q4_K"), 1024, 2): 0.25,
        (("a.weight", "Q4_K"), 1024, 4): 0.75,
        (("blk.1.top_k", 1), 512, 1): 0.5,
    }
    assert json.loads(file.file.read_text("utf-8").splitlines()[0])[0][2] == 2048


def test_calibration_text_that_is_scored_on_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("\f".join(f"document {i} " + "of some words " * 400 for i in range(40)))
    tokenizer = load_tokenizer(REFERENCE_MODEL)
    with pytest.raises(UserError, match=r"--calibration .*own\.txt: shares documents"):
        prepare_texts(tokenizer, SHIPPED_TEXTS, file, file)


def test_other_texts_are_told_before_the_cache_changes(tmp_path: Path) -> None:
    texts = prepare_texts(load_tokenizer(REFERENCE_MODEL), SHIPPED_TEXTS, None, None)
    assert not stale(tmp_path, {"search": "a"})
    assert not list(tmp_path.iterdir())
    keep_texts(tmp_path, texts, {"search": "a"})
    assert not stale(tmp_path, {"search": "a"})
    assert stale(tmp_path, {"search": "b"})
