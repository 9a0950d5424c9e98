"""The Optuna study: created or resumed, filled with trials, early-stopped on few tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from evaluators.base import Scores
from evaluators.footprint import Footprint
from evaluators.throughput import Throughput
from search.allocator import Allocator
from search.pool import Pool
from search.stages import SEARCH_TOKENS
from spaces.errors import UserError

FIRST_TOKENS = 4096
"""Tokens of the first fidelity; what is promising goes on to all search tokens."""

BATCH = 4
"""Trials asked, scored and told together: fixed, so that the number of workers changes no result."""

_DIRECTIONS: tuple[Literal["minimize", "maximize"], ...] = ("minimize", "minimize", "maximize")
_METRICS = ("KL (nats)", "target bytes", "target tokens/s")


def open_storage(url: str | None, default: Path) -> BaseStorage:
    """A journal file, or any database Optuna takes.

    Raises:
        UserError: The storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    if url is None or "://" not in url:
        path = default if url is None else Path(url)
        if path.is_dir():
            raise UserError(f"--storage {path}: is a folder; give a journal file or a database URL")
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path)))
    try:
        return optuna.storages.RDBStorage(url)
    except Exception as error:  # SQLAlchemy and drivers raise many kinds
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"--storage {url}: cannot be opened ({reason})") from error


def open_study(name: str, storage: BaseStorage, identity: dict[str, Any]) -> optuna.Study:
    """Creates the study, or goes on with it if it is about the same problem.

    Raises:
        UserError: A study of that name is about something else.
    """
    study = optuna.create_study(
        study_name=name, storage=storage, directions=list(_DIRECTIONS), load_if_exists=True
    )
    known = study.user_attrs.get("identity")
    if known is None:
        study.set_metric_names(list(_METRICS))
        study.set_user_attr("identity", identity)
    elif known != identity:
        differing = sorted(k for k in identity.keys() | known.keys() if identity.get(k) != known.get(k))
        k = differing[0]
        raise UserError(
            f"study {name!r} is of another {k} ({known.get(k)!r}, now {identity.get(k)!r}); "
            "give this search a --study name of its own"
        )
    return study


def recover(study: optuna.Study, names: Collection[str]) -> int:
    """Gives trials that a killed run left running another try; returns how many there were.

    Args:
        study: The study.
        names: Every parameter of its space.
    """
    wanted = set(names)
    stale = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in stale:
        attributes = {"retry_of": trial.number}
        if "baseline" in trial.user_attrs:
            attributes["baseline"] = trial.user_attrs["baseline"]
        study.tell(trial.number, state=TrialState.FAIL)
        # Killed while it was asked for, a trial has some of its parameters only; those it was
        # meant to have are known if it was enqueued, and drawn anew if it was not.
        params = trial.system_attrs.get("fixed_params", trial.params)
        if set(params) >= wanted:
            study.enqueue_trial(params, user_attrs=attributes)
    return len(stale)


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials with scores: complete and early-stopped ones."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return [t for t in study.get_trials(deepcopy=False, states=states) if "scores" in t.user_attrs]


def window_scores(columns: dict[str, list[float]], bytes_per_token: float, length: int) -> dict[str, Any]:
    """The quality fields of `Scores` from per-window measures."""
    kl, nll = np.array(columns["kl"]), np.array(columns["nll"])
    return {
        "kl": float(kl.mean()),
        "kl_se": float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else 0.0,
        "perplexity": float(np.exp(min(nll.mean(), 700.0))),
        "bits_per_byte": float(nll.mean() / math.log(2) / bytes_per_token),
        "top1": float(np.mean(columns["top1"])),
        "tokens": int(len(kl) * length),
    }


