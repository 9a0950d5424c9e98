"""What the output of a MoE layer loses when only some of its experts stay, computed for many sets.

The error of a kept set S is the sum over tokens of ||moe(x; S, k) - moe(x; all, k)||^2.
All experts' outputs on all tokens are computed once, projected to few dimensions by a
fixed Gaussian matrix, which keeps squared norms (Johnson-Lindenstrauss). Who gets which
gate is asked of the model's own router, restricted as in the pruned model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compression.candidate_model import CandidateModel

if TYPE_CHECKING:
    from torch import Tensor

DIMENSIONS = 128
"""Of the projection, at most."""

_TOGETHER = 512  # tokens run through an expert at once
_SAME = 1e-5  # of the largest gate


@dataclass(frozen=True)
class State:
    """A kept set on every token.

    Attributes:
        experts: Those kept, ascending.
        gates: (tokens, experts of the layer), 0 where an expert is not used.
        error: (tokens, dimensions) projected difference of the output.
        squares: (tokens,) its squared norms.
    """

    experts: tuple[int, ...]
    gates: Tensor
    error: Tensor
    squares: Tensor

    @property
    def total(self) -> float:
        return float(self.squares.double().sum())


class LayerError:
    """Errors of kept sets of one filled layer of an uncompressed model; the layer is left as it was.

    Args:
        model: The model.
        layer: The layer.
        inputs: (tokens, hidden) states that enter its router and its experts.

    Attributes:
        base: All experts kept.
    """

    def __init__(self, model: CandidateModel, layer: int, inputs: Tensor) -> None:
        import torch

        whole = model.inventory
        self.router, self.inputs = model.shell.router(layer), inputs
        self.top_k, self.experts, self.groups = whole.top_k, whole.experts, whole.groups
        self.outputs = _outputs(model.shell.expert_module(layer), inputs, whole.experts)
        self.norms = self.outputs.square().sum(-1)
        self._first = torch.arange(len(inputs)) * whole.experts  # places of a token's outputs
        self.target = torch.zeros(len(inputs), self.outputs.shape[-1])
        everyone = self.state(range(whole.experts))
        self.target = everyone.error
        nothing = torch.zeros_like(self.target)
        self.base = State(everyone.experts, everyone.gates, nothing, nothing[:, 0])
        # Which group a token uses depends on experts that it does not use.
        self.local = whole.groups == 1 and self._is_local()

    def _route(self, experts: Sequence[int], rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """(weights, chosen experts), each (rows, top-k), by the pruned model's router."""
        self.router.keep(None if len(experts) == self.experts else experts, self.top_k)
        try:
            _, weights, chosen = self.router.module(self.inputs[rows])
        finally:
            self.router.keep(None, self.top_k)
        return weights, chosen

    def _dense(self, weights: Tensor, chosen: Tensor) -> Tensor:
        import torch

        return torch.zeros(len(weights), self.experts).scatter(1, chosen, weights)

    def _error(self, weights: Tensor, chosen: Tensor, rows: Tensor | slice) -> Tensor:
        """(rows, dimensions) of the output's error."""
        places = chosen + self._first[rows, None]
        taken = self.outputs.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)
        return (weights[:, None] @ taken).squeeze(1) - self.target[rows]

    def state(self, experts: Sequence[int]) -> State:
        """A set on all tokens."""
        rows = slice(None)
        weights, chosen = self._route(experts, rows)
        error = self._error(weights, chosen, rows)
        return State(tuple(experts), self._dense(weights, chosen), error, error.square().sum(-1))

    def total(self, experts: Sequence[int]) -> float:
        """The error of a set."""
        rows = slice(None)
        return float(self._error(*self._route(experts, rows), rows).square().sum(-1).double().sum())

    def without(self, state: State, gone: Sequence[int]) -> float:
        """The error of a set when some of its experts leave it."""
        experts = [e for e in state.experts if e not in gone]
        if not self.local:
            return self.total(experts)
        rows = (state.gates[:, list(gone)] != 0).any(1).nonzero()[:, 0]
        squares = self._error(*self._route(experts, rows), rows).square().sum(-1)
        return state.total + float((squares.double() - state.squares[rows].double()).sum())

    def _is_local(self) -> bool:
        """Whether a token keeps its gates when an expert it does not use goes.

        False where gates, or what a selection bias is added to, are a softmax over all experts.
        """
        gates = self.base.gates
        e = int((gates != 0).sum(0).argmax())
        rows = (gates[:, e] == 0).nonzero()[:, 0]
        if not len(rows):
            return False
        found = self._dense(*self._route([i for i in range(self.experts) if i != e], rows))
        return bool((found - gates[rows]).abs().max() <= _SAME * gates.max())

    def shares(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """What the error would change by if an expert's share alone went, or came as in the model.

        Returns:
            Two (experts of the layer,): for going and for coming. What fills a freed place, or leaves
            for a new expert, is not counted.
        """
        import torch

        along = 2 * torch.einsum("td,ted->te", state.error, self.outputs)
        base = self.base.gates
        going = (state.gates.square() * self.norms - state.gates * along).double().sum(0)
        coming = (base.square() * self.norms + base * along).double().sum(0)
        return going.numpy(), coming.numpy()


def _outputs(experts: Any, inputs: Tensor, count: int) -> Tensor:
    """(tokens, experts, dimensions) projected outputs of every expert on every token."""
    import torch

    hidden = inputs.shape[-1]
    size = min(hidden, DIMENSIONS)
    generator = torch.Generator().manual_seed(0)
    projection = torch.eye(hidden)
    if size < hidden:
        projection = torch.randn(hidden, size, generator=generator) / size**0.5
    out = torch.empty(len(inputs), count, size)
    for start in range(0, len(inputs), _TOGETHER):
        x = inputs[start : start + _TOGETHER]
        for e in range(count):
            alone = experts(x, torch.full((len(x), 1), e), torch.ones(len(x), 1))
            out[start : start + _TOGETHER, e] = alone @ projection
    return out
