"""Fills a study with trials: asked in rounds, scored together, stopped early by paired comparison.

A round climbs rungs of more and more tokens (successive halving with a test in place
of a quota): a trial goes on while no other that is as small and as fast is better on
the very same tokens, at the first rung, or clearly better, at the later ones. The first
rung is a few tokens of many windows, and its trials are many. Now and then the slopes at the incumbents
are measured, which tell the sampler what every type would change there.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from scipy.stats import spearmanr

from evaluators.base import Scores
from evaluators.footprint import Footprint
from evaluators.texts import TextSet
from evaluators.throughput import Throughput
from search.allocator import Allocator
from search.console import console
from search.drivers import Crew, unless_taken
from search.pool import Job, Pool
from search.sampler import KnapsackSampler
from search.stages import SEARCH_TOKENS
from search.study import finished, window_scores
from spaces.candidate import Candidate
from spaces.errors import UserError

RUNGS = (512, 4608, SEARCH_TOKENS)
"""Tokens of the fidelities; each holds the one before it (see `TextSet.spread`)."""

ROUND = 8
"""Trials asked, scored and told together: fixed, so that the number of workers changes no result."""

SLOPE_TOKENS, SLOPE_PROBES = 1152, 2
_CLEARLY = 1.5  # standard errors of a paired difference, from the second rung on
_AT_LEAST = 0.005  # of the better one's KL
_SURELY = 1 - 1e-9  # of a mean: further than rounding errors reach
_BETTER = 0.95  # of the KL where slopes were last measured: measure them anew
_ROUND = "round"  # user attribute: the number of the first trial of a trial's round
_PATIENCE = 1.0  # seconds between looks at other drivers' last trials
_RECENT = 64  # trials that the rank correlation of the predictor is taken over

Columns = dict[str, list[float]]
"""Per-window kl, nll and top1."""


@dataclass
class _Entry:
    """A trial of the running round."""

    trial: Trial
    candidate: Candidate
    static: dict[str, Any]
    predicted: float
    columns: Columns
    rungs: dict[str, list[float]] = field(default_factory=dict)

    @property
    def baseline(self) -> bool:
        return "baseline" in self.trial.user_attrs


@dataclass(frozen=True)
class _Rival:
    """What a trial is measured against: KL of every window at every rung, by tokens, and its mean."""

    rungs: dict[str, np.ndarray]
    means: dict[str, float]
    static: dict[str, Any]
    portable: bool

    @classmethod
    def of(cls, rungs: Mapping[str, Sequence[float]], static: dict[str, Any], portable: bool) -> _Rival:
        arrays = {tokens: np.array(kl) for tokens, kl in rungs.items()}
        return cls(arrays, {tokens: float(a.mean()) for tokens, a in arrays.items()}, static, portable)


@dataclass
class TrialRunner:
    """Runs trials in rounds on a pool.

    Attributes:
        study: Where trials are asked and told.
        allocator: Space, carry and limit.
        footprint, throughput: The measures that need no tokens.
        text: All of the search text.
        on_trial: Called with every trial that was told.
        rungs: Tokens of every fidelity, ascending.
        round: Trials of a round.
        slopes: Whether slopes may be measured (a streamed model's cannot).
        crew: The study's drivers; None: this is the only one there will ever be.
        spent: Tokens of forward pass spent by this runner; a backward pass counts as two.
        seconds, scoring: Time in all, and of it in which candidates were evaluated.
    """

    study: optuna.Study
    allocator: Allocator
    pool: Pool
    footprint: Footprint
    throughput: Throughput
    text: TextSet
    on_trial: Callable[[FrozenTrial], None] = lambda trial: None
    rungs: tuple[int, ...] = RUNGS
    round: int = ROUND
    slopes: bool = False
    crew: Crew | None = None
    spent: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    scoring: float = field(default=0.0, init=False)
    _known: dict[int, _Rival] = field(default_factory=dict, init=False, repr=False)
    _lean: int = field(default=0, init=False, repr=False)
    _waited: bool = field(default=False, init=False, repr=False)

    def run(self, total: int) -> None:
        """Asks until the study has `total` finished trials."""
        begun = time.perf_counter()
        while len(finished(self.study)) < total:
            if self.crew and self.crew.unsure():
                self._wait()
                continue
            left = self._left_over()
            missing = total - len(finished(self.study)) - (self.crew.busy() if self.crew else 0)
            if missing <= 0 and not left:
                time.sleep(_PATIENCE)  # the last trials are being run by other drivers
                continue
            self.measure_slopes()
            self.step(min(self.round, max(missing, len(left))), left, total)
        self.seconds += time.perf_counter() - begun

    def _wait(self) -> None:
        """Until a driver of another place beats again, or counts as dead."""
        if not self._waited:
            console.print("another driver's trials are running, if it lives: waiting for a sign of it")
            self._waited = True
        time.sleep(_PATIENCE)

    def _left_over(self) -> list[Trial]:
        """Finishes rounds that dead drivers had told a part of; returns the trials of one they had not.

        A round is finished as it was begun: its trials are measured against each other, whichever of
        them were told before.
        """
        rest: list[Trial] = []
        adopted = self.crew.adopt(self.allocator.space.distributions) if self.crew else []
        for name, trials in groupby(adopted, lambda t: t.user_attrs.get(_ROUND)):
            told = [t for t in finished(self.study) if name is not None and t.user_attrs.get(_ROUND) == name]
            if told:
                self._round(list(trials), [self._rival(t) for t in told])
            else:
                rest += trials
        while len(rest) > self.round:
            self._round(rest[: self.round])
            rest = rest[self.round :]
        return rest

    def _evaluate(self, jobs: Sequence[Job]) -> list[Any]:
        """Runs jobs, their time counted as evaluation."""
        begun = time.perf_counter()
        found = self.pool.run(jobs)
        self.scoring += time.perf_counter() - begun
        return found

    def step(self, count: int, begun: Sequence[Trial] = (), total: int | None = None) -> None:
        """One round of `count` trials.

        Args:
            count: Trials of the round.
            begun: Those of them that were asked for already.
            total: Trials that the study is to have; one beyond is given back.
        """
        trials = list(begun)
        for _ in range(count - len(begun)):
            with suppress(UpdateFinishedTrialError):  # it took so long that another driver ended the trial
                trial = self.study.ask(self.allocator.space.distributions)
                if self.crew is not None:
                    self.crew.own(trial)
                    if total is not None and self.crew.surplus(trial, total):
                        self.study.tell(trial, state=TrialState.FAIL)
                        continue
                trials.append(trial)
        self._round(trials)

    def _round(self, trials: Sequence[Trial], told: Sequence[_Rival] = ()) -> None:
        """Scores trials together and tells them.

        Args:
            trials: Asked for, not told.
            told: Trials of the same round that were told before this driver took it over.
        """
        done = self.study.get_trials(deepcopy=False)
        self._share(done)
        entries = []
        for trial in trials:
            with unless_taken(trial):  # another driver took it for abandoned
                trial.set_user_attr(_ROUND, trials[0].user_attrs.get(_ROUND, trials[0].number))
                entries.append(self._entry(trial, done))
        self._climb(entries, told)
        for entry in entries:
            with unless_taken(entry.trial):
                self._tell(entry)

    def _share(self, trials: Sequence[FrozenTrial]) -> None:
        """Has finished trials hold one copy of the space: storages parse one for each, of some 70 KB."""
        own = self.allocator.space.distributions
        for trial in trials[self._lean :]:
            if not trial.state.is_finished():
                return
            if trial.distributions == own:
                trial.distributions = own
            self._lean += 1

    def _entry(self, trial: Trial, done: list[FrozenTrial]) -> _Entry:
        sampler, candidate = self.study.sampler, self.allocator.space.candidate(trial.params)
        static = {**self.footprint.evaluate(candidate), **self.throughput.evaluate(candidate)}
        if isinstance(sampler, KnapsackSampler):
            predicted = sampler.predict(done, trial.params)
        else:
            predicted = self.allocator.model.predict(trial.params)
        return _Entry(trial, candidate, static, predicted, {})

    def _climb(self, entries: Sequence[_Entry], told: Sequence[_Rival] = ()) -> None:
        """Scores a round, rung by rung; `told` are mates that were scored before."""
        complete, alive = self._rivals(), list(entries)
        for i, tokens in enumerate(self.rungs):
            for entry, columns in zip(alive, self._score(alive, tokens), strict=True):
                if not np.isfinite(columns["kl"]).all():
                    raise UserError(
                        f"candidate {entry.candidate.key}: its KL is not a number; "
                        "are the model's weights sound?"
                    )
                entry.columns, entry.rungs[str(tokens)] = columns, columns["kl"]
            mates = [_Rival.of(e.rungs, e.static, e.candidate.portable) for e in alive]
            before = [rival for rival in told if str(tokens) in rival.rungs]
            margin = _CLEARLY if i else 0.0
            alive = [
                e for i, e in enumerate(alive)
                if e.baseline or not any(
                    self._beats(rival, mates[i], str(tokens), margin)
                    for rival in [*complete, *before, *mates[:i], *mates[i + 1 :]]
                )
            ]  # fmt: skip

    def _rivals(self) -> list[_Rival]:
        """Complete trials; a trial is measured against its own form only, as each form has a winner."""
        return [self._rival(t) for t in finished(self.study) if t.state == TrialState.COMPLETE]

    def _rival(self, trial: FrozenTrial) -> _Rival:
        if trial.number not in self._known:
            portable = self.allocator.space.candidate(trial.params).portable
            self._known[trial.number] = _Rival.of(
                trial.user_attrs["rungs"], trial.user_attrs["scores"], portable
            )
        return self._known[trial.number]

    def _beats(self, rival: _Rival, own: _Rival, tokens: str, margin: float) -> bool:
        """Whether a rival is as small and fast, and better on the same tokens.

        Args:
            rival, own: Both were scored at the rung.
            tokens: The rung.
            margin: By how many standard errors of the paired difference it has to be better.
        """
        if rival.portable != own.portable and len(self.allocator.space.forms) > 1:
            return False
        if rival.static["target_bytes"] > 1.005 * own.static["target_bytes"]:
            return False
        if rival.static["tokens_per_second"] < 0.995 * own.static["tokens_per_second"]:
            return False
        if 0 < own.means[tokens] < _SURELY * rival.means[tokens]:  # what is worse on average never beats
            return False
        theirs, mine = rival.rungs[tokens], own.rungs[tokens]
        difference = mine - theirs
        error = float(difference.std(ddof=1) / np.sqrt(len(mine))) if len(mine) > 1 else 0.0
        least = _AT_LEAST * rival.means[tokens] if margin else 0.0
        return float(difference.mean()) > margin * error + least

    def _score(self, entries: Sequence[_Entry], tokens: int) -> list[Columns]:
        """Scores candidates together, each worker its share of neighbours."""
        before = [rung for rung in self.rungs if rung < tokens and self._tokens(rung) == self._tokens(tokens)]
        if before:  # a short text
            return [e.columns for e in entries]
        candidates = [e.candidate.to_json() for e in entries]
        share = max(1, -(-len(candidates) // max(1, self.pool.size)))
        chunks = [candidates[i : i + share] for i in range(0, len(candidates), share)]
        found = self._evaluate([("score", (chunk, "search", tokens)) for chunk in chunks])
        self.spent += len(entries) * self._tokens(tokens)
        return [columns for chunk in found for columns in chunk]

    def _tokens(self, rung: int) -> int:
        """Tokens that a rung really has."""
        return int(self.text.spread(rung).windows.size)

    def measure_slopes(self, allowance: int | None = None) -> None:
        """Measures the slopes at incumbents that are better than where they were last measured.

        Args:
            allowance: Tokens that may be spent on it; None: no matter how many.
        """
        sampler = self.study.sampler
        if not self.slopes or not isinstance(sampler, KnapsackSampler):
            return
        seen = sampler.seen(self.study.get_trials(deepcopy=False))
        wanted: dict[str, Candidate] = {}
        for form in self.allocator.space.forms:
            best = sampler.incumbent(seen, form)
            if best is None or best.damage > _BETTER * sampler.last_sloped(seen, form):
                continue
            if sampler.slopes.get(best.key) is not None:
                continue
            trial = next(t for t in finished(self.study) if t.number == best.number)
            wanted[best.key] = self.allocator.space.candidate(trial.params)
        if allowance is not None and len(wanted) * SLOPE_TOKENS * (4 + 2 * SLOPE_PROBES) > allowance:
            return
        jobs: list[Job] = [("slopes", (c.to_json(), SLOPE_TOKENS, SLOPE_PROBES)) for c in wanted.values()]
        for key, (tokens, rows) in zip(wanted, self._evaluate(jobs), strict=True):
            self.spent += tokens
            sampler.slopes.put(key, {(name, kind): (first, second) for name, kind, first, second in rows})

    def rank_correlation(self) -> float | None:
        """Spearman correlation of predicted with measured KL over the newest trials; None below five."""
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        own = (t for t in reversed(complete) if "scores" in t.user_attrs and "baseline" not in t.user_attrs)
        newest = list(islice(own, _RECENT))[::-1]
        rows = [(t.user_attrs["predicted_kl"], t.user_attrs["scores"]["kl"]) for t in newest]
        return float(spearmanr(*zip(*rows, strict=True))[0]) if len(rows) > 4 else None

    def _tell(self, entry: _Entry) -> None:
        trial, rung = entry.trial, self.rungs[len(entry.rungs) - 1]
        quality = window_scores(entry.columns, self.text.bytes_per_token, self._tokens(rung))
        scores = Scores(**quality, **entry.static).to_dict()
        trial.set_user_attr("candidate", entry.candidate.key)
        trial.set_user_attr("predicted_kl", entry.predicted)
        trial.set_user_attr("additive_kl", self.allocator.model.predict(trial.params))
        trial.set_user_attr("windows", {n: [round(v, 7) for v in c] for n, c in entry.columns.items()})
        trial.set_user_attr("rungs", entry.rungs)
        trial.set_user_attr("scores", scores)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a driver that was killed here had set it already
            trial.set_constraint("bytes over budget", scores["target_bytes"] / self.allocator.limit - 1)
        values = [scores["kl"], scores["target_bytes"], scores["tokens_per_second"]]
        complete = rung == self.rungs[-1]
        outcome = {"values": values} if complete else {"state": TrialState.PRUNED}
        self.on_trial(self.study.tell(trial, **outcome))
