"""GGUF quantization types: what a row costs and which rows a type takes.

A type packs blocks of `block` weights into `size` bytes; sizes come from
`gguf.GGML_QUANT_SIZES`, the format's own table.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf

from spaces.errors import unknown


@dataclass(frozen=True)
class QuantType:
    """One GGUF type: `size` bytes for `block` consecutive weights of a row."""

    name: str
    id: int
    block: int
    size: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size / self.block

    def fits(self, row: int) -> bool:
        """Whether rows of `row` weights divide into whole blocks."""
        return row % self.block == 0

    def row_bytes(self, row: int) -> int:
        """Bytes of one row of `row` weights.

        Raises:
            ValueError: The row is not a whole number of blocks.
        """
        if not self.fits(row):
            raise ValueError(f"a row must be a multiple of {self.block} weights for {self.name}, got {row}")
        return row // self.block * self.size


QUANT_TYPES: dict[str, QuantType] = {
    t.name: QuantType(t.name, int(t), block, size) for t, (block, size) in gguf.GGML_QUANT_SIZES.items()
}

LADDER: tuple[str, ...] = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K",
    "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16",
)  # fmt: skip
"""Types the search chooses from, where rows are multiples of 256."""

SHORT_LADDER: tuple[str, ...] = ("IQ4_NL", "Q5_0", "Q8_0", "BF16")
"""Types for rows that are only multiples of 32."""

REQUIRES_IMATRIX = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
"""Types whose quantizer aborts without an importance matrix."""

IGNORES_IMATRIX = frozenset({"Q8_0", "F16", "BF16", "F32"})
"""Types an importance matrix does not change."""

WEIGHT_TYPES = frozenset(QUANT_TYPES) - {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
"""Types weights can be stored in; the rest are indices and intermediate results."""

# What llama-quantize falls back to when a row is not a multiple of 256 (llama-quant.cpp).
_FALLBACK = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip


def quant_type(name: str) -> QuantType:
    """The type called `name`; an unknown name is a `UserError` with the nearest one."""
    try:
        return QUANT_TYPES[name]
    except KeyError:
        raise unknown("quantization type", name, QUANT_TYPES) from None


def fitting(name: str, row: int) -> str:
    """`name`, or the type that llama-quantize falls back to for rows of `row` weights."""
    if quant_type(name).fits(row):
        return name
    short = _FALLBACK.get(name, "IQ4_NL")
    return short if QUANT_TYPES[short].fits(row) else "F16"


def ladder(row: int, allowed: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Types the search may give to rows of `row` weights, fewest bits first.

    Args:
        row: Weights of a row.
        allowed: Only these types, or what llama-quantize falls back to from them; () for all.
    """
    if allowed:
        types = {fitting(t, row) for t in allowed}
        return tuple(sorted(types, key=lambda t: (QUANT_TYPES[t].bits_per_weight, t)))
    if row % 256 == 0:
        return LADDER
    return SHORT_LADDER if row % 32 == 0 else ("BF16",)
