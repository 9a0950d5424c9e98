"""Drivers that die in the midst of a study, as far as its journal shows."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage

from search.drivers import Crew
from search.journal import JournalFile
from search.runner import TrialRunner
from search.sampler import make_sampler
from search.slope_book import SlopeBook
from search.study import finished, open_study
from tests.search.fake_pool import FakePool, make_runner
from tests.search.rounds import ALLOCATOR, rows_of, scrambled


class Killed(BaseException):
    """A driver's end, which no handler of errors stops."""


class MortalJournal(JournalFile):
    """Takes so many writes; the next one is cut short after some bytes, and so is the driver."""

    def __init__(self, path: Path, writes: int | None = None, cut: int = 0) -> None:
        super().__init__(path)
        self.left, self.cut = writes, cut

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self.left is None or self.left > 0:
            super().append_logs(logs)
            self.left = None if self.left is None else self.left - 1
            return
        if self.cut:
            with open(self._file_path, "ab") as stream:
                stream.write(str(logs).encode()[: self.cut])
        raise Killed


@cache
def dead_process() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


class Driver:
    """One start of a driver on a study in a folder, on a pool that scores by a formula.

    Args:
        folder: Of the journal and the slopes.
        writes, cut: When it dies, see `MortalJournal`; never for None.
        sampler: Name of the sampler.
        lease: After which it takes drivers of other places for dead.
    """

    def __init__(
        self,
        folder: Path,
        writes: int | None = None,
        cut: int = 0,
        sampler: str = "knapsack",
        lease: float = 1000.0,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.journal = MortalJournal(folder / "study.journal", writes, cut)
        self.pool = FakePool(scrambled, slopes=rows_of)
        self.sampler, self.lease = sampler, lease
        self.crew: Crew | None = None

    def runner(self) -> TrialRunner:
        study = open_study("s", JournalStorage(self.journal), {})
        study.sampler = make_sampler(self.sampler, ALLOCATOR, 0, SlopeBook(self.folder / "slopes"))
        self.crew = Crew(study, beat=1000.0, lease=self.lease)
        runner = make_runner(study, ALLOCATOR, self.pool, slopes=True)
        runner.crew = self.crew
        return runner

    def drive(self, total: int) -> bool:
        """Whether it lived to see the end."""
        try:
            self.runner().run(total)
        except Killed:
            self.bury()
            return False
        assert self.crew is not None
        self.crew.close()
        return True

    def bury(self) -> None:
        """Gives the killed driver the number of a dead process, as it ran in one that lives."""
        if self.crew is None:
            return
        study = optuna.load_study(
            study_name="s", storage=JournalStorage(JournalFile(self.folder / "study.journal"))
        )
        note = study.user_attrs.get(f"driver:{self.crew.name}")
        if note:
            study.set_user_attr(f"driver:{self.crew.name}", {**note, "pid": dead_process()})


def outcome(folder: Path) -> list[tuple[Any, ...]]:
    """What a study's finished trials are, but for their numbers and times."""
    study = optuna.load_study(study_name="s", storage=JournalStorage(JournalFile(folder / "study.journal")))
    return [
        (sorted(t.params.items()), t.state.name, t.values, t.user_attrs["rungs"], t.user_attrs["round"])
        for t in finished(study)
    ]
