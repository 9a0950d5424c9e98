"""The fastest implementation that computes what the reference computes is the one that is set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from compression import expert_kernels
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint
from compression.expert_kernels import fastest_experts
from compression.variant_bank import VariantBank
from evaluators.texts import TextSet
from tests.compression.support import candidate, logits, provide

Forward = Callable[..., Tensor]


@pytest.fixture
def model(tiny: Checkpoint, tmp_path: Path) -> CandidateModel:
    return CandidateModel(tiny, tiny.inventory, VariantBank(tmp_path))


def chosen(model: CandidateModel) -> str:
    found: str = model.model.get_experts_implementation()[""]
    return found


class Offer:
    """The implementations there are to choose from, timed by a clock that only they move.

    Attributes:
        calls: Names of those that ran, in order.
    """

    def __init__(self, model: CandidateModel, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.now = patch, 0.0
        self.calls: list[str] = []
        self.forward: Forward = type(model.shell.expert_module(1)).forward.__wrapped__
        patch.setattr(expert_kernels, "time", SimpleNamespace(perf_counter=lambda: self.now))
        patch.setattr(expert_kernels, "IMPLEMENTATIONS", ())

    def add(self, name: str, *seconds: float, change: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        """One that takes so long, its last time from then on, and changes the right output."""
        times = chain(seconds, repeat(seconds[-1]))
        self.put(name, lambda *args: change(self._run(name, times, *args)))

    def put(self, name: str, forward: Forward) -> None:
        self.patch.setitem(ALL_EXPERTS_FUNCTIONS, name, forward)
        self.name(name)

    def name(self, *names: str) -> None:
        """Names to try, whether they exist or not."""
        self.patch.setattr(expert_kernels, "IMPLEMENTATIONS", (*expert_kernels.IMPLEMENTATIONS, *names))

    def _run(self, name: str, times: Iterator[float], *args: Tensor) -> Tensor:
        self.calls.append(name)
        self.now += next(times)
        return self.forward(*args)


@pytest.fixture
def offer(model: CandidateModel, monkeypatch: pytest.MonkeyPatch) -> Offer:
    return Offer(model, monkeypatch)


def test_one_that_takes_little_time_is_chosen(model: CandidateModel) -> None:
    found = fastest_experts(model, 64)
    assert {"eager", "grouped_mm"} <= found.keys()
    assert chosen(model) == next(iter(found))
    assert found[chosen(model)] <= 1.5 * min(found.values())


@pytest.mark.parametrize("times", [(1, 2, 3), (3, 1, 2), (2, 3, 1), (3, 2, 1)])
def test_the_fastest_is_chosen_whichever_is_tried_first(
    model: CandidateModel, offer: Offer, times: tuple[int, ...]
) -> None:
    for name, seconds in zip("abc", times, strict=True):
        offer.add(name, seconds)
    found = fastest_experts(model, 16)
    assert list(found.values()) == [1, 2, 3]
    assert found == dict(zip("abc", times, strict=True))
    assert chosen(model) == "abc"[times.index(1)]


def test_the_first_is_kept_where_another_one_is_a_little_faster(model: CandidateModel, offer: Offer) -> None:
    offer.add("first", 7)
    offer.add("second", 5)
    offer.add("third", 6)
    assert list(fastest_experts(model, 16).items()) == [("first", 7), ("second", 5), ("third", 6)]
    assert chosen(model) == "first"


def test_the_best_of_a_few_runs_counts(model: CandidateModel, offer: Offer) -> None:
    offer.add("wakes up late", 50, 1, 3)
    offer.add("steady", 2)
    assert fastest_experts(model, 16) == {"wakes up late": 1, "steady": 2}
    assert chosen(model) == "wakes up late"


def test_what_is_far_too_slow_runs_once(model: CandidateModel, offer: Offer) -> None:
    offer.add("quick", 1)
    offer.add("slow", 20)
    offer.add("a little slower", 1.5)
    assert fastest_experts(model, 16) == {"quick": 1, "a little slower": 1.5, "slow": 20}
    assert offer.calls.count("slow") == 1
    assert offer.calls.count("a little slower") == offer.calls.count("quick") > 1


def test_the_chosen_one_is_what_the_model_runs(
    model: CandidateModel, offer: Offer, tiny_texts: dict[str, TextSet]
) -> None:
    for name, seconds in (("slow", 3), ("quick", 1), ("last", 2)):
        offer.add(name, seconds)
    fastest_experts(model, 16)
    offer.calls.clear()
    logits(model, tiny_texts["search"].windows[:1])
    assert offer.calls == ["quick"] * len(model.inventory.moe_layers)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: 1.01 * y,
        lambda y: y + 0.01 * y.abs().max(),
        torch.zeros_like,
        lambda y: y.flip(0),
        lambda y: torch.full_like(y, float("nan")),
        lambda y: torch.where(torch.arange(len(y))[:, None] == 7, float("nan"), y),
    ],
    ids=["scaled", "shifted", "nothing", "other tokens", "no numbers", "one token lost"],
)
def test_a_fast_one_that_computes_something_else_is_left_out(
    model: CandidateModel, offer: Offer, change: Callable[[Tensor], Tensor]
) -> None:
    offer.add("right", 2)
    offer.add("wrong", 1, change=change)
    assert fastest_experts(model, 16) == {"right": 2}
    assert chosen(model) == "right"


def test_rounding_leaves_none_out(model: CandidateModel, offer: Offer) -> None:
    offer.add("right", 2)
    offer.add("rounded", 1, change=lambda y: y * (1 + 1e-5))
    assert fastest_experts(model, 16) == {"rounded": 1, "right": 2}
    assert chosen(model) == "rounded"


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, TypeError, MemoryError])
def test_one_that_fails_or_is_unknown_is_left_out(
    model: CandidateModel, offer: Offer, error: type[Exception]
) -> None:
    def broken(*args: Tensor) -> Tensor:
        raise error("no kernel for this")

    offer.put("broken first", broken)
    offer.name("unheard of")
    offer.add("slow", 2)
    offer.add("quick", 1)
    offer.put("broken last", broken)
    assert fastest_experts(model, 16) == {"quick": 1, "slow": 2}
    assert chosen(model) == "quick"


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_logits_stay_the_same_whatever_is_chosen(
    model: CandidateModel, tiny_texts: dict[str, TextSet], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    windows = tiny_texts["search"].windows[:1]
    wanted = provide(model, candidate(model.inventory, {1: (0, 2, 3, 6, 7), 2: (1, 4, 5)}, {2: 1}))

    def both() -> list[np.ndarray]:
        model.reset()
        whole = logits(model, windows)
        model.apply(wanted)
        return [whole, logits(model, windows)]

    before = both()
    assert np.abs(before[0] - before[1]).max() > 0.1
    monkeypatch.setattr(expert_kernels, "IMPLEMENTATIONS", (name,))
    assert list(fastest_experts(model, 16)) == [name]
    assert chosen(model) == name
    for found, expected in zip(both(), before, strict=True):
        assert np.abs(found - expected).max() <= 1e-4


def test_a_model_without_a_choice_stays_as_it_was(model: CandidateModel, offer: Offer) -> None:
    def broken(*args: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this")

    before = chosen(model)
    offer.put("broken", broken)
    assert fastest_experts(model, 16) == {}
    assert chosen(model) == before
