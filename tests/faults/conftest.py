"""What every disturbed search is compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.faults.commands import arguments, finish, short_texts

Texts = tuple[Path, Path]
Undisturbed = Callable[[int, str], tuple[Path, float]]


@pytest.fixture(scope="module")
def short(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """The first documents of the finished run's texts."""
    return short_texts(texts, tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, short: Texts, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """By workers and repairs: the folder of a search nothing happened to, and the seconds it took."""

    @cache
    def of(workers: int, repair: str) -> tuple[Path, float]:
        folder = tmp_path_factory.mktemp("undisturbed")
        options = arguments(tiny_checkpoint, short, folder / "out", workers, repair)
        return folder / "out", finish(options, folder / "log")

    return of
