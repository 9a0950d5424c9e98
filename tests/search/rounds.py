"""Rounds of trials on a small space."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import TrialState

from search.allocator import Allocator
from search.runner import TrialRunner
from search.sampler import make_sampler
from search.study import finished, open_study
from spaces.candidate import Candidate
from tests.search import synthetic
from tests.search.fake_pool import FakePool, SlopeRows
from tests.spaces import tiny

ALLOCATOR = synthetic.allocator(tiny.space(num_hidden_layers=3), 0.5)
SPACE = ALLOCATOR.space
COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED


def study_of(allocator: Allocator = ALLOCATOR, sampler: str = "random", seed: int = 0) -> optuna.Study:
    study = open_study("s", optuna.storages.InMemoryStorage(), {})
    study.sampler = make_sampler(sampler, allocator, seed)
    return study


def params(kind: str = "Q4_K", criterion: str = "reap", kept: int | dict[int, int] = 8) -> dict[str, Any]:
    """Parameters whose size is set by `kind` and `kept`, and whose experts by `criterion`."""
    types = {t.name: kind if t.row % 256 == 0 else "Q8_0" for t in SPACE.inventory.quantizable}
    return SPACE.params(types, kept, criterion)


def key(p: dict[str, Any]) -> str:
    return SPACE.candidate(p).key


def by_key(table: dict[str, float], default: float = 1.0, **more: Any) -> FakePool:
    return FakePool(lambda candidate: table.get(candidate.key, default), **more)


def scrambled(candidate: Candidate) -> float:
    return 0.001 * (int(candidate.key, 16) % 997 + 1)


def one_by_one(runner: TrialRunner, *wanted: dict[str, Any]) -> None:
    """Runs every one in a round of its own."""
    for p in wanted:
        runner.study.enqueue_trial(p)
        runner.run(len(finished(runner.study)) + 1)


def together(runner: TrialRunner, *wanted: dict[str, Any]) -> None:
    """Runs them as one round."""
    for p in wanted:
        runner.study.enqueue_trial(p)
    runner.run(len(finished(runner.study)) + len(wanted))


def states(runner: TrialRunner) -> list[TrialState]:
    return [t.state for t in runner.study.get_trials()]


def steps(pool: FakePool, p: dict[str, Any]) -> list[int]:
    """Tokens of every job on a candidate."""
    return [tokens for k, _, tokens in pool.scored if k == key(p)]


def rows_of(*about: Any) -> SlopeRows:
    """Slopes that say nothing changes."""
    return [(t.name, kind, 0.0, 1e-6) for t in SPACE.inventory.quantizable for kind in SPACE.ladder(t)]
