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
from spaces.quant_types import LADDER
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
    """

    prune: bool = True
    activate: bool = True
    only: str = RAGGED
    one: str = ""

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
        return whole if self.prune else whole[-1:]

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


def _space(
    lab: Lab, prune: bool = True, activate: bool = True, one: str = "", only: str = RAGGED
) -> Restricted:
    return Restricted(
        lab.inventory, lab.space.rankings, "any", sets=lab.space.sets,
        prune=prune, activate=activate, only=only, one=one,
    )  # fmt: skip


def _costs(lab: Lab, space: Space) -> CostModel:
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
    space = space or _space(lab)
    model, form = _costs(lab, space), space.forms[0]
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


def _search(lab: Lab, space: Space) -> None:
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
    _search(lab, _space(lab))


def _portable(lab: Lab) -> None:
    _search(lab, _space(lab, only=PORTABLE))


def _types(lab: Lab) -> None:
    _search(lab, _space(lab, prune=False, activate=False))


def _experts_types(lab: Lab) -> None:
    _search(lab, _space(lab, activate=False))


def _types_top_k(lab: Lab) -> None:
    _search(lab, _space(lab, prune=False))


def _one_type(lab: Lab, prune: bool, activate: bool) -> None:
    """A search at one type for all tensors: the types are tried on few tokens, the best goes on."""
    tried = []
    for name in LADDER:
        space = _space(lab, prune, activate, name)
        try:
            allocator = Allocator(
                space, _costs_of_one(lab, space), Carry(lab.inventory, lab.inventory), lab.limit
            )
            start = space.candidate(allocator.best(allocator.model.costs, space.forms[-1]))
        except InfeasibleError:
            continue
        tried.append((lab.mean([start], 1024)[0], name))
    if not tried:
        raise Unreachable(f"no single type fits {lab.limit:,} bytes with these levers")
    _search(lab, _space(lab, prune, activate, min(tried)[1]))


def _costs_of_one(lab: Lab, space: Space) -> CostModel:
    """Costs of counts alone: with one type there is nothing else to choose."""
    before = lab.spent
    model = _costs(lab, space)
    lab.spent = before  # the search itself pays for them
    return model


def _experts(lab: Lab) -> None:
    _one_type(lab, prune=True, activate=False)


def _top_k(lab: Lab) -> None:
    _one_type(lab, prune=False, activate=True)


def _experts_top_k(lab: Lab) -> None:
    _one_type(lab, prune=True, activate=True)


OURS: dict[str, Method] = {
    "moefit": Method("moefit", _all, "search.run", True, "experts, top-k, types", False),
    "moefit-portable": Method(
        "moefit-portable", _portable, "search.run --runtime llama.cpp", True, "experts, top-k, types", False
    ),
}
"""The search itself: any runtime, and what stock llama.cpp runs."""

ABLATION: dict[str, Method] = {
    name: Method(name, run, "this project's search", True, name.removeprefix("only "), False)
    for name, run in (
        ("only experts", _experts),
        ("only top-k", _top_k),
        ("only types", _types),
        ("only experts, top-k", _experts_top_k),
        ("only types, top-k", _types_top_k),
        ("only experts, types", _experts_types),
    )
}
"""The same search with levers forbidden; without types, one type for all tensors."""