@dataclass
class TrialRunner:
    """Runs trials in batches on a pool.

    Attributes:
        study: Where trials are asked and told.
        allocator: Space, carry and limit.
        footprint, throughput: The measures that need no tokens.
        bytes_per_token: Of the search text.
        window: Tokens per window.
        on_trial: Called with every trial that was told.
    """

    study: optuna.Study
    allocator: Allocator
    pool: Pool
    footprint: Footprint
    throughput: Throughput
    bytes_per_token: float
    window: int
    on_trial: Callable[[FrozenTrial], None] = lambda trial: None

    def run(self, total: int) -> None:
        """Asks until the study has `total` finished trials."""
        while (missing := total - len(finished(self.study))) > 0:
            space = self.allocator.space
            trials = [self.study.ask(space.distributions) for _ in range(min(BATCH, missing))]
            self._batch(trials)

    def _batch(self, trials: Sequence[Trial]) -> None:
        candidates = [self.allocator.space.candidate(t.params) for t in trials]
        texts = [c.to_json() for c in candidates]
        first = self._score(texts, FIRST_TOKENS)
        for candidate, columns in zip(candidates, first, strict=True):
            if not np.isfinite(columns["kl"]).all():
                raise UserError(
                    f"candidate {candidate.key}: its KL is not a number; are the model's weights sound?"
                )
        static = [{**self.footprint.evaluate(c), **self.throughput.evaluate(c)} for c in candidates]
        complete = [t for t in finished(self.study) if t.state == TrialState.COMPLETE]
        # Each form has a winner of its own, so a trial is measured against its own form only.
        rivals = [[t for t in complete if self._portable(t) == c.portable] for c in candidates]
        chosen = [
            i for i, trial in enumerate(trials)
            if "baseline" in trial.user_attrs
            or self._promising(float(np.mean(first[i]["kl"])), static[i], rivals[i])
        ]  # fmt: skip
        rest = self._score([texts[i] for i in chosen], SEARCH_TOKENS, FIRST_TOKENS)
        for i, more in zip(chosen, rest, strict=True):
            first[i] = {name: [*first[i][name], *more[name]] for name in first[i]}
        for i, trial in enumerate(trials):
            self._tell(trial, candidates[i].key, first[i], static[i], complete=i in chosen)

    def _score(self, candidates: Sequence[str], tokens: int, first: int = 0) -> list[dict[str, list[float]]]:
        """Scores candidates together, each worker its share of neighbours."""
        share = -(-len(candidates) // max(1, self.pool.size))
        chunks = [candidates[i : i + share] for i in range(0, len(candidates), max(1, share))]
        found = self.pool.run([("score", (chunk, "search", tokens, first)) for chunk in chunks])
        return [columns for chunk in found for columns in chunk]

    def _portable(self, trial: FrozenTrial) -> bool:
        return self.allocator.space.candidate(trial.params).portable

    def _promising(self, kl: float, static: dict[str, Any], complete: Sequence[FrozenTrial]) -> bool:
        """Whether no finished trial is as small and fast and clearly better on the same first windows."""
        windows = FIRST_TOKENS // self.window
        for other in complete:
            scores = other.user_attrs["scores"]
            better = float(np.mean(other.user_attrs["windows"]["kl"][:windows])) < 0.98 * kl
            small = scores["target_bytes"] <= 1.005 * static["target_bytes"]
            fast = scores["tokens_per_second"] >= 0.995 * static["tokens_per_second"]
            if better and small and fast:
                return False
        return True

    def _tell(
        self,
        trial: Trial,
        key: str,
        columns: dict[str, list[float]],
        static: dict[str, Any],
        *,
        complete: bool,
    ) -> None:
        scores = Scores(**window_scores(columns, self.bytes_per_token, self.window), **static).to_dict()
        trial.set_user_attr("candidate", key)
        trial.set_user_attr("predicted_kl", self.allocator.model.predict(trial.params))
        trial.set_user_attr("windows", {n: [round(v, 7) for v in c] for n, c in columns.items()})
        trial.set_user_attr("scores", scores)
        trial.set_constraint("bytes over budget", scores["target_bytes"] / self.allocator.limit - 1)
        values = [scores["kl"], scores["target_bytes"], scores["tokens_per_second"]]
        outcome = {"values": values} if complete else {"state": TrialState.PRUNED}
        self.on_trial(self.study.tell(trial, **outcome))
