"""Quantizing with error feedback between columns, in any GGUF type, by ggml's own quantizer.

ggml rounds the weights of a row as if the inputs they multiply had nothing to do with each
other. They do: the damage to a row's outputs is (q - w) H (q - w)^T, H the mean of x^T x,
and an error in one column can be made up for in those that correlate with it, which is what
GPTQ (arXiv 2210.17323) does column by column. A GGUF row is no such sequence: blocks of up
to 256 columns share their scales. So a block is quantized again as a whole, a few columns of
what ggml is given moved each time to where the other columns' errors want them, and a row
takes the new block only if that lowers the damage.
"""

from __future__ import annotations

import numpy as np

from compression import ggml
from spaces.quant_types import quant_type

_COLUMNS = 32  # moved at once
_RIDGE = 1e-6  # of the mean diagonal: keeps the columns' own matrix invertible
_REACH = 2.0  # targets stay within this many times the row's largest weight
_LARGEST = 3e4  # that `ggml.quantize` takes
_ENOUGH = 1e-3  # a round that gains less, of the whole error, is the last

# How far towards its optimum a target moves, by round: all the way overshoots, since the columns that
# follow answer to what it became.
_STRENGTH = (0.5, 0.6, 0.7, 0.8)


def quantize_with_feedback(
    weights: np.ndarray,
    type_name: str,
    imatrix: np.ndarray | None,
    hessian: np.ndarray,
    rounds: int = 4,
) -> np.ndarray:
    """Packs rows of weights into blocks, no row worse by `feedback_error` than ggml's own.

    Takes about `rounds` * 8 times as long as `ggml.quantize`.

    Args:
        weights: (..., row) float32.
        type_name: GGUF type; those of single numbers (F32, F16, BF16) have nothing to feed back.
        imatrix: (row,) mean squared input per column, as `ggml.quantize` takes it.
        hessian: (row, row) symmetric, mean of x^T x.
        rounds: Times every column is visited, at most.

    Returns:
        (..., row bytes) uint8.

    Raises:
        ValueError: What `ggml.quantize` refuses, or a Hessian of another shape or not finite.
    """
    row = weights.shape[-1]
    if hessian.shape != (row, row) or not np.isfinite(hessian).all():
        raise ValueError(f"hessian must be finite and {row} x {row}, got {hessian.shape}")
    plain = ggml.quantize(weights, type_name, imatrix)
    if quant_type(type_name).block == 1 or not weights.size:
        return plain
    rows = _Rows(weights.reshape(-1, row), type_name, imatrix, hessian, plain.reshape(-1, plain.shape[-1]))
    for i in range(rounds):
        before, gain = rows.damage().sum(), 0.0
        for block in range(rows.count):
            gain += rows.visit(block, _STRENGTH[min(i, len(_STRENGTH) - 1)])
        if gain <= _ENOUGH * before:
            break
    return rows.better().reshape(plain.shape)


def feedback_error(
    weights: np.ndarray, blocks: np.ndarray, type_name: str, hessian: np.ndarray
) -> np.ndarray:
    """(...) float64: (q - w) H (q - w)^T of each row, q what (..., row bytes) blocks hold."""
    error = ggml.dequantize(blocks, type_name).astype(np.float64) - weights
    return damage(error, hessian)


def damage(error: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """(...) float64: e H e^T of (..., row) errors."""
    wide = np.asarray(error, np.float64)
    return np.asarray(np.einsum("...i,...i->...", wide @ hessian.astype(np.float64), wide))


class _Rows:
    """Rows being quantized: their blocks so far, errors, and what ggml was given to make them."""

    def __init__(
        self,
        weights: np.ndarray,
        type_name: str,
        imatrix: np.ndarray | None,
        hessian: np.ndarray,
        plain: np.ndarray,
    ) -> None:
        self.type_name, self.imatrix, self.plain = type_name, imatrix, plain
        kind = quant_type(type_name)
        self.width, self.bytes, self.count = kind.block, kind.size, weights.shape[-1] // kind.block
        self.weights, self.hessian = weights.astype(np.float64), hessian.astype(np.float64)
        self.blocks, self.targets = plain.copy(), self.weights.copy()
        self.limit = np.minimum(_REACH * np.abs(self.weights).max(-1, keepdims=True), _LARGEST)
        self.errors = ggml.dequantize(plain, type_name) - self.weights
        self.first = self.damage()

    def damage(self) -> np.ndarray:
        return damage(self.errors, self.hessian)

    def better(self) -> np.ndarray:
        """The blocks; ggml's own where rounding of sums made a loss look like a gain."""
        return np.where((self.damage() < self.first)[:, None], self.blocks, self.plain)

    def visit(self, block: int, strength: float) -> float:
        """Quantizes one block of every row again, some columns moved at a time; returns what was gained."""
        where = slice(block * self.width, (block + 1) * self.width)
        stored = slice(block * self.bytes, (block + 1) * self.bytes)
        own, weights, start = self.hessian[where, where], self.weights[:, where], self.errors[:, where].copy()
        slope = self.errors @ self.hessian[:, where]  # half the damage's, at the start
        imatrix = None if self.imatrix is None else self.imatrix[where]
        targets, change, best = self.targets[:, where].copy(), np.zeros_like(start), np.zeros(len(start))
        for first in range(0, self.width, _COLUMNS):
            some = slice(first, first + _COLUMNS)
            square = own[some, some]
            pull = slope[:, some] + change @ own[:, some] - (start + change)[:, some] @ square
            if not pull.any():  # nothing correlates
                continue
            ridge = _RIDGE * np.trace(square) / len(square) + np.finfo(np.float64).tiny
            step = strength * np.linalg.solve(square + ridge * np.eye(len(square)), pull.T).T
            targets[:, some] = np.clip(weights[:, some] - step, -self.limit, self.limit)
            made = ggml.quantize(targets.astype(np.float32), self.type_name, imatrix)
            change = ggml.dequantize(made, self.type_name) - weights - start
            cost = np.einsum("ij,ij->i", change, 2 * slope + change @ own)
            won = cost < best
            best[won] = cost[won]
            self.blocks[won, stored] = made[won]
            self.errors[won, where] = (start + change)[won]
            self.targets[won, where] = targets[won]
        return float(-best.sum())
