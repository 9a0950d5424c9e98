"""The same search with levers forbidden, or decided one after the other as the paper does.

A forbidden lever stays where the model has it: all experts, its own top-k. Without types
as a lever all tensors take one type, the best of those that fit.
"""

from __future__ import annotations

import math

from experiments.baselines.lab import Lab
from experiments.baselines.method import Method, Unreachable
from experiments.baselines.moefit import costs_of, restricted, search_within
from experiments.baselines.simple import PAPER_RATIO, best_of_grid
from search.allocator import Allocator
from search.costs import CostModel
from spaces.allocation import InfeasibleError
from spaces.carry import Carry
from spaces.quant_types import LADDER
from spaces.space import Space


def _types(lab: Lab) -> None:
    search_within(lab, restricted(lab, prune=False, activate=False))


def _experts_types(lab: Lab) -> None:
    search_within(lab, restricted(lab, activate=False))


def _types_top_k(lab: Lab) -> None:
    search_within(lab, restricted(lab, prune=False))


def _one_type(lab: Lab, prune: bool, activate: bool) -> None:
    """A search at one type for all tensors: the types are tried on few tokens, the best goes on."""
    tried = []
    for name in LADDER:
        space = restricted(lab, prune, activate, name)
        try:
            allocator = Allocator(
                space, _costs_of_counts(lab, space), Carry(lab.inventory, lab.inventory), lab.limit
            )
            start = space.candidate(allocator.best(allocator.model.costs, space.forms[-1]))
        except InfeasibleError:
            continue
        tried.append((lab.mean([start], 1024)[0], name))
    if not tried:
        raise Unreachable(f"no single type fits {lab.limit:,} bytes with these levers")
    search_within(lab, restricted(lab, prune, activate, min(tried)[1]))


def _costs_of_counts(lab: Lab, space: Space) -> CostModel:
    """Costs of counts alone: with one type there is nothing else to choose."""
    before = lab.spent
    model = costs_of(lab, space)
    lab.spent = before  # the search itself pays for them
    return model


def _experts(lab: Lab) -> None:
    _one_type(lab, prune=True, activate=False)


def _top_k(lab: Lab) -> None:
    _one_type(lab, prune=False, activate=True)


def _experts_top_k(lab: Lab) -> None:
    _one_type(lab, prune=True, activate=True)


def _sequential(lab: Lab) -> None:
    """Prune, then top-k, then bits, as the paper does: three quarters of the experts stay, or what fits.

    The second stage searches active experts at the pruned model's own types and finds nothing to
    reduce where only bytes count, so it spends nothing here; the third has all the tokens.
    """
    fitting = [n for n in lab.counts_that_fit() if n <= math.ceil(PAPER_RATIO * lab.inventory.experts)]
    if not fitting:
        raise Unreachable(f"the smallest types do not fit {lab.limit:,} bytes at any expert count")
    search_within(lab, restricted(lab, activate=False, counts=(fitting[-1],)))


def _sequential_tuned(lab: Lab) -> None:
    """The same, its ratio of pruning chosen first: the best count at its largest uniform type."""
    kept = len(best_of_grid(lab).layers[0].experts)
    search_within(lab, restricted(lab, activate=False, counts=(kept,)))


ABLATION: dict[str, Method] = {
    name: Method(name, run, "this project's search", True, name.removeprefix("only "), False)
    for name, run in (
        ("only experts", _experts),
        ("only top-k", _top_k),
        ("only types", _types),
        ("only experts, top-k", _experts_top_k),
        ("only types, top-k", _types_top_k),
        ("only experts, types", _experts_types),
        ("sequential", _sequential),
        ("sequential, tuned", _sequential_tuned),
    )
}
"""The same search with levers forbidden or decided one after the other; without types, one type for all."""
