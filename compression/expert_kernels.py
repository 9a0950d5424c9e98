"""Which of transformers' expert implementations is fastest here: measured, not assumed.

Which one wins depends on the processor, the number type and the experts' shapes
(measured: grouped 2.5 times faster than eager on one model, eager ahead on
another, batched 10 to 20 times slower than both). They differ in the last bits of
their results, so that a choice between two equally fast ones must not hang on time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from compression.candidate_model import CandidateModel

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS = 512
_REPEATS = 3
_CLEARLY = 1.5
"""How many times as fast as the first implementation another one has to be to be taken."""
_TOLERANCE = 1e-3  # of the output's largest value
IMPLEMENTATIONS = ("eager", "grouped_mm")


def fastest_experts(model: CandidateModel, tokens: int = _TOKENS) -> dict[str, float]:
    """Times every implementation on the first MoE layer; sets the fastest correct one, or `eager` if close.

    An implementation that this class of experts lacks, that fails, or whose output
    is not that of `eager`, is left out.

    Returns:
        Seconds of each usable implementation, the chosen one first; {} where the model has no choice.
    """
    import torch

    layer = model.inventory.moe_layers[0]
    experts = model.shell.expert_module(layer)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, model.inventory.hidden, generator=generator)
    count, top_k = model.inventory.experts, model.inventory.top_k
    index = torch.rand(tokens, count, generator=generator).argsort(-1)[:, :top_k]
    weights = torch.full((tokens, top_k), 1 / top_k)
    taken: dict[str, float] = {}
    expected: Tensor | None = None
    before = model.model.get_experts_implementation()
    with torch.inference_mode():
        for name in IMPLEMENTATIONS:
            try:
                model.model.set_experts_implementation(name)
                seconds, output = _time(
                    experts, hidden, index, weights, limit=2 * min(taken.values(), default=1e9)
                )
            except Exception:  # kernels raise many kinds on what they do not support
                continue
            if expected is None:
                expected = output
            if float((output - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max()):
                taken[name] = seconds
    if not taken:
        model.model.set_experts_implementation(before)
        return {}
    chosen, first = min(taken, key=lambda name: taken[name]), next(iter(taken))
    if taken[first] < _CLEARLY * taken[chosen]:
        chosen = first
    model.model.set_experts_implementation(chosen)
    return {chosen: taken[chosen], **dict(sorted(taken.items(), key=lambda item: item[1]))}


def use_experts(model: CandidateModel, name: str) -> None:
    """Sets an implementation by its name."""
    model.model.set_experts_implementation(name)


def _time(
    experts: object, hidden: Tensor, index: Tensor, weights: Tensor, limit: float
) -> tuple[float, Tensor]:
    """Best of a few runs, seconds, and the output; one run where that is far too slow already."""
    best = float("inf")
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        output = experts(hidden, index, weights)  # type: ignore[operator]
        taken = time.perf_counter() - begun
        best = min(best, taken)
        if taken > limit:
            break
    return best, output
