"""Scaled blocks hold scaled weights: for every type with a scale, within the rounding of fp16."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compression import ggml
from compression.block_scales import SCALED, scale_blocks
from spaces.quant_types import LADDER, SHORT_LADDER, quant_type

EVERY = pytest.mark.parametrize("type_name", sorted(SCALED))
SHAPE = (2, 3, 2)  # experts, rows, blocks per row


@cache
def blocks_of(type_name: str) -> np.ndarray:
    """(2, 3, bytes of two blocks) uint8: random bytes whose weights are of ordinary size; not writable."""
    size = quant_type(type_name).size
    random = np.random.default_rng(5).integers(0, 256, (2000, size), np.uint8)
    with np.errstate(all="ignore"):
        largest = np.abs(ggml.dequantize(random, type_name)).max(-1)
    usual = random[(largest > 0.5) & (largest < 100)]  # no NaN is
    out = usual[: int(np.prod(SHAPE))].reshape(*SHAPE[:2], SHAPE[2] * size)
    out.flags.writeable = False
    return out


def values(blocks: np.ndarray, type_name: str) -> np.ndarray:
    """(experts, rows, blocks per row, weights per block)."""
    return ggml.dequantize(blocks, type_name).reshape(*SHAPE, -1)


def right(type_name: str, factors: np.ndarray, expected: np.ndarray | None = None) -> bool:
    """Whether weights become `expected` (None: `factors`) times as large, every block's by its own."""
    blocks = blocks_of(type_name)
    wanted = values(blocks, type_name) * (factors if expected is None else expected)[..., None]
    found = values(scale_blocks(blocks, type_name, factors), type_name)
    # Two rounded factors of eleven bits, whose products may largely cancel.
    return bool((np.abs(found - wanted).max(-1) <= 2e-3 * np.abs(wanted).max(-1)).all())


def test_every_type_of_the_search_but_plain_floats_has_a_scale() -> None:
    assert {*LADDER, *SHORT_LADDER} - SCALED == {"BF16"}


@EVERY
@settings(max_examples=20, deadline=None)
@given(factors=arrays(np.float64, SHAPE, elements=st.floats(0.5, 2)))
def test_weights_are_multiplied_block_by_block(type_name: str, factors: np.ndarray) -> None:
    assert right(type_name, factors)


@EVERY
def test_each_block_has_a_factor_of_its_own(type_name: str) -> None:
    factors = np.linspace(0.5, 2, int(np.prod(SHAPE))).reshape(SHAPE)
    assert right(type_name, factors)
    assert right(type_name, factors.astype(np.float32))
    assert not right(type_name, factors, factors[:, ::-1])


@EVERY
def test_factors_of_one_leave_the_bytes(type_name: str) -> None:
    blocks = blocks_of(type_name)
    assert np.array_equal(scale_blocks(blocks, type_name, np.ones(SHAPE)), blocks)


@EVERY
def test_blocks_are_as_many_and_the_given_ones_stay(type_name: str) -> None:
    blocks = np.array(blocks_of(type_name))
    out = scale_blocks(blocks, type_name, np.full(SHAPE, 1.5))
    assert (out.dtype, out.shape) == (np.uint8, blocks.shape)
    assert not np.shares_memory(out, blocks)
    assert np.array_equal(blocks, blocks_of(type_name))
    # No more than two numbers of two bytes are touched, of IQ1_M four half bytes.
    changed = (out != blocks).reshape(*SHAPE, -1).sum(-1)
    assert changed.min() >= 1
    assert changed.max() <= 4


@EVERY
@pytest.mark.parametrize("factor", [1e6, 1e30])
def test_huge_factors_leave_weights_finite_with_their_signs(type_name: str, factor: float) -> None:
    found = values(scale_blocks(blocks_of(type_name), type_name, np.full(SHAPE, factor)), type_name)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 6e4
    if type_name not in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"):  # of a difference the sign may change
        assert np.array_equal(np.sign(found), np.sign(values(blocks_of(type_name), type_name)))


def test_the_spread_scale_is_put_together_and_taken_apart() -> None:
    factors = np.linspace(0.5, 2, int(np.prod(SHAPE))).reshape(SHAPE)
    before = blocks_of("IQ1_M")
    after = scale_blocks(before, "IQ1_M", factors)

    def parts(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All but the scales, what shares their words, and the fp16, as ggml puts it together."""
        own = blocks.reshape(*SHAPE, 56)
        w = np.ascontiguousarray(own[..., 48:]).view("<u2").astype(np.uint32)
        bits = w[..., 0] >> 12 | w[..., 1] >> 8 & 0xF0 | w[..., 2] >> 4 & 0xF00 | w[..., 3] & 0xF000
        return own[..., :48], w & 0xFFF, bits.astype(np.uint16).view(np.float16)

    for old, new in zip(parts(before)[:2], parts(after)[:2], strict=True):
        assert np.array_equal(old, new)
    expected = (parts(before)[2].astype(np.float64) * factors).astype(np.float16)
    assert np.array_equal(parts(after)[2], expected)
    assert not np.array_equal(expected, parts(before)[2])


@pytest.mark.parametrize("type_name", ["BF16", "F16", "F32", "TQ1_0", "MXFP4"])
def test_types_without_a_known_scale_are_refused(type_name: str) -> None:
    kind = quant_type(type_name)
    with pytest.raises(ValueError, match=f"{type_name} have no scale"):
        scale_blocks(np.zeros((3, 2 * kind.size), np.uint8), type_name, np.ones((3, 2)))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 1), (2, 3, 3), (6, 2), (2, 3, 512)])
def test_factors_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        scale_blocks(blocks_of("Q4_K"), "Q4_K", np.ones(shape))
