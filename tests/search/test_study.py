"""A killed study goes on where it was, and one of another problem is refused."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from search.sampler import make_sampler
from search.study import finished, open_storage, open_study, window_scores
from spaces.errors import UserError
from tests.search import synthetic
from tests.search.fake_pool import FakePool, make_runner
from tests.spaces import tiny

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

IDENTITY = {"model": "m", "budget": 10**9, "seed": 0}
ALLOCATOR = synthetic.allocator(tiny.space(num_hidden_layers=3), 0.5)
SPACE = ALLOCATOR.space


def test_scores_of_windows_are_averaged() -> None:
    columns = {"kl": [0.1, 0.3], "nll": [1.0, 3.0], "top1": [0.5, 1.0]}
    scores = window_scores(columns, bytes_per_token=4.0, tokens=56)
    assert scores["kl"] == pytest.approx(0.2)
    assert scores["kl_se"] == pytest.approx(0.1)
    assert scores["perplexity"] == pytest.approx(math.exp(2))
    assert scores["bits_per_byte"] == pytest.approx(2 / math.log(2) / 4)
    assert scores["top1"] == pytest.approx(0.75)
    assert scores["tokens"] == 56


def test_one_window_has_no_standard_error_and_a_lost_model_a_finite_perplexity() -> None:
    scores = window_scores({"kl": [0.1], "nll": [1e5], "top1": [0.0]}, 4.0, 256)
    assert scores["kl_se"] == 0.0
    assert math.isfinite(scores["perplexity"])


def reopen(path: Path) -> optuna.Study:
    """The study as another process would open it."""
    study = open_study("s", open_storage(None, path), IDENTITY)
    study.sampler = make_sampler("knapsack", ALLOCATOR, 0)
    return study


def test_finished_trials_survive_and_are_not_run_again(tmp_path: Path) -> None:
    study = reopen(tmp_path / "study.journal")
    make_runner(study, ALLOCATOR, FakePool(lambda c: 0.5)).run(5)
    before = [(t.number, t.params, t.values) for t in finished(study)]
    again = reopen(tmp_path / "study.journal")
    pool = FakePool(lambda c: 0.5)
    make_runner(again, ALLOCATOR, pool).run(5)
    assert [(t.number, t.params, t.values) for t in finished(again)] == before
    assert not pool.scored


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


@pytest.mark.parametrize("content", [b"my notes\n", b"[1]\n", b"{}\n", b"\xff\xfe\x00"])
def test_a_file_of_something_else_is_no_storage_and_stays_as_it_is(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="is no study's journal"):
        open_storage(str(tmp_path / "x"), tmp_path / "study.journal")
    assert (tmp_path / "x").read_bytes() == content


def test_a_folder_is_no_storage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        open_storage(str(tmp_path), tmp_path / "study.journal")
