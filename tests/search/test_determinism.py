"""The same seed gives the same trials, whoever seeds the global generators and with any number of workers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from search.pool import Job
from search.sampler import make_sampler
from search.study import finished, open_study
from spaces.candidate import Candidate
from tests.faults.commands import Command, arguments, short_texts, trials, winner
from tests.search.fake_pool import FakePool, make_runner
from tests.search.rounds import ALLOCATOR, params, rows_of, scrambled

SAMPLERS = ("knapsack", "random", "nsgaii", "tpe")


def seed_everything(seed: int) -> None:
    """What lm-eval does before it draws a task's items."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def state() -> list[Any]:
    """Of the three global generators."""
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index,union-attr]


class SeedingPool(FakePool):
    """Seeds the global generators at every job, anew each time."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.seed = seed

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        self.seed += 1
        seed_everything(self.seed)
        return super().run(jobs, on_result)


def flat(candidate: Candidate) -> float:
    """No candidate is better than another, so that ties are all there is."""
    return 0.5


def outcome(
    pool: FakePool, sampler: str = "knapsack", seed: int = 0, total: int = 22
) -> list[tuple[Any, ...]]:
    """Of every trial, in order: number, parameters, state, values, scores and prediction."""
    study = open_study("s", optuna.storages.InMemoryStorage(), {})
    study.sampler = make_sampler(sampler, ALLOCATOR, seed)
    study.enqueue_trial(params(), user_attrs={"baseline": "uniform"})
    make_runner(study, ALLOCATOR, pool, slopes=True).run(total)
    return [
        (
            t.number, tuple(t.params.items()), t.state.name, tuple(t.values or ()),
            tuple(t.user_attrs["rungs"].items()), t.user_attrs["predicted_kl"],
        )
        for t in finished(study)
    ]  # fmt: skip


@pytest.mark.parametrize("kl", [scrambled, flat])
def test_the_number_of_workers_changes_no_trial(kl: Callable[[Candidate], float]) -> None:
    one, two, five = (outcome(FakePool(kl, size, slopes=rows_of)) for size in (1, 2, 5))
    assert one == two == five
    assert outcome(FakePool(kl, slopes=rows_of), seed=1) != one


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_global_generators_change_no_trial_and_are_left_alone(sampler: str) -> None:
    seed_everything(1)
    before = state()
    first = outcome(FakePool(scrambled, slopes=rows_of), sampler)
    assert state() == before
    seed_everything(2)
    assert outcome(SeedingPool(10, kl=scrambled, slopes=rows_of), sampler) == first


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_searches_with_one_and_two_workers_have_the_same_trials_and_winner(
    tiny_checkpoint: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, runs = short_texts(texts, tmp_path), {}
    for hashing, (name, workers) in enumerate({"one": 1, "again": 1, "two": 2}.items()):
        out = runs[name] = tmp_path / name
        monkeypatch.setenv("PYTHONHASHSEED", str(hashing + 1))
        command = Command(arguments(tiny_checkpoint, short, out, workers), tmp_path / f"{name}.log")
        try:
            assert command.wait(900) == 0, command.output()[-3000:]
        finally:
            command.end()
    assert trials(runs["again"]) == trials(runs["one"])
    assert winner(runs["again"]) == winner(runs["one"])
    # Rounds are of one size for any number of workers, so that it changes nothing at all.
    assert trials(runs["two"]) == trials(runs["one"])
    assert winner(runs["two"]) == winner(runs["one"])
