"""Who drives a study: several commands may fill one study, on one machine or on many.

Every driver notes itself in the study and counts up a number there (its beat) while it lives.
A driver of this machine is dead when its process is; any other one when its beat stood still
for a lease, by the watch of who looks (clocks of machines are never compared). Running trials
of the dead are abandoned: a driver that is alone takes them over as they are, so that a study
goes on as if nothing had happened; among several, the first to fail a trial tries it again.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from search.processes import place, started

BEAT = 15.0
"""Seconds between two beats."""

LEASE = 120.0
"""Seconds without a beat after which a driver of another machine counts as dead."""

OWNER = "driver"
"""User attribute of a trial: who runs it."""

_NOTE = "driver:"
_TWINS = ("baseline", "retry_of")


class Crew:
    """The drivers of a study, seen by one of them.

    Args:
        study: The study.
        tracking: Where this driver logs trials to, so that drivers of one place share that work.
        beat: Seconds between beats.
        lease: Seconds without a beat that are a death.

    Attributes:
        name: This driver's.
    """

    def __init__(
        self, study: optuna.Study, tracking: str = "", beat: float = BEAT, lease: float = LEASE
    ) -> None:
        self.study, self.lease, self._beat = study, lease, beat
        self.name = uuid.uuid4().hex[:12]
        pid = os.getpid()
        self._note = {"place": place(), "pid": pid, "started": started(pid), "tracking": tracking}
        self._observed: dict[str, tuple[int, float]] = {}
        self._beaten: set[str] = set()
        self._ownerless: dict[int, float] = {}
        self._stop = threading.Event()
        self._sign(0)
        self._thread = threading.Thread(target=self._keep_beating, name="beat", daemon=True)
        self._thread.start()

    def _sign(self, beat: int) -> None:
        self.study.set_user_attr(_NOTE + self.name, {**self._note, "beat": beat})

    def _keep_beating(self) -> None:
        beat = 0
        while not self._stop.wait(self._beat):
            beat += 1
            with suppress(Exception):  # a disk that is full now may have room at the next beat
                self._sign(beat)

    def close(self) -> None:
        """Signs off; what this driver left running is abandoned from now on."""
        self._stop.set()
        self._thread.join()
        with suppress(Exception):  # an error that ends the run is told already
            self.study.set_user_attr(_NOTE + self.name, None)

    def others(self) -> dict[str, dict[str, Any]]:
        """The other drivers that live, or of which it is not known yet that they are dead."""
        notes = {k.removeprefix(_NOTE): v for k, v in self.study.user_attrs.items() if k.startswith(_NOTE)}
        return {n: note for n, note in notes.items() if note and n != self.name and self._lives(n, note)}

    def _lives(self, name: str, note: dict[str, Any]) -> bool:
        if note["place"] == self._note["place"]:
            return started(note["pid"]) == note["started"]
        now = time.monotonic()
        beat, since = self._observed.setdefault(name, (note["beat"], now))
        if note["beat"] != beat:
            self._observed[name] = note["beat"], now
            self._beaten.add(name)
            return True
        return now - since < self.lease

    def unsure(self) -> bool:
        """Whether running trials are of a driver that may be dead, as that of a machine started anew.

        Who waits until that is known takes over what a dead one left, as it would have been.
        """
        unknown = {
            name
            for name, note in self.others().items()
            if note["place"] != self._note["place"] and name not in self._beaten
        }
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if unknown else ()
        # One without an owner may be of any of them, killed before it could note that.
        return bool(unknown) and any(t.user_attrs.get(OWNER) in {None, *unknown} for t in running)

    def own(self, trial: optuna.Trial) -> None:
        """Notes a trial as this driver's."""
        trial.set_user_attr(OWNER, self.name)

    def busy(self) -> int:
        """Trials that other living drivers run."""
        others = self.others()
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return sum(not self._abandoned(t, others) and t.user_attrs.get(OWNER) != self.name for t in running)

    def _abandoned(self, trial: FrozenTrial, others: dict[str, dict[str, Any]]) -> bool:
        owner = trial.user_attrs.get(OWNER)
        if owner is not None:
            return owner != self.name and owner not in others
        # Killed between being made and being noted; or about to be noted by somebody who lives.
        since = self._ownerless.setdefault(trial.number, time.monotonic())
        return not others or time.monotonic() - since > self.lease

    def adopt(self, distributions: Mapping[str, Any]) -> list[optuna.Trial]:
        """Trials of dead drivers that are this one's from now on, by number.

        Among several living drivers none are: abandoned trials are ended then and enqueued anew.

        Args:
            distributions: Every parameter of the space, categorical.
        """
        others, taken = self.others(), []
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for frozen in sorted(running, key=lambda t: t.number):
            if not self._abandoned(frozen, others):
                continue
            if others:
                self._try_again(frozen, distributions)
                continue
            trial = optuna.Trial(self.study, frozen._trial_id)  # Optuna has no public name for it
            with unless_taken(trial):
                if not _continues(trial, frozen, distributions):
                    self.study.tell(trial, state=TrialState.FAIL)
                    continue
                self.own(trial)
                for name, distribution in distributions.items():
                    trial.suggest_categorical(name, distribution.choices)
                taken.append(trial)
        return taken

    def _try_again(self, frozen: FrozenTrial, distributions: Mapping[str, Any]) -> None:
        """Ends a trial and enqueues it once more, unless another driver was first."""
        try:
            self.study.tell(frozen.number, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):
            return
        # Killed while it was asked for, a trial has some of its parameters only; what was enqueued is
        # known whole, anything else is drawn anew.
        params = frozen.system_attrs.get("fixed_params", frozen.params)
        if params.keys() >= distributions.keys():
            attributes = {"retry_of": frozen.number}
            if "baseline" in frozen.user_attrs:
                attributes["baseline"] = frozen.user_attrs["baseline"]
            self.study.enqueue_trial(params, user_attrs=attributes)

    def surplus(self, trial: optuna.Trial, total: int) -> bool:
        """Whether a trial just asked for is one too many: beyond `total`, or another driver's twin.

        Numbers decide, which are the same for every driver, so that exactly one of two twins goes on.
        """
        number, attributes = trial.number, trial.user_attrs
        own = {(key, attributes[key]) for key in _TWINS if key in attributes}
        if not own and number < total:
            return False
        trials = self.study.get_trials(deepcopy=False)
        before = [t for t in trials if t.number < number and t.state != TrialState.FAIL]
        return len(before) >= total or any(t.user_attrs.get(k) == v for t in before for k, v in own)

    def logged_elsewhere(self) -> Callable[[FrozenTrial], bool]:
        """Whether a finished trial is logged by the living driver that ran it, to where this one logs."""
        here = {n for n, note in self.others().items() if note["tracking"] == self._note["tracking"]}
        return lambda trial: trial.user_attrs.get(OWNER) in here


@contextmanager
def unless_taken(trial: optuna.Trial) -> Iterator[None]:
    """Lets a block end quietly where another driver ended its trial, as it took this one for dead."""
    try:
        yield
    except (UpdateFinishedTrialError, ValueError):
        if not trial.storage.get_trial(trial._trial_id).state.is_finished():
            raise


def _continues(trial: optuna.Trial, frozen: FrozenTrial, distributions: Mapping[str, Any]) -> bool:
    """Whether what a trial lacks can be asked for again as it would have been.

    A sampler that draws something else now would make a config of two halves, which need not fit.
    """
    known = frozen.params
    if known.keys() >= distributions.keys() or "fixed_params" in frozen.system_attrs:
        return True
    drawn = trial.relative_params
    return all(drawn.get(name) == value for name, value in known.items())
