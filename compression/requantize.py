"""A repair: a candidate's tensors quantized again, for the inputs they see in that candidate.

The bank quantizes every tensor in every type, so it has to be quick about it, and its
importance matrix is that of the uncompressed model. A chosen candidate has one type per
tensor: there is time to feed errors back between columns, and to weigh them by what
reaches the tensor once experts are pruned and the layers below are quantized.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compression import ggml
from compression.candidate_model import CandidateModel
from compression.error_feedback import quantize_with_feedback
from compression.hessians import Hessians
from compression.overrides import Overrides
from spaces.candidate import Candidate
from spaces.quant_types import IGNORES_IMATRIX

ROUNDS = 1
"""Of error feedback: most of the gain is in the first."""


def requantized(
    model: CandidateModel,
    candidate: Candidate,
    windows: np.ndarray,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Overrides:
    """New blocks of every tensor whose quantizer heeds its inputs.

    Args:
        model: The model; left as the candidate.
        candidate: Its experts, top-k and types.
        windows: (n, length) calibration token ids.
        rounds: Of error feedback; 0: the importance matrix alone is refreshed.
        progress: Called with (weights done, weights in all).
    """
    kept = {m.layer: m.experts for m in candidate.layers}
    hessians = Hessians(model, windows, candidate)
    parts = [model.family.by_name[name] for name, kind in candidate.types if kind not in IGNORES_IMATRIX]
    types = dict(candidate.types)
    # Layer by layer, what stands outside them last.
    parts.sort(key=lambda p: (p.tensor.layer is None, p.tensor.layer or 0))
    total = sum(p.tensor.parameters for p in parts)
    blocks: dict[str, np.ndarray] = {}
    done = 0
    for part in parts:
        name, kind = part.name, types[part.name]
        done += part.tensor.parameters
        if not model.family.tied and part.tensor.role == "token_embd":
            continue  # nothing multiplies it
        hessian = hessians.of(name)
        if part.stacked:
            new = np.array(model.bank.blocks(part.tensor, kind))
            for e in kept[part.tensor.layer or 0]:
                new[e] = _quantize(model.weights.read(part, e), kind, hessian[e], rounds)
        else:
            new = _quantize(model.weights.read(part), kind, hessian, rounds)
        blocks[name] = new
        progress(done, total)
    return Overrides(candidate.key, blocks)


def _quantize(weights: np.ndarray, kind: str, hessian: np.ndarray, rounds: int) -> np.ndarray:
    imatrix = np.diagonal(hessian)
    if rounds:
        return quantize_with_feedback(weights, kind, imatrix, hessian, rounds)
    return ggml.quantize(weights, kind, imatrix)
