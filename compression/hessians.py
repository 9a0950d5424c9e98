"""What error feedback weighs errors by: H = X^T X / n of a tensor's inputs, one layer at a time.

The importance matrix is the diagonal of H. Only one layer's are held, which for
stacked experts is still a (row, row) matrix of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from compression.calibrate import _observed, _Sums
from compression.candidate_model import CandidateModel
from spaces.candidate import Candidate

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01
"""Added to the diagonal, as a part of its mean: directions that no input had still cost something."""


class _Products(_Sums):
    """Running X^T X, inputs of several tensors kept once."""

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[tuple[str, ...], Tensor] = {}

    def add(self, names: tuple[str, ...], x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.products[names] = self.products.get(names, 0) + flat.T @ flat
        self.rows[names[0]] = self.rows.get(names[0], 0) + len(flat)


class _Experts:
    """Running X^T X of every expert's inputs, by the name of the parameter they enter."""

    def __init__(self, observer: Any) -> None:
        self.products: dict[tuple[str, int], Tensor] = {}
        self.rows: dict[tuple[str, int], int] = {}
        self._linear = observer._linear
        observer._linear = self

    def __call__(self, x: Tensor, name: str, expert: int) -> Tensor:
        key = (name, expert)
        self.products[key] = self.products.get(key, 0) + x.T.float() @ x.float()
        self.rows[key] = self.rows.get(key, 0) + len(x)
        out: Tensor = self._linear(x, name, expert)
        return out

    def stacked(self, name: str, count: int) -> np.ndarray:
        """(experts, row, row); an expert no token reached takes the layer's mean."""
        total = sum(p for (n, _), p in self.products.items() if n == name)
        rows = sum(r for (n, _), r in self.rows.items() if n == name)
        assert not isinstance(total, int)
        out = np.empty((count, *total.shape), np.float32)
        for e in range(count):
            seen = (name, e) in self.rows
            mean = self.products[name, e] / self.rows[name, e] if seen else total / rows
            out[e] = damped(mean.numpy())
        return out


def damped(hessian: np.ndarray) -> np.ndarray:
    """H with a part of its mean diagonal added to the diagonal."""
    add = DAMPING * float(np.trace(hessian)) / len(hessian)
    return np.asarray(hessian + np.eye(len(hessian), dtype=np.float32) * max(add, 1e-30), np.float32)


class Hessians:
    """Matrices of one layer after the other.

    Going back starts the pass anew, so that layers are best asked for in order.

    Args:
        model: The model; set anew whenever a layer is run.
        windows: (n, length) token ids of calibration.
        candidate: Whose inputs are observed, pruned and quantized as it is; None: the uncompressed model's.
    """

    def __init__(
        self, model: CandidateModel, windows: np.ndarray, candidate: Candidate | None = None
    ) -> None:
        self.model, self.windows, self.candidate = model, windows, candidate
        self._next = -1
        self._states: Tensor | None = None
        self._layer: int | None = -1
        self._held: dict[str, np.ndarray] = {}

    def of(self, name: str) -> np.ndarray:
        """(row, row) damped mean of x^T x of a quantizable tensor's inputs, (experts, row, row) if stacked.

        Raises:
            KeyError: Nothing multiplies the tensor's rows (embeddings).
        """
        layer = self.model.family.by_name[name].tensor.layer
        if self._layer != layer:
            self._held, self._layer = {}, -1  # before the next ones take their room
            self._held = self._outside() if layer is None else self._of_layer(layer)
            self._layer = layer
        return self._held[name]

    def _before(self, layer: int) -> Tensor:
        """States entering a layer."""
        import torch

        if self.candidate is None:
            self.model.reset()
        else:
            self.model.apply(self.candidate)
        if self._states is None or self._next > layer:
            self._states = self.model.embed(torch.from_numpy(self.windows.astype(np.int64)))
            self._next = 0
        self._states, self._next = self.model.run(self._states, self._next, layer), layer
        return self._states

    def _of_layer(self, layer: int) -> dict[str, np.ndarray]:
        import torch

        sums = _Products()
        with torch.inference_mode():
            states = self._before(layer)
            with self.model.held(layer), _observed(self.model, layer, sums) as observer:
                experts = None if observer is None else _Experts(observer)
                self._states, self._next = self.model.run(states, layer, layer + 1), layer + 1
        out = {
            name: matrix
            for names, product in sums.products.items()
            for matrix in [damped((product / sums.rows[names[0]]).numpy())]
            for name in names
        }
        if experts is not None:
            count = self.model.inventory.experts
            inner = experts.stacked("gate_up_proj", count)
            prefix = f"blk.{layer}.ffn_"
            out |= {f"{prefix}gate_exps.weight": inner, f"{prefix}up_exps.weight": inner}
            out[f"{prefix}down_exps.weight"] = experts.stacked("down_proj", count)
        return out

    def _outside(self) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            x = self.model.norm(self._before(self.model.inventory.layers)).flatten(0, -2)
            matrix = damped((x.T @ x / len(x)).numpy())
        return {"token_embd.weight" if self.model.family.tied else "output.weight": matrix}
