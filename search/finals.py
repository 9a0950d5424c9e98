"""After the trials: finalists on unseen text, the winners, and how they compare with the baselines.

Finalists are re-scored on the selection text, which no trial saw; the best of
each form wins. Winners and baselines are then scored on the report text, which
nothing was chosen on, and compared window by window.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from compression import sealed
from search.cache_files import material
from search.pool import Job, Pool
from search.runner import TrialRunner
from search.study import finished, window_scores
from spaces.space import PORTABLE, RAGGED

FINALISTS = 4
_Z95 = 1.96


def finalists(runner: TrialRunner) -> dict[str, list[FrozenTrial]]:
    """The lowest KL of each form among complete trials; one per distinct candidate."""
    space = runner.allocator.space
    complete = [t for t in finished(runner.study) if t.state == TrialState.COMPLETE]
    complete.sort(key=lambda t: (t.user_attrs["scores"]["kl"], t.number))
    out: dict[str, list[FrozenTrial]] = {PORTABLE: [], RAGGED: []}
    seen: set[str] = set()
    for trial in complete:
        key = trial.user_attrs["candidate"]
        form = PORTABLE if space.candidate(trial.params).portable else RAGGED
        if key not in seen and len(out[form]) < FINALISTS:
            seen.add(key)
            out[form].append(trial)
    return out


def score_on(
    pool: Pool,
    runner: TrialRunner,
    trials: Sequence[FrozenTrial],
    text: str,
    tokens: int,
    bytes_per_token: float,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, dict[str, Any]]:
    """Trial number to quality scores on a text, with the per-window KL under `windows_kl`.

    Each score is kept in `cache`, a folder in the study's, where a run that was killed finds it again.
    """
    made_of = material(cache.parent, text)
    space = runner.allocator.space
    files = {t.number: cache / f"{text}-{tokens}-{t.user_attrs['candidate']}.json" for t in trials}
    missing = [t for t in trials if not files[t.number].exists()]
    jobs: list[Job] = [("score", ([space.candidate(t.params).to_json()], text, tokens)) for t in missing]
    done = len(trials) - len(missing)
    progress(done, len(trials))

    def keep(i: int, columns: Any) -> None:
        nonlocal done
        done += 1
        sealed.write(files[missing[i].number], json.dumps(columns[0]), made_of)
        progress(done, len(trials))

    pool.run(jobs, keep)
    out = {}
    for trial in trials:
        columns = json.loads(sealed.read(files[trial.number], made_of))
        scores: dict[str, Any] = dict(
            window_scores(columns, bytes_per_token, len(columns["kl"]) * runner.text.windows.shape[1])
        )
        out[trial.number] = scores | {"windows_kl": columns["kl"]}
    return out


def winners(
    chosen: dict[str, list[FrozenTrial]], selection: dict[int, dict[str, Any]]
) -> dict[str, int | None]:
    """Trial number of the lowest selection KL of each form; None where nothing of a form finished."""
    return {
        form: min((t.number for t in trials), key=lambda n: (selection[n]["kl"], n), default=None)
        for form, trials in chosen.items()
    }


def compare(winner: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """KL of `other` over that of `winner`, paired by window.

    Returns:
        `kl_difference` (other - winner, nats) with the half width of its 95 %
        interval, and `kl_ratio` (winner / other).
    """
    difference = np.array(other["windows_kl"]) - np.array(winner["windows_kl"])
    se = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else 0.0
    return {
        "kl_difference": float(difference.mean()),
        "kl_difference_95": _Z95 * se,
        "kl_ratio": winner["kl"] / other["kl"] if other["kl"] > 0 else 1.0,
    }


def baseline_trials(runner: TrialRunner) -> dict[str, FrozenTrial]:
    """Baseline name to its finished trial."""
    return {t.user_attrs["baseline"]: t for t in finished(runner.study) if "baseline" in t.user_attrs}
