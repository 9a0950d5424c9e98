"""Two drivers on one study, in a journal under both of its locks and in SQLite: no trial lost or twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.quick_disk import quick_folder
from tests.storage.sharing import opened_at_once, shared, survived, taken_at_once

KINDS = ("flock:{}/study.journal", "lockfile:{}/study.journal", "sqlite:///{}/study.db")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_two_drivers_make_exactly_the_trials_that_were_wanted(kind: str, folder: Path) -> None:
    shared(kind.format(folder), 20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_storage_is_opened_by_several_at_once(kind: str, folder: Path) -> None:
    opened_at_once(kind.format(folder), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_enqueued_trial_is_given_to_one_driver(kind: str, folder: Path) -> None:
    taken_at_once(kind.format(folder), 3)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_drivers_trials_are_taken_over_at_once(
    kind: str, count: int, folder: Path, record_property: Callable[[str, object], None]
) -> None:
    lost, seconds = survived(kind.format(folder), 60, count)
    name = kind.partition(":")[0]
    told = f"kill -9 of one of {count} drivers of one study ({name}), with {lost} trials running"
    record_property("fault", json.dumps({"fault": told, "injected": 1, "lost": 0, "seconds": seconds}))
    # Optuna's lock file outlives its holder, and is broken after 30 s.
    assert seconds < (45 if name == "lockfile" else 10)
