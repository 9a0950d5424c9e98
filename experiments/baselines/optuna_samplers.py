"""Plain Optuna samplers on the whole joint space: random, TPE, NSGA-II and a Gaussian process.

Source: Akiba et al., "Optuna" (arXiv 1907.10902); its TPE (Watanabe, arXiv 2304.11127), NSGA-II (Deb et al.,
2002) and GPSampler as `search.sampler.make_sampler` sets them up. Parameters are the space's own (form,
experts kept, top-k, ranking, a type per tensor); objectives the three of `search.study`: KL and bytes
down, tokens per second of the default device up. Trials are asked in fours and told together. The result
is the trial of lowest KL.

Deviations, forced by the setting:
- Nearly nothing drawn at random fits a budget, so proposals are moved to the nearest config that does
  (`search.sampler.FeasibleSampler`): fewest steps on the ladders, squared. Without it none would finish.
- Each trial is scored on the first 4,096 search tokens: no early stopping, no seeded trials.
- `gp` is asked for one trial at a time (with others open, one proposal takes many minutes) and ends after
  `GP_TRIALS` though tokens are left: past the ten it draws at random, refitting three processes and
  maximising the acquisition over 59 to 80 parameters takes 10 to 50 seconds a proposal and grows.
"""

from __future__ import annotations

import math
import warnings

import optuna

from evaluators.throughput import Throughput
from experiments.baselines.lab import Lab
from experiments.baselines.method import fitting_counts
from search.costs import CostModel
from search.sampler import make_sampler
from spaces.carry import Carry
from spaces.devices import DEFAULT_DEVICE, device

BATCH, TOKENS = 4, 4096
GP_TRIALS = 20
_CONTEXT = 4096  # as `--context` has it where nothing is said


def _sample(lab: Lab, name: str, batch: int = BATCH, most: int | None = None) -> None:
    """Asks a sampler for `batch` trials at a time, at most `most` in all."""
    fitting_counts(lab)
    # Only the model's index of options is read: repair counts steps, not costs.
    allocator = lab.allocator(CostModel(lab.space, {}, lab.errors))
    speed = Throughput(Carry(lab.inventory, lab.inventory), device(DEFAULT_DEVICE), _CONTEXT)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        directions=["minimize", "minimize", "maximize"], sampler=make_sampler(name, allocator, lab.seed)
    )
    best = math.inf
    while (count := min(batch, lab.left // TOKENS, (most or lab.tokens) - len(study.trials))) > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trials = [study.ask(lab.space.distributions) for _ in range(count)]
        candidates = [lab.space.candidate(t.params) for t in trials]
        scores = lab.mean(candidates, TOKENS)
        for trial, candidate, kl in zip(trials, candidates, scores, strict=True):
            tokens_per_second = speed.evaluate(candidate)["tokens_per_second"]
            study.tell(trial, [kl, float(lab.size(candidate)), tokens_per_second])
        if min(scores) < best:
            best = min(scores)
            lab.offer(candidates[scores.index(best)])


def random(lab: Lab) -> None:
    """Every parameter at random, moved to fit."""
    _sample(lab, "random")


def tpe(lab: Lab) -> None:
    """Tree-structured Parzen estimator, multivariate, with the constant liar."""
    _sample(lab, "tpe")


def nsgaii(lab: Lab) -> None:
    """NSGA-II with a population of 20."""
    _sample(lab, "nsgaii")


def gp(lab: Lab) -> None:
    """A Gaussian process per objective; at most `GP_TRIALS` trials."""
    _sample(lab, "gp", 1, GP_TRIALS)
