"""Gradients into slopes: their products with what each choice would change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compression import ggml
from compression.candidate_model import CandidateModel
from compression.families.parts import Part
from spaces.space import Space

if TYPE_CHECKING:
    from torch import Tensor

_HELD = 2**28  # weights of gradient held at once, float32

Option = tuple[str, str | int | tuple[int, str]]
"""A decision and one of its choices, as in `search.costs`."""


@dataclass(frozen=True)
class Slope:
    """Change of mean KL, nats per token, if one decision took another choice.

    Attributes:
        first: grad KL . d.
        second: d' F d / 2; never negative.
    """

    first: float
    second: float


class Projection:
    """Sums products of gradients and changes; gradients are held until enough are there for one product.

    Args:
        model, space: Whose tensors, and which types of them.
        types: The type each tensor has where gradients are taken.
        windows: Of the text.
        length: Tokens of a window.
    """

    def __init__(
        self, model: CandidateModel, space: Space, types: Mapping[str, str | None], windows: int, length: int
    ) -> None:
        self.model, self.space, self.types = model, space, types
        self.windows, self.length = windows, length
        self._held: dict[str, list[tuple[bool, Tensor]]] = {}
        self._size = 0
        self._first: dict[Option, float] = {}
        self._second: dict[Option, tuple[float, int]] = {}

    def add(self, part: Part, gradient: Tensor, *, drawn: bool) -> None:
        """Notes one window's gradient, (weights,): KL's own, or of labels drawn."""
        self._held.setdefault(part.name, []).append((drawn, gradient))
        self._size += gradient.numel()
        if self._size > _HELD:
            self.flush()

    def flush(self) -> None:
        """Projects what is held."""
        import torch

        for name, rows in self._held.items():
            part = self.model.family.by_name[name]
            gradients, drawn = torch.stack([g for _, g in rows]), np.array([d for d, _ in rows])
            here = self._values(part, self.types[name])
            for type_name in self.space.ladder(part.tensor):
                products = (gradients @ (self._values(part, type_name) - here)).double().numpy()
                self.note((name, type_name), products[~drawn], products[drawn])
        self._held.clear()
        self._size = 0

    def note(self, option: Option, own: np.ndarray, drawn: np.ndarray) -> None:
        """Adds products of a change with KL's own gradients, and with those of drawn labels."""
        self._first[option] = self._first.get(option, 0.0) + float(own.sum())
        total, count = self._second.get(option, (0.0, 0))
        self._second[option] = total + float(np.square(drawn).sum()), count + drawn.size

    def slopes(self) -> dict[Option, Slope]:
        """The slope of every option noted."""
        self.flush()
        out = {}
        for option, first in self._first.items():
            total, count = self._second[option]
            second = total / count / (2 * self.length) if count else 0.0
            out[option] = Slope(first / (self.windows * self.length), second)
        return out

    def _values(self, part: Part, type_name: str | None) -> Tensor:
        """(weights,) of a tensor in a type; None: uncompressed."""
        import torch

        if type_name is not None:
            values = ggml.dequantize(self.model.bank.blocks(part.tensor, type_name), type_name)
        elif part.stacked:
            read = self.model.weights.read
            values = np.stack([read(part, e) for e in range(part.tensor.shape[0])])
        else:
            values = self.model.weights.read(part)
        return torch.from_numpy(np.array(values, np.float32)).view(-1)
