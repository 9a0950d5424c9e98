"""Type sizes are GGUF's own, ladders only hold types that fit, and fallbacks are llama-quantize's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spaces.errors import UserError
from spaces.quant_types import (
    IGNORES_IMATRIX,
    LADDER,
    QUANT_TYPES,
    REQUIRES_IMATRIX,
    SHORT_LADDER,
    fitting,
    ladder,
    quant_type,
)


@pytest.mark.parametrize("name", sorted({*LADDER, *SHORT_LADDER, "F16", "F32"}))
def test_row_bytes_are_those_of_ggufs_own_conversion(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    shape = gguf.quant_shape_to_byte_shape((3, 768), kind)
    assert quant_type(name).row_bytes(768) == shape[1]
    assert quant_type(name).id == kind.value


def test_bytes_of_a_quantized_row_are_the_predicted_ones() -> None:
    row = np.linspace(-1, 1, 512, dtype=np.float32)[None]
    for name in ("Q8_0", "Q4_0", "Q5_0", "BF16", "F16"):
        assert gguf.quantize(row, gguf.GGMLQuantizationType[name]).nbytes == quant_type(name).row_bytes(512)


@pytest.mark.parametrize(
    ("name", "bits"), [("IQ1_S", 1.5625), ("Q2_K", 2.625), ("Q4_K", 4.5), ("Q6_K", 6.5625), ("Q8_0", 8.5)]
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert quant_type(name).bits_per_weight == bits


@given(st.sampled_from(sorted(QUANT_TYPES)), st.integers(1, 4096))
def test_a_row_takes_a_type_only_in_whole_blocks(name: str, row: int) -> None:
    kind = quant_type(name)
    if row % kind.block:
        with pytest.raises(ValueError, match=f"multiple of {kind.block}"):
            kind.row_bytes(row)
    else:
        assert kind.row_bytes(row) * kind.block == row * kind.size


@given(st.integers(1, 1 << 16))
def test_every_type_of_a_ladder_fits_and_bits_never_fall(row: int) -> None:
    kinds = [quant_type(name) for name in ladder(row)]
    assert kinds
    assert all(kind.fits(row) for kind in kinds)
    assert [k.bits_per_weight for k in kinds] == sorted(k.bits_per_weight for k in kinds)
    assert kinds[-1].name == "BF16"


@given(st.sampled_from(LADDER), st.integers(1, 1 << 16))
def test_a_fallback_fits_and_is_only_taken_where_needed(name: str, row: int) -> None:
    taken = fitting(name, row)
    assert quant_type(taken).fits(row)
    assert (taken == name) == quant_type(name).fits(row)


@pytest.mark.parametrize(
    ("name", "row", "taken"),
    [
        ("Q2_K", 128, "Q4_0"), ("Q3_K", 128, "Q4_0"), ("Q4_K", 128, "Q5_0"), ("Q5_K", 128, "Q5_1"),
        ("Q6_K", 128, "Q8_0"), ("IQ2_XXS", 128, "IQ4_NL"), ("IQ4_XS", 96, "IQ4_NL"), ("Q8_0", 48, "F16"),
        ("Q4_K", 48, "F16"), ("BF16", 48, "BF16"), ("Q4_K", 512, "Q4_K"),
    ],
)  # fmt: skip
def test_fallbacks_of_llama_quantize(name: str, row: int, taken: str) -> None:
    assert fitting(name, row) == taken


def test_an_unknown_type_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="Q4_K"):
        quant_type("Q4_k")
    with pytest.raises(UserError, match="quantization type"):
        fitting("", 256)


def test_what_is_said_of_the_imatrix_names_known_types() -> None:
    assert set(QUANT_TYPES) >= REQUIRES_IMATRIX | IGNORES_IMATRIX
    assert not REQUIRES_IMATRIX & IGNORES_IMATRIX
