"""Trials are scored in two steps, early-stopped fairly, and a killed study goes on where it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from search.allocator import Allocator
from search.sampler import make_sampler
from search.study import (
    BATCH,
    FIRST_TOKENS,
    SEARCH_TOKENS,
    finished,
    open_storage,
    open_study,
    recover,
    window_scores,
)
from spaces.candidate import Candidate
from spaces.errors import UserError
from tests.search import synthetic
from tests.search.fake_pool import WINDOW, FakePool, make_runner
from tests.spaces import tiny

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

IDENTITY = {"model": "m", "budget": 10**9, "seed": 0}
ALLOCATOR = synthetic.allocator(tiny.space(num_hidden_layers=3), 0.5)
SPACE = ALLOCATOR.space


def study_of(allocator: Allocator = ALLOCATOR, sampler: str = "random", seed: int = 0) -> optuna.Study:
    study = open_study("s", optuna.storages.InMemoryStorage(), IDENTITY)
    study.sampler = make_sampler(sampler, allocator, seed)
    return study


def params(kind: str = "Q4_K", criterion: str = "reap", kept: int | dict[int, int] = 8) -> dict[str, Any]:
    """Parameters whose size is set by `kind` and `kept`, and whose experts by `criterion`."""
    types = {t.name: kind if t.row % 256 == 0 else "Q8_0" for t in SPACE.inventory.quantizable}
    return SPACE.params(types, kept, criterion)


def by_key(table: dict[str, float], default: float = 1.0) -> FakePool:
    return FakePool(lambda candidate: table.get(candidate.key, default))


def key(p: dict[str, Any]) -> str:
    return SPACE.candidate(p).key


def test_trials_are_run_until_there_are_as_many_as_asked_for() -> None:
    study, pool = study_of(), FakePool(lambda c: 1.0)
    runner = make_runner(study, ALLOCATOR, pool)
    runner.run(6)
    assert len(finished(study)) == 6
    runner.run(6)
    assert len(study.get_trials()) == 6
    runner.run(7)
    assert len(finished(study)) == 7


def test_a_finished_trial_holds_scores_and_what_it_was() -> None:
    study = study_of()
    told: list[FrozenTrial] = []
    runner = make_runner(study, ALLOCATOR, FakePool(lambda c: 0.25))
    runner.on_trial = told.append
    study.enqueue_trial(params(), user_attrs={"baseline": "uniform"})
    runner.run(1)
    (trial,) = finished(study)
    scores, candidate = trial.user_attrs["scores"], SPACE.candidate(params())
    assert trial.state == TrialState.COMPLETE
    assert told == [trial]
    assert trial.params == params()
    assert trial.user_attrs["candidate"] == candidate.key
    assert trial.user_attrs["predicted_kl"] == pytest.approx(ALLOCATOR.model.predict(params()))
    assert scores["kl"] == pytest.approx(0.25)
    assert scores["tokens"] == SEARCH_TOKENS
    assert scores["target_bytes"] == scores["model_bytes"] == SPACE.inventory.file_bytes(candidate.plan)
    assert scores["device_memory_bytes"] == scores["target_bytes"] + 6000
    assert trial.values == [scores["kl"], scores["target_bytes"], scores["tokens_per_second"]]
    assert trial.constraints == {"bytes over budget": scores["target_bytes"] / ALLOCATOR.limit - 1}


def test_a_clearly_worse_trial_of_the_same_size_is_stopped_on_the_first_tokens() -> None:
    good, bad = params(criterion="reap", kept=4), params(criterion="paper", kept=4)
    pool = by_key({key(good): 0.1, key(bad): 0.2})
    study = study_of()
    runner = make_runner(study, ALLOCATOR, pool)
    for p in (good, bad):
        study.enqueue_trial(p)
        runner.run(len(finished(study)) + 1)
    stopped = study.get_trials()[1]
    assert stopped.state == TrialState.PRUNED
    assert stopped.user_attrs["scores"]["kl"] == pytest.approx(0.2)
    assert stopped.user_attrs["scores"]["tokens"] == FIRST_TOKENS
    assert [(first, last) for k, _, first, last in pool.scored if k == key(bad)] == [(0, FIRST_TOKENS)]
    assert [(first, last) for k, _, first, last in pool.scored if k == key(good)] == [
        (0, FIRST_TOKENS),
        (FIRST_TOKENS, SEARCH_TOKENS),
    ]


@pytest.mark.parametrize(
    ("other", "kl"),
    [
        (params(criterion="paper", kept=4), 0.05),  # better
        (params(criterion="paper", kept=4), 0.101),  # worse by less than can be told apart
        (params("IQ3_XXS", kept=4), 5.0),  # much worse, but smaller and faster
        (params(kept=4) | {"top_k": 1}, 5.0),  # as large, but faster
    ],
)
def test_a_trial_that_no_other_beats_in_everything_goes_on(other: dict[str, Any], kl: float) -> None:
    good = params(kept=4)
    study = study_of()
    runner = make_runner(study, ALLOCATOR, by_key({key(good): 0.1, key(other): kl}))
    for p in (good, other):
        study.enqueue_trial(p)
        runner.run(len(finished(study)) + 1)
    assert [t.state for t in finished(study)] == [TrialState.COMPLETE] * 2


def test_a_baseline_is_never_stopped() -> None:
    good, simple = params(kept=4), params(criterion="paper", kept=4)
    study = study_of()
    runner = make_runner(study, ALLOCATOR, by_key({key(good): 0.1, key(simple): 9.0}))
    study.enqueue_trial(good)
    runner.run(1)
    study.enqueue_trial(simple, user_attrs={"baseline": "uniform"})
    runner.run(2)
    assert [t.state for t in finished(study)] == [TrialState.COMPLETE] * 2


def test_a_trial_is_not_stopped_by_one_of_the_other_form() -> None:
    # Each form has a winner of its own: the best ragged trial may be worse than a portable one.
    portable, ragged = params(kept=4), params(kept={1: 8, 2: 4})
    study = study_of()
    runner = make_runner(study, ALLOCATOR, by_key({key(portable): 0.1, key(ragged): 0.5}))
    for p in (portable, ragged):
        study.enqueue_trial(p)
        runner.run(len(finished(study)) + 1)
    first, second = (t.user_attrs["scores"] for t in finished(study))
    assert first["target_bytes"] < second["target_bytes"]
    assert first["tokens_per_second"] > second["tokens_per_second"]
    assert [t.state for t in finished(study)] == [TrialState.COMPLETE] * 2


def test_only_complete_trials_stop_others() -> None:
    study = study_of()
    first, second, third = (params(criterion=c, kept=4) for c in ("reap", "mass", "paper"))
    runner = make_runner(study, ALLOCATOR, by_key({key(first): 0.1, key(second): 0.3, key(third): 0.2}))
    for p in (first, second, third):
        study.enqueue_trial(p)
        runner.run(len(finished(study)) + 1)
    assert [t.state for t in study.get_trials()] == [
        TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED,
    ]  # fmt: skip


@pytest.mark.parametrize("sampler", ["knapsack", "tpe"])
def test_the_number_of_workers_changes_no_result(sampler: str) -> None:
    def trials(size: int) -> list[tuple[dict[str, Any], TrialState, list[float] | None]]:
        study = study_of(sampler=sampler)
        pool = FakePool(lambda c: 0.001 * (int(c.key, 16) % 997 + 1), size)
        make_runner(study, ALLOCATOR, pool).run(2 * BATCH + 1)
        return [(t.params, t.state, t.values) for t in study.get_trials()]

    assert trials(1) == trials(7)


@pytest.mark.parametrize(("size", "shares"), [(1, [4]), (2, [2, 2]), (3, [2, 2]), (7, [1, 1, 1, 1])])
def test_trials_of_a_batch_are_scored_together_and_shared_out_to_the_workers(
    size: int, shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, jobs = FakePool(lambda c: 1.0, size), []
    run = pool.run
    monkeypatch.setattr(pool, "run", lambda some: [jobs.append(some), run(some)][1])
    study = study_of()
    make_runner(study, ALLOCATOR, pool).run(BATCH)
    first = jobs[0]
    assert [len(args[0]) for _, args in first] == shares
    scored = [Candidate.from_json(text).key for _, args in first for text in args[0]]
    assert scored == [t.user_attrs["candidate"] for t in study.get_trials()]


def test_scores_of_windows_are_averaged() -> None:
    columns = {"kl": [0.1, 0.3], "nll": [1.0, 3.0], "top1": [0.5, 1.0]}
    scores = window_scores(columns, bytes_per_token=4.0, length=WINDOW)
    assert scores["kl"] == pytest.approx(0.2)
    assert scores["kl_se"] == pytest.approx(0.1)
    assert scores["perplexity"] == pytest.approx(math.exp(2))
    assert scores["bits_per_byte"] == pytest.approx(2 / math.log(2) / 4)
    assert scores["top1"] == pytest.approx(0.75)
    assert scores["tokens"] == 2 * WINDOW


def test_one_window_has_no_standard_error_and_a_lost_model_a_finite_perplexity() -> None:
    scores = window_scores({"kl": [0.1], "nll": [1e5], "top1": [0.0]}, 4.0, WINDOW)
    assert scores["kl_se"] == 0.0
    assert math.isfinite(scores["perplexity"])


def reopen(path: Path) -> optuna.Study:
    """The study as another process would open it."""
    study = open_study("s", open_storage(None, path), IDENTITY)
    study.sampler = make_sampler("knapsack", ALLOCATOR, 0)
    return study


def test_a_running_trial_of_a_killed_run_is_tried_again_once(tmp_path: Path) -> None:
    study = reopen(tmp_path / "study.journal")
    make_runner(study, ALLOCATOR, FakePool(lambda c: 1.0)).run(2)
    study.enqueue_trial(params(), user_attrs={"baseline": "uniform"})
    left = study.ask(SPACE.distributions)

    again = reopen(tmp_path / "study.journal")
    assert recover(again, SPACE.distributions) == 1
    assert recover(again, SPACE.distributions) == 0
    states = [t.state for t in again.get_trials()]
    assert states.count(TrialState.WAITING) == 1
    assert states[left.number] == TrialState.FAIL

    once_more = reopen(tmp_path / "study.journal")
    assert recover(once_more, SPACE.distributions) == 0
    make_runner(once_more, ALLOCATOR, FakePool(lambda c: 1.0)).run(3)
    last = finished(once_more)[-1]
    assert last.params == params()
    assert last.user_attrs["retry_of"] == left.number
    assert last.user_attrs["baseline"] == "uniform"
    assert len(finished(once_more)) == 3


def test_finished_trials_survive_and_are_not_run_again(tmp_path: Path) -> None:
    study = reopen(tmp_path / "study.journal")
    make_runner(study, ALLOCATOR, FakePool(lambda c: 0.5)).run(5)
    before = [(t.number, t.params, t.values) for t in finished(study)]
    again = reopen(tmp_path / "study.journal")
    pool = FakePool(lambda c: 0.5)
    make_runner(again, ALLOCATOR, pool).run(5)
    assert [(t.number, t.params, t.values) for t in finished(again)] == before
    assert not pool.scored


def interrupted(enqueued: dict[str, Any], suggested: int) -> optuna.Study:
    """A study killed when `suggested` parameters of a baseline had been written."""
    study = study_of(sampler="knapsack")
    study.enqueue_trial(enqueued, user_attrs={"baseline": "uniform"})
    study.ask(dict(list(SPACE.distributions.items())[:suggested]))
    return study


@pytest.mark.parametrize("suggested", [0, 5])
def test_a_baseline_killed_while_it_was_asked_for_is_run_as_it_was_meant(suggested: int) -> None:
    study = interrupted(params(), suggested)
    recover(study, SPACE.distributions)
    make_runner(study, ALLOCATOR, FakePool(lambda c: 1.0)).run(1)
    (trial,) = finished(study)
    assert trial.user_attrs.get("baseline") == "uniform"
    assert trial.params == params()


def test_a_trial_killed_while_it_was_asked_for_still_fits_the_budget() -> None:
    allocator = synthetic.allocator(tiny.space(), 0.1)
    space = allocator.space
    for seed in range(5):
        study = study_of(allocator, "random", seed)
        names = list(space.distributions)
        study.ask({name: space.distributions[name] for name in names[: len(names) // 2]})
        recover(study, SPACE.distributions)
        make_runner(study, allocator, FakePool(lambda c: 1.0)).run(1)
        (trial,) = finished(study)
        assert trial.user_attrs["scores"]["target_bytes"] <= allocator.limit


def test_a_study_of_the_same_problem_goes_on() -> None:
    storage = optuna.storages.InMemoryStorage()
    open_study("s", storage, IDENTITY).add_trial(
        optuna.create_trial(state=TrialState.COMPLETE, values=[1.0, 2.0, 3.0])
    )
    assert len(open_study("s", storage, dict(IDENTITY)).trials) == 1


@pytest.mark.parametrize("name", list(IDENTITY))
def test_a_study_of_another_problem_is_refused_and_says_in_what(name: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    open_study("s", storage, IDENTITY)
    with pytest.raises(UserError, match=f"another {name} ") as error:
        open_study("s", storage, {**IDENTITY, name: "other"})
    assert "--study" in str(error.value)
    open_study("other", storage, {**IDENTITY, name: "other"})  # a name of its own is fine


def test_an_identity_survives_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "study.journal"
    open_study("s", open_storage(None, path), IDENTITY)
    open_study("s", open_storage(str(path), tmp_path / "unused"), IDENTITY)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("url", ["nosuchdb://x", "sqlite:////no/such/folder/x.db", "://"])
def test_a_storage_that_cannot_be_opened_is_refused_in_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--storage") as error:
        open_storage(url, tmp_path / "study.journal")
    assert "\n" not in str(error.value)


def test_a_folder_is_no_storage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        open_storage(str(tmp_path), tmp_path / "study.journal")


def test_the_knapsack_learns_from_trials_that_are_stopped_early() -> None:
    allocator = synthetic.allocator(tiny.space(num_hidden_layers=3), 0.1)
    space, index = allocator.space, allocator.model.index
    truth = synthetic.wrong_about(allocator.model.costs, seed=5)

    def kl(candidate: Candidate) -> float:
        total = sum(truth[index[option]] for option in candidate.types)
        for m in candidate.layers:
            n = len(m.experts)
            criterion = next(c for c in space.criteria if space.experts(m.layer, n, c) == m.experts)
            total += truth[index[f"blk.{m.layer}.experts", (n, criterion)]]
            total += truth[index[f"blk.{m.layer}.top_k", m.top_k]]
        return float(total)

    study = study_of(allocator, "knapsack")
    make_runner(study, allocator, FakePool(kl)).run(24)
    trials = finished(study)
    scores = [t.user_attrs["scores"] for t in trials]
    assert all(s["target_bytes"] <= allocator.limit for s in scores)
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    start = min(kl(space.candidate(allocator.best(allocator.model.costs, form))) for form in space.forms)
    assert min(s["kl"] for s in scores) < 0.85 * start
