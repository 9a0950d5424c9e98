"""An integer program per layer for the experts' bits: MC-MoE.

Method (arXiv 2410.06270, github.com/Aaronhuang-778/MC-MoE): experts get 1, 2 or 3 bits, all else 4.
An expert e at b bits costs c(e, b) = freq_e * w_e^1.5 * eps(e, b): tokens routed to it and
sum of its gates, each divided by the layer's sum, and the norm of the change of the layer's
output if it alone is quantized. In every layer alike, an integer program minimizes the sum of
costs within a total of bits. (The text has eps squared; the code has it as here.)

This is the arm that GGUF can hold ("MC-layer"), since a layer's experts of one role are one
tensor with one type: costs are summed over a layer's experts for each (role, type), and the
program chooses three types per layer. Deviations:

* Bits are IQ1_S, IQ2_XS and Q3_K (HQQ and GPTQ there); what is not routed experts gets Q4_K, or the
  largest uniform type that leaves room for experts at the fewest bits.
* The layers share equally what the rest leaves, in bytes instead of bits. Since no type is above 3 bits,
  large budgets are not spent: that is its design.
* At least one expert of 3 and of 2 bits per layer: dropped, for there is one type for all.
* eps is not measured by running every layer with every expert quantized but estimated from calibration, as
  sqrt(tokens) * (mean gate * norm of output) * relative error of the role's product, by the
  imatrix of that expert. No tokens are counted for it.
* Its second part, skipping experts by their gates at run time, is no property of a file.
* It does not prune. Where the smallest types do not fit, experts as in `kl_knapsack`.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from compression import ggml
from experiments.baselines.lab import Lab
from experiments.baselines.method import Unreachable, candidate_of, room
from experiments.baselines.simple import count_for_types, ladder_of
from spaces.gguf_layout import padded
from spaces.inventory import Tensor

BITS = ("IQ1_S", "IQ2_XS", "Q3_K")
REST = "Q4_K"
_BETA = 1.5


def relative_errors(lab: Lab, tensor: Tensor, type_name: str) -> np.ndarray:
    """(experts,) sum(h * (w - q)^2) / sum(h * w^2) of each expert of a stacked tensor, h its imatrix."""
    worker = lab.worker
    part = worker.checkpoint.family.by_name[tensor.name]
    blocks = worker.bank.blocks(part.tensor, type_name)
    out = np.empty(tensor.shape[0])
    for e, h in enumerate(worker.calibration.imatrix[tensor.name]):
        w = worker.checkpoint.weights.read(part, e).reshape(-1, tensor.row)
        q = ggml.dequantize(np.ascontiguousarray(blocks[e]), type_name).reshape(w.shape)
        out[e] = ((w - q) ** 2 @ h).sum() / max(float((w**2 @ h).sum()), 1e-30)
    return out


def expert_weights(lab: Lab, layer: int) -> np.ndarray:
    """(experts,) what multiplies the relative error's root in an expert's cost."""
    at = lab.inventory.moe_layers.index(layer)
    routing = {name: value[at] for name, value in lab.worker.calibration.routing.items()}
    share = {name: routing[name] / max(float(routing[name].sum()), 1e-30) for name in ("tokens", "mass")}
    output: np.ndarray = np.sqrt(routing["tokens"]) * routing["reap"]
    return share["tokens"] * share["mass"] ** _BETA * output


def layer_types(costs: np.ndarray, size: np.ndarray, share: int) -> tuple[int, ...]:
    """The cheapest type of every role within the layer's bytes.

    Args:
        costs: (roles, types).
        size: (roles, types) bytes.
        share: Bytes the layer may take.
    """
    roles, types = costs.shape
    once = np.kron(np.eye(roles), np.ones(types))
    found = milp(
        costs.ravel() / max(float(costs.max()), 1e-30),  # the solver's tolerances are absolute
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(size.ravel() / share, -np.inf, 1)],
    )
    if found.x is None:
        raise Unreachable(f"{share:,} bytes per layer are too few for its experts")
    return tuple(int(i) for i in found.x.reshape(roles, types).argmax(1))


def rest_types(lab: Lab, kept: int) -> dict[str, str]:
    """One type, at most `REST`, for all but routed experts: the largest that leaves room for them."""
    ladder, space = ladder_of(lab), lab.space
    for type_name in reversed(ladder[: ladder.index(REST) + 1]):
        types = {
            t.name: space.nearest(t, BITS[0] if t.per_expert else type_name)
            for t in lab.inventory.quantizable
        }
        if lab.fits(candidate_of(lab, types, kept)):
            return {t.name: types[t.name] for t in lab.inventory.quantizable if not t.per_expert}
    raise Unreachable(f"experts at {BITS[0]} leave no room within {lab.limit:,} bytes")


def mc_moe(lab: Lab) -> None:
    """One integer program per layer."""
    kept = count_for_types(lab)
    types = rest_types(lab, kept)
    by_name = lab.inventory.by_name
    left = room(lab, kept) - sum(padded(by_name[n].bytes(t)) for n, t in types.items())
    share = left // len(lab.inventory.moe_layers)
    for layer in lab.inventory.moe_layers:
        experts = list(lab.space.experts(layer, kept, "reap"))
        weights = expert_weights(lab, layer)[experts]
        stacked = [t for t in lab.inventory.quantizable if t.per_expert and t.layer == layer]
        bits = [[lab.space.nearest(t, b) for b in BITS] for t in stacked]
        costs = [
            [float(weights @ np.sqrt(relative_errors(lab, t, b)[experts])) for b in choices]
            for t, choices in zip(stacked, bits, strict=True)
        ]
        size = [[padded(t.bytes(b, kept)) for b in choices] for t, choices in zip(stacked, bits, strict=True)]
        chosen = layer_types(np.array(costs), np.array(size, float), share)
        types |= {t.name: bits[i][chosen[i]] for i, t in enumerate(stacked)}
    lab.offer(candidate_of(lab, types, kept))
