"""Muon for the matrices of the blocks, AdamW for the rest, fp32 masters under bf16 weights.

Muon (https://kellerjordan.github.io/posts/muon, 2024) replaces a matrix's
momentum by its nearest semi-orthogonal matrix, through five Newton-Schulz
steps. Stacked experts are orthogonalised as a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315  # quintic that maps singular values in (0, 1] to about 1


def orthogonalize(matrix: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix of each (..., rows, columns) matrix, in bf16."""
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Optimizer:
    """One step for a `Network`; `state_dict` holds all that a resumed run needs.

    Of several ranks each updates the weights it owns and sends them to the others.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        muon_rate: float,
        adam_rate: float,
        decay: float,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.muon_rate, self.adam_rate, self.decay = muon_rate, adam_rate, decay
        self.rank, self.ranks = rank, ranks
        self.parameters = dict(network.named_parameters())
        self.master = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        self.first = {n: torch.zeros_like(m) for n, m in self.master.items()}
        self.second = {n: torch.zeros_like(m) for n, m in self.master.items() if not self._by_muon(n, m)}
        self.steps = 0
        held, self.owner = [0] * ranks, dict.fromkeys(self.master, 0)
        for name in sorted(self.master, key=lambda n: -self.master[n].numel()):
            self.owner[name] = held.index(min(held))
            held[self.owner[name]] += self.master[name].numel()

    @staticmethod
    def _by_muon(name: str, value: Tensor) -> bool:
        return value.ndim >= 2 and name.startswith("blocks.") and not name.endswith("router")

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Applies the gradients with both learning rates times `scale`, then clears them."""
        self.steps += 1
        self._average_gradients()
        for name, parameter in self.parameters.items():
            if self.owner[name] != self.rank:
                continue
            assert parameter.grad is not None, name
            gradient, master, first = parameter.grad.float(), self.master[name], self.first[name]
            if self._by_muon(name, master):
                first.lerp_(gradient, 0.05)
                update = orthogonalize(gradient.lerp(first, 0.95)).float()
                rate = self.muon_rate * scale * max(1.0, master.shape[-2] / master.shape[-1]) ** 0.5
            else:
                second = self.second[name]
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.05)
                bias1, bias2 = 1 - 0.9**self.steps, 1 - 0.95**self.steps
                update = (first / bias1) / ((second / bias2).sqrt() + 1e-10)
                rate = self.adam_rate * scale
            if master.ndim >= 2:
                master.mul_(1 - rate * self.decay)
            master.sub_(update, alpha=rate)
            parameter.copy_(master)
        self._share(self.parameters)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _average_gradients(self) -> None:
        if self.ranks == 1:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]).float()
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient) / self.ranks)

    def _share(self, values: Mapping[str, Tensor]) -> None:
        if self.ranks > 1:
            for name, value in values.items():
                dist.broadcast(value.detach(), src=self.owner[name])

    def state_dict(self) -> dict[str, Any]:
        for values in (self.master, self.first, self.second):
            self._share(values)
        return {"master": self.master, "first": self.first, "second": self.second, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own in ("master", "first", "second"):
            for name, value in state[own].items():
                getattr(self, own)[name].copy_(value)
        self.steps = state["steps"]
        for name, parameter in self.parameters.items():
            parameter.copy_(self.master[name])
