"""A model that holds one layer at a time is, number for number, the one that is held whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compression.calibrate import calibrate
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint
from compression.variant_bank import VariantBank
from evaluators.divergence import base_states, measure
from evaluators.texts import TextSet
from spaces.errors import UserError
from tests.compression.support import candidate, logits, mixed_types, provide, refused

RAGGED = {1: (0, 2, 3, 6, 7), 2: (1, 4, 5)}


@pytest.fixture
def windows(tiny_texts: dict[str, TextSet]) -> np.ndarray:
    """More than a batch of blocks and no multiple of it."""
    return tiny_texts["calibration"].windows[:11, :24]


@pytest.fixture
def streamed(tiny: Checkpoint, tiny_model: CandidateModel) -> CandidateModel:
    """A streamed model over the resident one's bank."""
    return CandidateModel(tiny, tiny.inventory, tiny_model.bank, stream=True)


def own_logits(model: CandidateModel, windows: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model.logits(model.hidden(torch.from_numpy(windows.astype(np.int64)))).numpy()


def memory_of_layers(model: CandidateModel) -> list[str]:
    """Parameters and buffers of decoder layers that take memory."""
    found = [*model.model.named_parameters(), *model.model.named_buffers()]
    return [name for name, value in found if ".layers." in name and not value.is_meta]


def test_a_new_model_holds_no_layer(streamed: CandidateModel) -> None:
    assert memory_of_layers(streamed) == []
    assert not streamed.model.lm_head.weight.is_meta
    assert not streamed.model.model.norm.weight.is_meta


def test_logits_are_the_resident_ones(
    streamed: CandidateModel, tiny_model: CandidateModel, windows: np.ndarray
) -> None:
    assert np.array_equal(own_logits(streamed, windows), own_logits(tiny_model, windows))
    assert memory_of_layers(streamed) == []
    assert np.array_equal(logits(streamed, windows), logits(tiny_model, windows))
    assert memory_of_layers(streamed) == []


def test_tokens_written_are_the_resident_ones(
    streamed: CandidateModel, tiny_model: CandidateModel, windows: np.ndarray
) -> None:
    """With transformers' key-value cache, as lm-eval generates."""
    start = torch.from_numpy(windows[:2, :8].astype(np.int64))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found, expected = (model.model.generate(start, **options) for model in (streamed, tiny_model))
    assert found.shape == (2, 13)
    assert torch.equal(found, expected)
    assert memory_of_layers(streamed) == []


def test_states_between_the_blocks_are_the_resident_ones(
    streamed: CandidateModel, tiny_model: CandidateModel, windows: np.ndarray
) -> None:
    tokens = torch.from_numpy(windows.astype(np.int64))
    with torch.inference_mode():
        found, expected = streamed.layer_states(tokens), tiny_model.layer_states(tokens)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(streamed.run(found[1], 1, 3), expected[3])


def test_one_layer_is_held_at_a_time(streamed: CandidateModel, windows: np.ndarray) -> None:
    held: list[set[str]] = []

    def look(*_: Any) -> None:
        held.append({name.split(".")[2] for name in memory_of_layers(streamed)})

    for block in streamed.model.model.layers:
        block.self_attn.o_proj.register_forward_hook(look)
    logits(streamed, windows[:1])
    own_logits(streamed, windows[:1])
    assert held == [{"0"}, {"1"}, {"2"}] * 2


def test_candidates_one_after_the_other_are_the_resident_ones(
    streamed: CandidateModel, tiny_model: CandidateModel, windows: np.ndarray
) -> None:
    inventory = tiny_model.inventory
    first = provide(tiny_model, candidate(inventory, RAGGED, {2: 1}, mixed_types(inventory)))
    second = provide(tiny_model, candidate(inventory, {2: (0, 1, 6)}, {1: 1}, "Q8_0"))
    seen = [own_logits(tiny_model, windows)]
    for wanted in (first, second, first):
        tiny_model.apply(wanted)
        streamed.apply(wanted)
        seen.append(own_logits(tiny_model, windows))
        assert np.array_equal(own_logits(streamed, windows), seen[-1])
        # Twice, since a layer is filled anew each time.
        assert np.array_equal(logits(streamed, windows), logits(tiny_model, windows))
        assert np.array_equal(own_logits(streamed, windows), seen[-1])
    assert np.abs(seen[0] - seen[1]).max() > 0.5 < np.abs(seen[1] - seen[2]).max()
    streamed.reset()
    assert np.array_equal(own_logits(streamed, windows), seen[0])
    assert memory_of_layers(streamed) == []


def test_a_restriction_alone_is_the_resident_one(
    streamed: CandidateModel, tiny_model: CandidateModel, windows: np.ndarray
) -> None:
    base = own_logits(tiny_model, windows)
    for model in (streamed, tiny_model):
        model.restrict(1, (2, 3, 7), 1)
    expected = own_logits(tiny_model, windows)
    assert np.abs(expected - base).max() > 0.1
    for _ in range(2):
        assert np.array_equal(own_logits(streamed, windows), expected)
    streamed.restrict(1)
    assert np.array_equal(own_logits(streamed, windows), base)


def test_a_held_layer_follows_every_switch(
    streamed: CandidateModel, tiny_model: CandidateModel, windows: np.ndarray
) -> None:
    """As in a measure of many options of one layer: it stays filled while they change."""
    inventory = tiny_model.inventory
    name = "blk.1.ffn_down_exps.weight"
    provide(tiny_model, candidate(inventory, types="Q4_K"))
    with streamed.held(1):
        for kept in ((0, 1), (4, 5, 6), None):
            for model in (streamed, tiny_model):
                model.restrict(1, kept)
                model.set_type(name, "Q4_K")
            assert np.array_equal(own_logits(streamed, windows), own_logits(tiny_model, windows))
        for model in (streamed, tiny_model):
            model.set_type(name, None)
        assert np.array_equal(own_logits(streamed, windows), own_logits(tiny_model, windows))
    assert memory_of_layers(streamed) == []


def test_calibration_is_the_resident_one(
    streamed: CandidateModel, tiny_model: CandidateModel, windows: np.ndarray
) -> None:
    inventory = tiny_model.inventory
    streamed.apply(provide(tiny_model, candidate(inventory, RAGGED, {1: 1})))
    found, expected = (calibrate(model, windows, "text") for model in (streamed, tiny_model))
    assert list(found.imatrix) == list(expected.imatrix)
    for name, value in expected.imatrix.items():
        assert np.array_equal(found.imatrix[name], value), name
    for name, value in expected.routing.items():
        assert np.array_equal(found.routing[name], value), name
    assert memory_of_layers(streamed) == []


def test_scores_are_the_resident_ones(
    streamed: CandidateModel, tiny_model: CandidateModel, tiny_texts: dict[str, TextSet], tmp_path: Path
) -> None:
    text = tiny_texts["search"]
    inventory = tiny_model.inventory
    wanted = provide(tiny_model, candidate(inventory, RAGGED, types=mixed_types(inventory)))
    results = []
    for model in (streamed, tiny_model):
        base_states(model, text, tmp_path / "base.npy")
        states = np.load(tmp_path / "base.npy")
        model.apply(wanted)
        results.append((states, measure(model, text, states)))
    (states, found), (expected_states, expected) = results
    assert np.array_equal(states, expected_states)
    assert found.mean_kl > 1e-3
    for name in ("kl", "nll", "top1"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("whole", [False, True], ids=["own pass", "forward"])
def test_a_pass_that_fails_gives_its_memory_back(
    streamed: CandidateModel, windows: np.ndarray, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    def broken(*args: Any) -> None:
        raise MemoryError("too much")

    run = logits if whole else own_logits
    expected = run(streamed, windows[:1])
    with monkeypatch.context() as patch:
        patch.setattr(streamed.model.model.layers[1].self_attn.o_proj, "forward", broken)
        with pytest.raises(MemoryError, match="too much"):
            run(streamed, windows[:1])
        assert memory_of_layers(streamed) == []
    assert np.array_equal(run(streamed, windows[:1]), expected)
    assert memory_of_layers(streamed) == []


def test_a_layer_that_cannot_be_read_leaves_no_half(
    streamed: CandidateModel, windows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, kind = own_logits(streamed, windows[:1]), type(streamed.weights)
    read = kind.parameter

    def failing(weights: Any, part: Any, *args: Any) -> np.ndarray:
        if part.name == "blk.1.ffn_down_exps.weight":
            raise UserError("gone")
        return read(weights, part, *args)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "parameter", failing)
        for run in (own_logits, logits):
            refused(lambda run=run: run(streamed, windows[:1]), "gone")
            assert memory_of_layers(streamed) == []
    assert np.array_equal(own_logits(streamed, windows[:1]), expected)


def test_a_resident_model_reads_nothing_again(
    tiny: Checkpoint, windows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CandidateModel(tiny, tiny.inventory, VariantBank(Path("unused")))
    expected = own_logits(model, windows)
    monkeypatch.setattr(type(tiny.weights), "read", lambda *args: pytest.fail("read again"))
    monkeypatch.setattr(type(tiny.weights), "parameter", lambda *args: pytest.fail("read again"))
    model.restrict(1, (0, 1, 2))
    assert np.isfinite(own_logits(model, windows)).all()
    model.reset()
    assert np.array_equal(own_logits(model, windows), expected)


def test_a_layer_is_read_once_for_candidates_that_agree_in_it(
    streamed: CandidateModel,
    tiny_model: CandidateModel,
    tiny_texts: dict[str, TextSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from collections import Counter

    from compression.setting import Settings
    from evaluators.population import Population

    text, inventory = tiny_texts["search"], tiny_model.inventory
    base_states(tiny_model, text, tmp_path / "base.npy")
    wanted = [
        provide(tiny_model, candidate(inventory, {1: (0, 1, 3)}, types={"output.weight": kind}))
        for kind in ("Q8_0", "Q4_K")
    ]
    written: Counter[str] = Counter()
    write = streamed._write
    monkeypatch.setattr(streamed, "_write", lambda part: (written.update([part.name]), write(part))[1])
    settings = [Settings(inventory).of(c) for c in wanted]
    Population(streamed).measure(settings, text, np.load(tmp_path / "base.npy"))
    assert {n: c for n, c in written.items() if n.startswith("blk.") and c != 1} == {}
