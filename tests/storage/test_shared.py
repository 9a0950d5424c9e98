"""Two drivers on one study, in a journal under both of its locks and in SQLite: no trial lost or twice."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.storage.sharing import opened_at_once, shared, survived

KINDS = ("flock:{}/study.journal", "lockfile:{}/study.journal", "sqlite:///{}/study.db")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a place: what is tested is who writes when, not the disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(dir=memory))
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("kind", KINDS)
def test_two_drivers_make_exactly_the_trials_that_were_wanted(kind: str, folder: Path) -> None:
    shared(kind.format(folder), 20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_storage_is_opened_by_several_at_once(kind: str, folder: Path) -> None:
    opened_at_once(kind.format(folder), 4)


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
    assert seconds < 10
