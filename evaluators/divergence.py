"""KL divergence from the base model, perplexity and top-1 agreement.

KL(p_base || p_candidate) = sum_v p(v) (log p(v) - log q(v)), mean over tokens, in
nats. The base model's distributions are kept as its last hidden states: exact,
and `vocabulary / hidden` times smaller than logits. The standard error is over
windows, since tokens of one window are not independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compression.candidate_model import CandidateModel
from compression.files import atomic
from evaluators.texts import TextSet

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 8


@dataclass(frozen=True)
class Divergence:
    """Per-window measures of a candidate, (n,) each; the properties aggregate them."""

    kl: np.ndarray
    nll: np.ndarray
    top1: np.ndarray
    length: int
    bytes_per_token: float

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def kl_se(self) -> float:
        """Standard error of the mean KL, over windows."""
        return float(self.kl.std(ddof=1) / math.sqrt(len(self.kl))) if len(self.kl) > 1 else float("inf")

    @property
    def perplexity(self) -> float:
        return float(np.exp(min(self.nll.mean(), 700.0)))

    def scores(self) -> dict[str, float]:
        """The fields of `Scores` that this measure fills."""
        return {
            "kl": self.mean_kl,
            "kl_se": self.kl_se,
            "perplexity": self.perplexity,
            "bits_per_byte": float(self.nll.mean()) / math.log(2) / self.bytes_per_token,
            "top1": float(self.top1.mean()),
            "tokens": int(self.length * len(self.kl)),
        }


def compare(base: Tensor, logits: Tensor, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-window (KL, negative log-likelihood, top-1 agreement), each (n,).

    Args:
        base: (n, length, vocabulary) logits of the base model.
        logits: (n, length, vocabulary) logits of the candidate.
        windows: (n, length) token ids; position i predicts token i + 1.
    """
    log_p, log_q = base.log_softmax(-1), logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
    nll = -log_q[:, :-1].gather(-1, windows[:, 1:, None]).squeeze(-1).mean(-1)
    top1 = (base.argmax(-1) == logits.argmax(-1)).float().mean(-1)
    return kl, nll, top1


def base_states(model: CandidateModel, text: TextSet, path: Path) -> None:
    """Writes the uncompressed model's (n, length, hidden) float32 states to `path`, an .npy file."""
    import torch

    with torch.inference_mode():
        states = model.hidden(torch.from_numpy(text.windows.astype(np.int64)))
    with atomic(path) as stream:
        np.save(stream, states.numpy())


def measure(model: CandidateModel, text: TextSet, states: np.ndarray) -> Divergence:
    """Scores the candidate `model` currently is.

    Args:
        model: A model after `apply`.
        text: Windows to score on.
        states: (at least n, length, hidden) base states of the same windows.
    """
    import torch

    parts: list[tuple[np.ndarray, ...]] = []
    with torch.inference_mode():
        windows = torch.from_numpy(text.windows.astype(np.int64))
        hidden = model.hidden(windows)
        for start in range(0, len(windows), _BATCH):
            part = slice(start, start + _BATCH)
            base = torch.from_numpy(np.array(states[part][: len(windows[part])])) @ model.base_output.T
            parts.append(tuple(x.numpy() for x in compare(base, model.logits(hidden[part]), windows[part])))
    kl, nll, top1 = (np.concatenate(column).astype(np.float64) for column in zip(*parts, strict=True))
    return Divergence(kl, nll, top1, text.windows.shape[1], text.bytes_per_token)
