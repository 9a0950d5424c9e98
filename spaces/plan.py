"""A plan: what sets the size and speed of a compressed model, without saying which experts stay."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Counts and types of a compressed model.

    Attributes:
        kept: (layer, experts kept) of every MoE layer.
        top_k: (layer, experts active per token) of every MoE layer.
        types: (tensor name, GGUF type) of every tensor that may be quantized.
    """

    kept: tuple[tuple[int, int], ...]
    top_k: tuple[tuple[int, int], ...]
    types: tuple[tuple[str, str], ...]

    @property
    def portable(self) -> bool:
        """One expert count and one top-k in all layers, as stock llama.cpp needs."""
        return len({n for _, n in self.kept}) <= 1 and len({k for _, k in self.top_k}) <= 1
