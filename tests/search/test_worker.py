"""A worker that streams the model does every job as one that holds it does, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compression.calibration import Calibration
from compression.candidate_model import CandidateModel
from evaluators.divergence import base_states, measure
from evaluators.texts import TextSet
from search.cache_files import load_text, save_text
from search.costs import Effort, routing_estimates
from search.worker import Setup, Worker
from tests.compression.support import candidate, mixed_types, provide

TOKENS = 4 * 64


@pytest.fixture(scope="module")
def workers(
    tiny_checkpoint: Path, tiny_texts: dict[str, TextSet], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Worker, Worker]:
    """A resident and a streaming worker, each after calibration and with a bank of its own."""
    made = []
    for stream in (False, True):
        cache = tmp_path_factory.mktemp("cache")
        for text in tiny_texts.values():
            save_text(text, cache)
        worker = Worker(Setup(str(tiny_checkpoint), "tiny", str(cache), stream=stream))
        # Which implementation is fastest here is nothing to rely on, and their last bits differ.
        worker.model.model.set_experts_implementation("eager")
        assert worker.calibrate() == tiny_texts["calibration"].windows.size
        assert worker.base_states("search") == tiny_texts["search"].windows.size
        for tensor in worker.inventory.quantizable:
            kind = mixed_types(worker.inventory)[tensor.name]
            worker.register([row[:3] for row in worker.quantize(tensor.name, [kind, "Q8_0"])])
        made.append(worker)
    return made[0], made[1]


def both(workers: tuple[Worker, Worker], job: str, *args: Any) -> Any:
    """What both workers answer."""
    first, second = (getattr(worker, job)(*args) for worker in workers)
    assert first == second
    return first


def test_only_one_holds_the_model(workers: tuple[Worker, Worker]) -> None:
    resident, streaming = (
        [v.is_meta for n, v in w.model.model.named_parameters() if ".layers." in n] for w in workers
    )
    assert not any(resident)
    assert all(streaming)


def test_calibrations_and_base_states_are_the_same(workers: tuple[Worker, Worker]) -> None:
    first, second = (Calibration.load(w.cache / "calibration.npz") for w in workers)
    assert first.text == second.text
    for name in ("imatrix", "routing"):
        a, b = getattr(first, name), getattr(second, name)
        assert list(a) == list(b)
        assert all(np.array_equal(a[key], b[key]) for key in a)
    states = [np.load(w.cache / "base-search.npy") for w in workers]
    assert np.array_equal(*states)


def test_variants_have_the_same_keys_errors_and_bytes(workers: tuple[Worker, Worker]) -> None:
    for name in ("output.weight", "blk.0.attn_k_b.weight", "blk.2.ffn_down_exps.weight"):
        for _, _, key, error in both(workers, "quantize", name, ["Q5_0", "Q8_0"]):
            assert 0 < error < 0.1
            first, second = (w.bank.path(key).read_bytes() for w in workers)
            assert first == second


@pytest.mark.parametrize(
    ("decision", "choices"),
    [
        ("blk.1.experts", [(3, "reap"), (5, "paper")]),
        ("blk.2.top_k", [1]),
        ("blk.1.ffn_up_exps.weight", ["Q8_0"]),
        ("output.weight", ["Q8_0"]),
        ("token_embd.weight", ["Q8_0"]),
    ],
)
def test_costs_are_the_same(workers: tuple[Worker, Worker], decision: str, choices: list[Any]) -> None:
    options = [(decision, choice) for choice in choices]
    together = both(workers, "costs", options, TOKENS)
    assert min(together) > 0
    assert len(set(together)) == len(options)
    assert [both(workers, "costs", [option], TOKENS)[0] for option in options] == together


def test_scores_are_the_same(workers: tuple[Worker, Worker]) -> None:
    inventory = workers[0].inventory
    ragged = candidate(inventory, {1: (0, 2, 3, 6, 7), 2: (1, 4, 5)}, {2: 1}, mixed_types(inventory))
    whole = both(workers, "score", [ragged.to_json()], "search", TOKENS)[0]
    assert len(whole["kl"]) == 8
    assert min(whole["kl"]) > 1e-3


def test_few_tokens_are_scored_at_the_starts_of_all_windows(
    workers: tuple[Worker, Worker], tiny_texts: dict[str, TextSet], tiny_model: CandidateModel, tmp_path: Path
) -> None:
    text = tiny_texts["search"].spread(TOKENS)
    assert text.windows.shape == (8, 32)
    inventory = workers[0].inventory
    wanted = candidate(inventory, {1: (0, 2, 3, 6, 7), 2: (1, 4, 5)}, {2: 1})
    (found,) = both(workers, "score", [wanted.to_json()], "search", TOKENS)
    tiny_model.reset()
    base_states(tiny_model, text, tmp_path / "states.npy")
    provide(tiny_model, wanted)
    tiny_model.apply(wanted)
    expected = measure(tiny_model, text, np.load(tmp_path / "states.npy"))
    np.testing.assert_allclose(found["kl"], expected.kl, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["nll"], expected.nll, rtol=1e-4)
    (whole,) = both(workers, "score", [wanted.to_json()], "search", 10**9)
    assert len(whole["kl"]) == 8
    assert min(abs(a - b) for a, b in zip(whole["kl"], found["kl"], strict=True)) > 0


def test_texts_that_winners_are_judged_on_are_scored_on_whole_windows(
    workers: tuple[Worker, Worker], tiny_texts: dict[str, TextSet]
) -> None:
    """The first ones, as llama.cpp is given them."""
    worker, wanted = workers[0], candidate(workers[0].inventory).to_json()
    for name in ("report", "search"):
        save_text(replace(tiny_texts["search"], name=name), worker.cache)
        worker.base_states(name)
    (few,), (whole,) = worker.score([wanted], "report", TOKENS), worker.score([wanted], "search", 10**9)
    assert few["kl"] == pytest.approx(
        whole["kl"][: TOKENS // tiny_texts["search"].windows.shape[1]], rel=1e-4
    )


def test_slopes_are_of_every_type_and_the_options_asked_for(workers: tuple[Worker, Worker]) -> None:
    resident = workers[0]
    worker = Worker(replace(resident.setup, types=("Q8_0",)))
    worker.register(
        [row[:3] for t in worker.inventory.quantizable for row in worker.quantize(t.name, ["Q8_0"])]
    )
    types = {(t.name, kind) for t in worker.inventory.quantizable for kind in worker.space.ladder(t)}
    routing = [("blk.1.top_k", 1), ("blk.2.experts", (4, "reap")), ("blk.2.top_k", 1)]
    spent, rows = worker.slopes(None, TOKENS, 2, 0, routing)
    assert {(decision, choice) for decision, choice, _, _ in rows} == types | set(routing)
    assert {first for _, _, first, _ in rows} == {0.0}
    # Two passes, a pass forward and one back per draw, and a block's pass per option.
    assert spent == TOKENS * (2 + 2 * 2) + TOKENS * len(routing) // worker.inventory.layers
    effort = Effort(TOKENS, 2, (), (), 0, 512, top_k=False)
    routing = routing_estimates(worker.space, effort)
    assert worker.slopes(None, TOKENS, 2, 0, routing)[0] == effort.estimate_tokens(worker.space)
    at = candidate(worker.inventory, types="Q8_0").to_json()
    spent, rows = worker.slopes(at, TOKENS, 2)
    assert {(decision, choice) for decision, choice, _, _ in rows} == types
    assert spent == TOKENS * (4 + 2 * 2)
    torch.manual_seed(1)  # draws of labels have a generator of their own
    assert worker.slopes(at, TOKENS, 2) == (spent, rows)


def test_candidates_are_scored_together_in_the_order_given(workers: tuple[Worker, Worker]) -> None:
    inventory = workers[0].inventory
    texts = [
        wanted.to_json()
        for wanted in (
            candidate(inventory, types=mixed_types(inventory)),
            candidate(inventory, {2: (1, 4, 5)}),
            candidate(inventory, {2: (1, 4, 5)}, {1: 1}),
        )
    ]
    each = [both(workers, "score", [text], "search", TOKENS)[0] for text in texts]
    assert len({tuple(columns["kl"]) for columns in each}) == 3
    assert both(workers, "score", texts, "search", TOKENS) == each
    assert both(workers, "score", [texts[2], *texts], "search", TOKENS) == [each[2], *each]
    assert both(workers, "score", [], "search", TOKENS) == []


def test_global_generators_change_no_score(workers: tuple[Worker, Worker]) -> None:
    wanted = candidate(workers[0].inventory, {2: (1, 4, 5)}).to_json()
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        answers.append(workers[0].score([wanted], "search", TOKENS))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["model.gguf", "folder"])
def test_files_are_the_same(workers: tuple[Worker, Worker], tmp_path: Path, name: str) -> None:
    wanted = candidate(workers[0].inventory, {1: (0, 2, 6), 2: (1, 4, 5)}, types="Q8_0")
    written = []
    for i, worker in enumerate(workers):
        path = tmp_path / str(i) / name
        size = worker.export(wanted.to_json(), str(path))
        file = path if path.is_file() else path / "moefit.safetensors"
        assert file.stat().st_size == size
        written.append(file.read_bytes())
    assert written[0] == written[1]


def test_a_text_is_read_back_as_it_was_saved(tiny_texts: dict[str, TextSet], tmp_path: Path) -> None:
    text = replace(tiny_texts["search"], sources=("a", "ü") * 4)
    save_text(text, tmp_path)
    found = load_text("search", tmp_path)
    assert np.array_equal(found.windows, text.windows)
    assert replace(found, windows=text.windows) == text
