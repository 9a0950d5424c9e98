"""This project's own search on a lab's account of tokens: the engine of `search.run`, levers at will.

It differs from a study of `search.run` in what the lab is about: the budget is the
searched model's own, the highest rung is 4,608 tokens, costs are measured with the
lean effort, and no trial goes to smaller or faster configs. Costs depend on neither budget nor
seed, so a folder keeps them between runs; every run is charged for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.trial import TrialState

from evaluators.footprint import Footprint
from evaluators.texts import WINDOW
from evaluators.throughput import Throughput
from experiments.baselines.lab import Lab
from experiments.baselines.method import Method, Unreachable
from search.allocator import Allocator
from search.baselines import unpruned
from search.costs import LEAN, CostModel
from search.pool import Job, LocalPool
from search.runner import ROUND, TrialRunner
from search.sampler import KnapsackSampler
from search.stages import measure_costs
from search.study import finished, open_study
from search.worker import Worker
from spaces.allocation import InfeasibleError
from spaces.budget import Budget
from spaces.carry import Carry
from spaces.devices import device
from spaces.inventory import Tensor
from spaces.space import PORTABLE, RAGGED, Space

RUNGS = (512, 4608)
ARMS = (0.65, 0.35, 0.0)
_DEVICE = "ryzen-ai-max-395"


@dataclass(frozen=True)
class Restricted(Space):
    """A space with levers taken away.

    Attributes:
        prune: Whether experts may be pruned.
        activate: Whether fewer experts may be active.
        only: The one form that is searched.
        one: The one type all tensors take, or the nearest their rows take; "" for any.
        counts: The only numbers of experts a layer may keep; () for any.
    """

    prune: bool = True
    activate: bool = True
    only: str = RAGGED
    one: str = ""
    counts: tuple[int, ...] = ()

    def ladder(self, tensor: Tensor) -> tuple[str, ...]:
        if not self.one:
            return super().ladder(tensor)
        return (Space(self.inventory, self.rankings, self.runtime).nearest(tensor, self.one),)

    @cached_property
    def forms(self) -> tuple[str, ...]:
        # Where a layer's choices may differ they may also agree: a ragged search has portable configs in it.
        return (self.only,)

    def params(self, *args: Any, **more: Any) -> dict[str, Any]:
        return super().params(*args, **more) | {"form": self.only}

    @cached_property
    def kept_options(self) -> tuple[int, ...]:
        whole = Space(self.inventory, self.rankings, self.runtime).kept_options
        return self.counts or (whole if self.prune else whole[-1:])

    @cached_property
    def top_k_options(self) -> tuple[int, ...]:
        return tuple(range(1, self.inventory.top_k + 1)) if self.activate else (self.inventory.top_k,)


class _Pool(LocalPool):
    """A worker that is there already, as a pool."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        return super().run(jobs, on_result)


def restricted(
    lab: Lab,
    prune: bool = True,
    activate: bool = True,
    one: str = "",
    only: str = RAGGED,
    counts: tuple[int, ...] = (),
) -> Restricted:
    return Restricted(
        lab.inventory, lab.space.rankings, "any", sets=lab.space.sets,
        prune=prune, activate=activate, only=only, one=one, counts=counts,
    )  # fmt: skip


def costs_of(lab: Lab, space: Space) -> CostModel:
    """Costs of a space; what the bank or the folder knows is paid for again."""
    folder = lab.scratch / f"costs-{space.digest}"
    folder.mkdir(parents=True, exist_ok=True)
    model, spent = measure_costs(_Pool(lab.worker), space, lab.errors, folder, lambda done, total: None, LEAN)
    lab.spent += spent
    return model


def laboratory(lab: Lab, space: Space | None = None) -> tuple[optuna.Study, TrialRunner]:
    """A study with its starts enqueued, and what runs its trials; costs are measured and paid for here.

    The cost model's optimum is offered before any trial.

    Raises:
        Unreachable: Nothing of the space fits.
    """
    space = space or restricted(lab)
    model, form = costs_of(lab, space), space.forms[0]
    allocator = Allocator(space, model, Carry(lab.inventory, lab.inventory), lab.limit)
    try:
        start = allocator.best(model.costs, form)
    except InfeasibleError as error:
        raise Unreachable(f"nothing of this space fits {lab.limit:,} bytes") from error
    lab.offer(space.candidate(start))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = open_study("lab", optuna.storages.InMemoryStorage(), {})
    study.sampler = KnapsackSampler(allocator, lab.seed, arms=ARMS)
    study.enqueue_trial(start, user_attrs={"baseline": form})
    whole = unpruned(allocator)
    if whole is not None and whole != start:
        study.enqueue_trial(whole, user_attrs={"baseline": "unpruned"})
    budget = Budget(lab.limit, 10**15, WINDOW, 0, 0, 0)
    runner = TrialRunner(
        study, allocator, _Pool(lab.worker), Footprint(allocator.carry, budget),
        Throughput(allocator.carry, device(_DEVICE), WINDOW), lab.text,
        rungs=RUNGS, slopes=True,
    )  # fmt: skip
    return study, runner


def search_within(lab: Lab, space: Space) -> None:
    """Rounds of trials until the tokens are spent."""
    study, runner = laboratory(lab, space)
    count = len(study.get_trials(deepcopy=False))
    while count and lab.left >= count * sum(RUNGS):
        before = runner.spent
        runner.step(count)
        runner.measure_slopes(lab.left - (runner.spent - before) - ROUND * RUNGS[-1])
        lab.spent += runner.spent - before
        best = min(
            (t for t in finished(study) if t.state == TrialState.COMPLETE),
            key=lambda t: (t.user_attrs["scores"]["kl"], t.number),
        )
        lab.offer(space.candidate(best.params))
        count = min(ROUND, lab.left // sum(RUNGS))


def _all(lab: Lab) -> None:
    search_within(lab, restricted(lab))


def _portable(lab: Lab) -> None:
    search_within(lab, restricted(lab, only=PORTABLE))


OURS: dict[str, Method] = {
    "moefit": Method("moefit", _all, "search.run", True, "experts, top-k, types", False),
    "moefit-portable": Method(
        "moefit-portable", _portable, "search.run --runtime llama.cpp", True, "experts, top-k, types", False
    ),
}
"""The search itself: any runtime, and what stock llama.cpp runs."""
