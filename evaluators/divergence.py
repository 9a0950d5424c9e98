"""KL divergence from the base model, perplexity and top-1 agreement.

KL(p_base || p_candidate) = sum_v p(v) (log p(v) - log q(v)), mean over tokens, in
nats. The base model's distributions are kept as its last hidden states: exact,
and `vocabulary / hidden` times smaller than logits. The standard error is over
windows, since tokens of one window are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compression.candidate_model import CandidateModel
from compression.files import atomic
from evaluators.texts import TextSet

if TYPE_CHECKING:
    from torch import Tensor

_LOGITS = 2**22  # logits held at once


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


@dataclass(frozen=True)
class TokenDivergence:
    """Measures of a candidate at every position but the last, which has no next token: (n, length - 1) each.

    Position i is about token i + 1, of which a model knows i + 1 tokens before it; `base_nll` is the base
    model's negative log-likelihood, nats.
    """

    kl: np.ndarray
    nll: np.ndarray
    top1: np.ndarray
    base_nll: np.ndarray


class Reference:
    """The base model's distributions on some windows, prepared to compare many candidates with.

    Args:
        base: (n, length, vocabulary) logits of the base model.
        windows: (n, length) token ids; position i predicts token i + 1.

    Attributes:
        nll: (n, length - 1) negative log-likelihood of each next token under the base model.
    """

    def __init__(self, base: Tensor, windows: Tensor) -> None:
        import torch

        self.next = windows[:, 1:, None]
        log_p = base.log_softmax(-1)
        self.p = log_p.exp()
        self.negative_entropy = torch.linalg.vecdot(self.p, log_p)
        self.top = base.argmax(-1, keepdim=True)
        self.nll = self._nll(log_p)

    def _nll(self, log_q: Tensor) -> Tensor:
        return -log_q[:, :-1].gather(-1, self.next).squeeze(-1)

    def tokens(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per-token KL (n, length), negative log-likelihood (n, length - 1), top-1 agreement (n, length)."""
        import torch

        # sum p log p - sum p log q, not sum p (log p - log q): one pass over the vocabulary less.
        log_q = logits.log_softmax(-1)
        kl = self.negative_entropy - torch.linalg.vecdot(self.p, log_q)
        top1 = (log_q.gather(-1, self.top).squeeze(-1) == log_q.amax(-1)).float()
        return kl, self._nll(log_q), top1

    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per-window (KL, negative log-likelihood, top-1 agreement), each (n,), of the candidate's logits."""
        kl, nll, top1 = self.tokens(logits)
        return kl.mean(-1), nll.mean(-1), top1.mean(-1)


def compare(base: Tensor, logits: Tensor, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-window (KL, negative log-likelihood, top-1 agreement), each (n,).

    Args:
        base: (n, length, vocabulary) logits of the base model.
        logits: (n, length, vocabulary) logits of the candidate.
        windows: (n, length) token ids; position i predicts token i + 1.
    """
    return Reference(base, windows).compare(logits)


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

    with torch.inference_mode():
        windows = torch.from_numpy(text.windows.astype(np.int64))
        hidden = model.hidden(windows)
        parts = []
        for part, base in references(model, windows, states):
            parts.append(base.compare(model.logits(hidden[part])))
    return divergence(parts, text)


def references(
    model: CandidateModel, windows: Tensor, states: np.ndarray
) -> Iterator[tuple[slice, Reference]]:
    """The base model on a few windows at a time: (which, its distributions)."""
    import torch

    # A vocabulary's worth of logits for every position: few windows keep them in the processor's cache.
    width = model.base_output.shape[0] * windows.shape[1]
    step = max(1, _LOGITS // width)
    for start in range(0, len(windows), step):
        part = slice(start, min(start + step, len(windows)))
        base = torch.from_numpy(np.array(states[part])) @ model.base_output.T
        yield part, Reference(base, windows[part])


def divergence(parts: Sequence[tuple[Tensor, ...]], text: TextSet) -> Divergence:
    """Puts the measures of a text's windows together, a few windows each."""
    kl, nll, top1 = (
        np.concatenate([x.numpy() for x in c]).astype(np.float64) for c in zip(*parts, strict=True)
    )
    return Divergence(kl, nll, top1, text.windows.shape[1], text.bytes_per_token)


def token_divergence(
    bases: Iterable[tuple[slice, Reference]], logits: Callable[[slice], Tensor]
) -> TokenDivergence:
    """As `measure`, token by token, of whatever gives logits.

    Args:
        bases: The base model on a few windows at a time, as `references` yields them.
        logits: Gives the candidate's (n, length, vocabulary) logits of the windows of a slice.
    """
    import torch

    parts = []
    with torch.inference_mode():
        for part, base in bases:
            kl, nll, top1 = base.tokens(logits(part))
            parts.append((kl[:, :-1], nll, top1[:, :-1], base.nll))
    columns = (torch.cat(c).numpy().astype(np.float64) for c in zip(*parts, strict=True))
    return TokenDivergence(*columns)
