"""Blocks are those of ggml's own quantizers, and input that would kill ggml is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from compression import ggml
from spaces.quant_types import (
    IGNORES_IMATRIX,
    LADDER,
    QUANT_TYPES,
    REQUIRES_IMATRIX,
    SHORT_LADDER,
    quant_type,
)

EVERY_TYPE = tuple(dict.fromkeys((*LADDER, *SHORT_LADDER, "Q4_0", "Q4_1", "Q5_1", "F16", "F32")))
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")  # ggml builds tables first, 2 to 10 CPU seconds
LATER = (pytest.mark.slow, pytest.mark.timeout(3000))
PORTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def importance(row: int) -> np.ndarray:
    return np.random.default_rng(1).lognormal(0, 2, row).astype(np.float32)


@pytest.mark.parametrize("type_name", PORTED)
def test_blocks_are_those_of_the_gguf_package(type_name: str) -> None:
    weights = normal(2, 3, 64)
    blocks = ggml.quantize(weights, type_name)
    assert blocks.dtype == np.uint8
    assert blocks.shape == (2, 3, quant_type(type_name).row_bytes(64))
    expected = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[type_name])
    assert np.array_equal(blocks, expected.view(np.uint8))


@pytest.mark.parametrize("type_name", EVERY_TYPE)
def test_values_are_those_of_the_gguf_package(type_name: str) -> None:
    size = quant_type(type_name).row_bytes(256)
    blocks = np.random.default_rng(2).integers(0, 256, (4, 8, size), np.uint8)
    values = ggml.dequantize(blocks, type_name)
    assert values.dtype == np.float32
    assert values.shape == (4, 8, 256)
    raw = blocks.view(np.float32) if type_name == "F32" else blocks
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    assert np.isfinite(values).mean() > 0.5
    assert np.array_equal(values, expected, equal_nan=True)


@pytest.mark.parametrize("type_name", [pytest.param(t, marks=LATER) if t in SLOW else t for t in EVERY_TYPE])
def test_values_are_close_to_the_weights(type_name: str) -> None:
    weights = normal(2, 4, 256)
    values = ggml.dequantize(ggml.quantize(weights, type_name, importance(256)), type_name)
    error = float(np.linalg.norm(values - weights) / np.linalg.norm(weights))
    # Three times the rate-distortion bound of a Gaussian source, and the rounding of BF16.
    assert error < 3 * 2.0 ** -quant_type(type_name).bits_per_weight + 2e-3


@pytest.mark.parametrize("type_name", ["BF16", "F32"])
def test_numbers_a_type_can_hold_come_back_unchanged(type_name: str) -> None:
    exact = normal(3, 64).view(np.uint32) & np.uint32(0xFFFF0000)
    weights = exact.view(np.float32)
    assert np.array_equal(ggml.dequantize(ggml.quantize(weights, type_name), type_name), weights)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q2_K", "Q4_K", "IQ4_XS", "IQ3_XXS"])
def test_an_imatrix_moves_the_error_to_columns_that_matter_less(type_name: str) -> None:
    weights, weight = normal(16, 256), importance(256)

    def error(imatrix: np.ndarray | None) -> float:
        values = ggml.dequantize(ggml.quantize(weights, type_name, imatrix), type_name)
        return float((weight * (values - weights) ** 2).sum())

    assert error(weight) < 0.9 * error(None)


@pytest.mark.parametrize("type_name", sorted(IGNORES_IMATRIX))
def test_types_said_to_ignore_an_imatrix_do(type_name: str) -> None:
    weights = normal(4, 256)
    assert np.array_equal(
        ggml.quantize(weights, type_name), ggml.quantize(weights, type_name, importance(256))
    )


def test_every_row_is_quantized_by_itself() -> None:
    weights = normal(3, 2, 256)
    whole = ggml.quantize(weights, "Q4_K", importance(256))
    for i, j in np.ndindex(3, 2):
        assert np.array_equal(whole[i, j], ggml.quantize(weights[i, j], "Q4_K", importance(256)))


def test_views_that_are_not_contiguous_are_read_as_they_look() -> None:
    weights = normal(64, 4).T
    assert np.array_equal(ggml.quantize(weights, "Q8_0"), ggml.quantize(weights.copy(), "Q8_0"))
    blocks = ggml.quantize(normal(8, 64), "Q8_0")
    assert np.array_equal(ggml.dequantize(blocks[::2], "Q8_0"), ggml.dequantize(blocks, "Q8_0")[::2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.1e4, -1e30, 1e39])
@pytest.mark.parametrize("type_name", ["Q8_0", "IQ3_S", "BF16"])
def test_weights_ggml_cannot_take_are_refused(type_name: str, bad: float) -> None:
    weights = normal(2, 256).astype(np.float64)
    weights[1, 200] = bad
    with (
        np.errstate(over="ignore"),
        pytest.raises(ValueError, match="weights must be finite and at most 30000"),
    ):
        ggml.quantize(weights, type_name, importance(256))


@pytest.mark.parametrize("type_name", [t for t in EVERY_TYPE if QUANT_TYPES[t].block > 1])
@pytest.mark.parametrize("off", [-1, 1])
def test_rows_of_broken_blocks_are_refused(type_name: str, off: int) -> None:
    row = QUANT_TYPES[type_name].block + off
    with pytest.raises(ValueError, match=f"multiple of {QUANT_TYPES[type_name].block} weights .* got {row}"):
        ggml.quantize(normal(2, row), type_name, np.ones(row, np.float32))


@pytest.mark.parametrize("type_name", sorted(REQUIRES_IMATRIX))
def test_a_missing_imatrix_is_refused_where_ggml_would_abort(type_name: str) -> None:
    with pytest.raises(ValueError, match=f"{type_name} needs an imatrix"):
        ggml.quantize(normal(1, 256), type_name)


@pytest.mark.parametrize(
    "imatrix",
    [
        np.ones(255), np.ones(512), np.ones((1, 256)), np.float32(1), np.full(256, np.nan),
        np.full(256, np.inf), np.full(256, -1e-9), np.full(256, 1e39),
    ],
)  # fmt: skip
@pytest.mark.parametrize("type_name", ["Q4_K", "IQ2_XXS"])
def test_a_bad_imatrix_is_refused(type_name: str, imatrix: np.ndarray) -> None:
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="imatrix must be 256 finite"):
        ggml.quantize(normal(2, 256), type_name, imatrix)


@pytest.mark.parametrize("call", [lambda x: ggml.quantize(x, "Q9"), lambda x: ggml.dequantize(x, "Q9")])
def test_an_unknown_type_is_refused(call: object) -> None:
    with pytest.raises(ValueError, match="unknown quantization type 'Q9'"):
        call(np.zeros((1, 32), np.float32))  # type: ignore[operator]


def child(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where an abort of ggml does no harm."""
    prelude = "import numpy as np\nfrom compression import ggml\nfrom spaces.quant_types import *\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "types",
    [
        tuple(t for t in EVERY_TYPE if t not in SLOW),
        pytest.param(SLOW, marks=LATER),
    ],
)
def test_extreme_input_that_is_allowed_neither_aborts_nor_overflows(types: tuple[str, ...]) -> None:
    done = child(
        f"types = {types}"
        """
rng = np.random.default_rng(0)
x, h = rng.standard_normal((2, 256)).astype(np.float32), rng.random(256).astype(np.float32)
one = np.zeros_like(x); one[:, 5] = 1; spiked = 1e-6 * x; spiked[:, 5] = 3e4
half = h.copy(); half[::2] = 0; spike = np.full(256, 1e-12, np.float32); spike[3] = 1e12
inputs = {"largest": np.sign(x) * 3e4, "tiny": 1e-30 * x, "denormal": 1e-42 * x, "zero": 0 * x,
          "constant": 0 * x + 0.37, "one": one, "spiked": spiked}
cases = [(n, v, h) for n, v in inputs.items()]
cases += [("imatrix", x, m) for m in (0 * h, half, spike, 1e-38 * h, 1e18 * h)]
for t in types:
    for n, v, m in cases:
        y = ggml.dequantize(ggml.quantize(v, t, m), t)
        assert np.isfinite(y).all(), (t, n)
        # One column that outweighs all others may cost those any accuracy.
        assert n == "imatrix" or np.abs(y).max() <= 2 * np.abs(v).max() + 1e-6, (t, n, np.abs(y).max())
print("fine")
"""
    )
    assert done.stdout == "fine\n", done.stderr[-500:]


def test_an_imatrix_too_large_for_sums_is_refused() -> None:
    with pytest.raises(ValueError, match="imatrix"):
        ggml.quantize(normal(1, 256), "Q4_K", np.full(256, 1e38))


NOT_FOR_WEIGHTS = ("I8", "I32", "F64", "Q8_K", "Q8_1")


@pytest.mark.parametrize("type_name", NOT_FOR_WEIGHTS)
def test_blocks_of_a_type_that_is_not_for_weights_are_refused(type_name: str) -> None:
    with pytest.raises(ValueError, match=type_name):
        ggml.dequantize(np.zeros((1, quant_type(type_name).row_bytes(256)), np.uint8), type_name)


def test_quantizing_to_a_type_that_is_not_for_weights_is_refused() -> None:
    done = child(f"""
for t in {NOT_FOR_WEIGHTS}:
    try:
        ggml.quantize(np.ones((1, 256)), t)
    except ValueError:
        print("refused")
""")
    assert done.stdout == "refused\n" * len(NOT_FOR_WEIGHTS), done.stderr[-500:]
