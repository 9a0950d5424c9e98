"""The exact knapsack on KL measured one option at a time.

Method: several tools price every (tensor, type) by itself and add the prices up. HIGGS (arXiv 2411.17525)
measures the rise of perplexity or KL with one layer's error and solves the multiple-choice knapsack;
AutoScheme (github.com/intel/auto-round) solves it exactly by dynamic programming on a
first-order price; auto_quantize of github.com/NVIDIA/Model-Optimizer has `kl_div`, one forward
pass per (layer, format) against the uncompressed model. This is their common form in its
strongest version: true KL of each option alone, the exact optimum, and exact file bytes.

Deviations:

* A handful of types per tensor is measured, the others are interpolated in (log error, log KL) by
  `search.costs.CostModel`, where HIGGS takes damage as linear in error and the others measure all formats.
* All routed experts of a layer and role are one decision, as in those tools and in GGUF.
* None of them prunes. Where even the smallest types do not fit, experts are pruned by REAP to the count that
  is best with uniform types (`reap_grid`); prices stay those of the unpruned model.
* No final choice among several solutions: none of them runs the model on what was solved for.
"""

from __future__ import annotations

from experiments.baselines.lab import Lab
from experiments.baselines.method import affordable, candidate_of, room, sizes
from experiments.baselines.simple import count_for_types
from search.costs import CostModel, Option
from spaces.allocation import OptionClass, solve

COST_TOKENS = 1024
_EXPERT_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "Q4_K")  # where most bytes are decided
_OTHER_TYPES = ("IQ1_S", "IQ3_XXS", "Q5_K")
_SHORT_TYPES = ("IQ4_NL", "Q8_0")  # of rows that are no multiples of 256


def measured_options(lab: Lab) -> list[Option]:
    """The (tensor, type) options that are measured: two to six types of each tensor."""
    out: list[Option] = []
    for t in lab.inventory.quantizable:
        wanted = _SHORT_TYPES if t.row % 256 else _EXPERT_TYPES if t.per_expert else _OTHER_TYPES
        ladder = lab.space.ladder(t)
        out += [(t.name, q) for q in [q for q in ladder if q in wanted] or ladder]
    return out


def measure(lab: Lab) -> CostModel:
    """Prices of all types; costs `COST_TOKENS` for each measured option, or less if short of them."""
    options = measured_options(lab)
    return CostModel(lab.space, lab.costs(options, affordable(lab, len(options), COST_TOKENS)), lab.errors)


def cheapest(lab: Lab, model: CostModel, kept: int) -> dict[str, str]:
    """The types with the least sum of prices that fit at an expert count."""
    tensors, of = lab.inventory.quantizable, sizes(lab, kept)
    classes = [
        OptionClass(of[t.name], model.costs[[model.index[t.name, q] for q in lab.space.ladder(t)]])
        for t in tensors
    ]
    found = solve(classes, room(lab, kept))
    return {t.name: lab.space.ladder(t)[i] for t, i in zip(tensors, found.choice, strict=True)}


def kl_knapsack(lab: Lab) -> None:
    """The optimum for measured prices."""
    kept = count_for_types(lab)
    lab.offer(candidate_of(lab, cheapest(lab, measure(lab), kept), kept))
