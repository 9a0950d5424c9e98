"""A search of cheap trials through everything a real one goes through, with times and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState

from search.console import Stages
from search.drivers import OWNER, Crew
from search.engine import Running
from search.pool import Pool
from search.sampler import make_sampler
from search.slope_book import SlopeBook
from search.study import finished, open_storage, open_study
from search.tracking import Tracker, tracking_place, tracking_uri
from tests.search.fake_pool import make_runner
from tests.soak.workers import allocator


def clock() -> float:
    """Seconds of this thread, less those in which other processes had its processor."""
    waited = 0.0
    with suppress(OSError):
        waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.perf_counter() - waited


@dataclass
class Times:
    """Seconds per trial, in the order of the trials; memory now and then.

    Attributes:
        ask: Proposing a trial and noting who runs it.
        tell: Storing its scores.
        log: Handing it to MLflow's writer.
        write: The writer's own time, in a thread of its own.
        whole: All of the driver's time but that of the evaluations.
        memory: (trials, resident bytes of the driver).
    """

    ask: list[float] = field(default_factory=list)
    tell: list[float] = field(default_factory=list)
    log: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)

    def held_up(self, last: int) -> float:
        """Median of ask, tell and log together over the last trials, seconds."""
        return float(np.median(np.sum([x[-last:] for x in (self.ask, self.tell, self.log)], 0)))

    def slope(self, after: int) -> float:
        """Bytes per trial that the driver grows by, by least squares over what comes after so many trials."""
        counts, sizes = zip(*[m for m in self.memory if m[0] >= after], strict=True)
        return float(np.polyfit(counts, sizes, 1)[0])


class Load:
    """One driver of a study of synthetic trials in a folder.

    Args:
        folder: Of the journal, the MLflow database and the slopes.
        pool: Workers of the kind `SyntheticWorker`.
        every: Trials between two looks at memory.
        real: Whether trials are stored in a journal and logged to MLflow; in memory and nowhere else if not.
    """

    def __init__(self, folder: Path, pool: Pool, every: int = 250, real: bool = True) -> None:
        self.folder, self.pool, self.every, self.real, self.times = folder, pool, every, real, Times()
        storage = open_storage(None, folder / "study.journal") if real else optuna.storages.InMemoryStorage()
        self.study = open_study("soak", storage, {})
        self.study.sampler = make_sampler("knapsack", allocator(), 0, SlopeBook(folder / "slopes"))

    def run(self, total: int) -> None:
        """Fills the study up to so many trials, baselines among them."""
        crew = Crew(self.study, tracking_place(tracking_uri(None, self.folder)))
        space, study = allocator().space, self.study
        search = SimpleNamespace(options=SimpleNamespace(trials=total))
        running = Running(search, study, self.pool, {}, None, crew)  # type: ignore[arg-type]
        running.space, running.allocator = space, allocator()
        running.stages = Stages(lambda: 0)
        running.tracker = (
            Tracker(study, None, self.folder, {}, space.inventory, crew.logged_elsewhere)
            if self.real
            else _Untracked()  # type: ignore[assignment]
        )
        runner = running.runner = make_runner(study, allocator(), self.pool)  # type: ignore[arg-type]
        runner.crew = crew
        self._time(running)
        try:
            running._trials()
            running.tracker.flush()
        finally:
            crew.close()

    def fill(self, copies: int) -> None:
        """Adds copies of the finished trials, as if another driver had run them."""
        done = finished(self.study)
        for i in range(copies):
            trial = done[i % len(done)]
            attributes = {k: v for k, v in trial.user_attrs.items() if k not in ("baseline", OWNER)}
            copy = optuna.trial.create_trial(
                state=trial.state, values=trial.values, params=trial.params,
                distributions=trial.distributions, user_attrs=attributes,
            )  # fmt: skip
            self.study.add_trial(copy)

    def _time(self, running: Running) -> None:
        times, runner, tracker = self.times, running.runner, running.tracker
        step, tell, evaluate = runner.step, runner._tell, runner._evaluate
        scoring, logging = 0.0, list[float]()

        def timed(work: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
            def run(*args: Any, **options: Any) -> Any:
                with _into(into):
                    return work(*args, **options)

            return run

        def whole_round(count: int, *more: Any) -> None:
            nonlocal scoring
            scoring, before, begun = 0.0, len(times.ask), clock()
            step(count, *more)
            asked = len(times.ask) - before
            times.whole += [(clock() - begun - scoring) / max(1, asked)] * asked

        def evaluated(*args: Any) -> Any:
            nonlocal scoring
            begun = clock()
            found = evaluate(*args)
            scoring += clock() - begun
            return found

        def told(entry: Any) -> None:
            logging.clear()
            begun = clock()
            tell(entry)
            times.tell.append(clock() - begun - sum(logging))
            times.log.append(sum(logging))
            if len(times.tell) % self.every == 0:
                times.memory.append((len(times.tell), psutil.Process().memory_info().rss))

        self.study.ask = timed(self.study.ask, times.ask)  # type: ignore[method-assign]
        tracker.log_trial = timed(tracker.log_trial, logging)  # type: ignore[method-assign]
        tracker._write = timed(tracker._write, times.write)  # type: ignore[method-assign]
        runner.step, runner._tell, runner._evaluate = whole_round, told, evaluated  # type: ignore[method-assign]

    def logged(self) -> list[int]:
        """Numbers of the trials MLflow holds, whole and finished ones, sorted."""
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=tracking_uri(None, self.folder))
        (experiment,) = [e for e in client.search_experiments() if e.name == "soak"]
        found, token = [], None
        while True:
            runs = client.search_runs([experiment.experiment_id], max_results=1000, page_token=token)
            found += [
                int(r.data.tags["trial"]) for r in runs
                if "trial" in r.data.tags and r.info.status == "FINISHED" and "kl_nats" in r.data.metrics
            ]  # fmt: skip
            token = runs.token
            if not token:
                return sorted(found)


class _Untracked:
    """A tracker that writes nothing."""

    def log_all(self, candidate: Any) -> None:
        pass

    def log_trial(self, *args: Any) -> None:
        pass

    def _write(self, *args: Any) -> None:
        pass

    def flush(self) -> None:
        pass


@contextmanager
def _into(times: list[float]) -> Iterator[None]:
    begun = clock()
    yield
    times.append(clock() - begun)


def stored(folder: Path) -> list[FrozenTrial]:
    """The finished trials as a process that opens the journal anew reads them; none may be unfinished."""
    storage = open_storage(None, folder / "study.journal")
    study = optuna.load_study(study_name="soak", storage=storage)
    assert not study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
    return finished(study)
