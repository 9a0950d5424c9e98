"""The rules anyone would try first, and those of the paper this project starts from.

`uniform`: llama-quantize with one type for every tensor, nothing pruned.

`reap_grid`: REAP (arXiv 2510.13999, github.com/CerebrasResearch/reap) prunes the experts with
the least mean gate * ||output||, equally many in every layer, in one shot; the ratio is the
user's. Here every ratio that fits is tried with the largest uniform type that then fits, and
the lowest KL wins. REAP itself neither quantizes nor chooses the ratio: the grid is ours, and
makes it stronger than as published.

`paper_rules`: arXiv 2509.25689. Experts are ranked by I = 0.5 * frequency + 0.5 * mean score
and r = 0.75 of them stay in every layer; then fewer are active; then types go by depth and role.
Where its text and its code (github.com/moxin-org/CC-MoE) leave room, read as follows:

* Top-k. The paper adjusts the number of active experts to the pruning; its formula was not to
  be had and its code has none. Taken in proportion: ceil(r * top-k), so 8 become 6 at r = 0.75.
* Depth, as in the code: routed experts of the first and last eighth of the layers get one type
  more than the base type, those between one type less. An eighth of few layers is at least one.
  The code lists neighbours per llama.cpp mix; here they are neighbours on the ladder of types,
  which agrees but for the mixes IQ2_S and IQ2_M.
* Role, as in the code for mixes of at most 2 bits: all else gets no less than a type of its own
  (`PAPER_LEAST`; the lower of two where it goes by depth).
* Budget. The largest base type that fits. The paper backs off where its plan does not fit, how
  was not to be had: first the roles' types go, then r falls to the largest that fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

from experiments.baselines.lab import Lab
from experiments.baselines.method import Unreachable, affordable, candidate_of, fitting_counts
from spaces.candidate import Candidate
from spaces.quant_types import LADDER, QUANT_TYPES
from spaces.space import Space

GRID_TOKENS = 2048
PAPER_RATIO = 0.75
PAPER_LEAST = {
    "token_embd": "Q2_K", "output": "Q5_K", "attn_q_a": "Q4_K", "attn_q_b": "Q2_K", "attn_kv_a_mqa": "Q4_K",
    "attn_k_b": "Q2_K", "attn_v_b": "Q2_K", "attn_output": "IQ3_S", "ffn_gate_shexp": "IQ3_S",
    "ffn_up_shexp": "IQ3_S", "ffn_down_shexp": "IQ4_XS",
}  # fmt: skip
_PAPER_PART = 8  # of the layers at either end


def uniform_types(space: Space, type_name: str) -> dict[str, str]:
    """One type for every tensor; rows it does not take get its fallback."""
    return {t.name: space.nearest(t, type_name) for t in space.inventory.quantizable}


def ladder_of(lab: Lab) -> list[str]:
    """All types by bits; of two with the same bits the one with less error counts as larger."""

    def error(name: str) -> float:
        return sum(lab.errors.get((t.name, name), 0.0) for t in lab.inventory.quantizable)

    return sorted(LADDER, key=lambda name: (QUANT_TYPES[name].bits_per_weight, -error(name)))


def largest(lab: Lab, make: Callable[[int], Candidate]) -> Candidate | None:
    """The candidate of the highest step on the ladder that fits."""
    for step in range(len(LADDER) - 1, -1, -1):
        candidate = make(step)
        if lab.fits(candidate):
            return candidate
    return None


def largest_uniform(lab: Lab, kept: int) -> Candidate | None:
    """`kept` experts by REAP and the largest uniform type that fits."""
    ladder = ladder_of(lab)
    return largest(lab, lambda step: candidate_of(lab, uniform_types(lab.space, ladder[step]), kept))


def uniform(lab: Lab) -> None:
    """The largest uniform type that fits; no tokens."""
    candidate = largest_uniform(lab, lab.inventory.experts)
    if candidate is None:
        raise Unreachable(f"no uniform type fits {lab.limit:,} bytes with all experts")
    lab.offer(candidate)


def best_of_grid(lab: Lab) -> Candidate:
    """The lowest KL of REAP counts, each with its largest uniform type; `GRID_TOKENS` each."""
    grid = [c for kept in fitting_counts(lab) if (c := largest_uniform(lab, kept)) is not None]
    if not grid:
        raise Unreachable(f"no uniform type fits {lab.limit:,} bytes at any expert count")
    found = lab.mean(grid, affordable(lab, len(grid), GRID_TOKENS))
    return grid[found.index(min(found))]


def reap_grid(lab: Lab) -> None:
    """The best of the grid."""
    lab.offer(best_of_grid(lab))


def count_for_types(lab: Lab) -> int:
    """How many experts a method that decides types alone keeps: all where that fits, else the grid's choice.

    Costs the grid's tokens in the second case only.
    """
    if lab.inventory.experts in fitting_counts(lab):
        return lab.inventory.experts
    return len(best_of_grid(lab).layers[0].experts)


def paper_types(space: Space, ladder: list[str], base: int, by_role: bool) -> dict[str, str]:
    """The rule of depth, and that of role if wanted, around step `base` of a ladder."""
    layers = space.inventory.layers
    edge = max(1, layers // _PAPER_PART)
    types = {}
    for t in space.inventory.quantizable:
        step = base
        if t.per_expert and t.layer is not None:
            step += 1 if t.layer < edge or t.layer >= layers - edge else -1
        elif by_role and t.role in PAPER_LEAST:
            step = max(step, ladder.index(PAPER_LEAST[t.role]))
        types[t.name] = space.nearest(t, ladder[min(max(step, 0), len(ladder) - 1)])
    return types


def paper_rules(lab: Lab) -> None:
    """The paper's rules, backed off as far as they must be; no tokens."""
    experts, ladder = lab.inventory.experts, ladder_of(lab)

    def at(step: int, kept: int, by_role: bool) -> Candidate:
        top_k = max(1, math.ceil(lab.inventory.top_k * kept / experts))
        return candidate_of(lab, paper_types(lab.space, ladder, step, by_role), kept, "paper", top_k)

    counts = [n for n in lab.space.kept_options if n <= math.ceil(PAPER_RATIO * experts)]
    for kept, by_role in itertools.product(reversed(counts), (True, False)):
        candidate = largest(lab, partial(at, kept=kept, by_role=by_role))
        if candidate is not None:
            return lab.offer(candidate)
    raise Unreachable(f"the smallest types do not fit {lab.limit:,} bytes at any expert count")
