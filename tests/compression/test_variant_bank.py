"""The bank holds what ggml makes of each tensor, once, and notices damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression import ggml
from compression.calibration import Calibration
from compression.variant_bank import VariantBank
from spaces.inventory import Tensor
from tests.compression.support import refused

MATRIX = Tensor("blk.0.ffn_down.weight", (6, 256), "ffn_down", 0)
STACK = Tensor("blk.1.ffn_up_exps.weight", (3, 4, 256), "ffn_up_exps", 1, per_expert=True)
EMBEDDING = Tensor("token_embd.weight", (10, 256), "token_embd", None)


def weights(tensor: Tensor) -> np.ndarray:
    return np.random.default_rng(len(tensor.name)).standard_normal(tensor.shape).astype(np.float32)


def imatrix(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).lognormal(0, 2, shape).astype(np.float32)


@pytest.fixture
def bank(tmp_path: Path) -> VariantBank:
    columns = {MATRIX.name: imatrix(256), STACK.name: imatrix(3, 256)}
    return VariantBank(tmp_path / "bank", Calibration(columns, {}, 1, "text"))


def add(bank: VariantBank, tensor: Tensor, type_name: str) -> np.ndarray:
    key, _ = bank.add(tensor, type_name, weights(tensor))
    bank.register(tensor.name, type_name, key)
    return bank.blocks(tensor, type_name)


def files(bank: VariantBank) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in bank.folder.rglob("*") if p.is_file()}


def test_blocks_are_quantized_with_the_tensors_imatrix(bank: VariantBank) -> None:
    expected = ggml.quantize(weights(MATRIX), "Q4_K", imatrix(256))
    assert np.array_equal(add(bank, MATRIX, "Q4_K"), expected)
    assert not np.array_equal(expected, ggml.quantize(weights(MATRIX), "Q4_K"))


def test_each_expert_is_quantized_with_its_own_imatrix(bank: VariantBank) -> None:
    blocks, columns = add(bank, STACK, "Q4_K"), imatrix(3, 256)
    assert blocks.shape == (3, 4, 144)
    for e in range(3):
        assert np.array_equal(blocks[e], ggml.quantize(weights(STACK)[e], "Q4_K", columns[e]))
    assert not np.array_equal(blocks[1], ggml.quantize(weights(STACK)[1], "Q4_K", columns[0]))


def test_columns_of_an_embedding_count_alike(bank: VariantBank) -> None:
    expected = ggml.quantize(weights(EMBEDDING), "Q3_K", np.ones(256, np.float32))
    assert np.array_equal(add(bank, EMBEDDING, "Q3_K"), expected)


@pytest.mark.parametrize("tensor", [MATRIX, STACK, EMBEDDING], ids=lambda t: t.role)
def test_the_error_is_weighted_by_the_imatrix(bank: VariantBank, tensor: Tensor) -> None:
    _, error = bank.add(tensor, "Q3_K", weights(tensor))
    w = weights(tensor).astype(np.float64)
    q = ggml.dequantize(add(bank, tensor, "Q3_K"), "Q3_K")
    h = {MATRIX: imatrix(256), STACK: imatrix(3, 256)[:, None], EMBEDDING: np.ones(256)}[tensor]
    assert error == pytest.approx((h * (w - q) ** 2).sum() / (h * w**2).sum(), rel=1e-6)
    assert 1e-4 < error < 0.1


def test_a_second_add_writes_nothing_and_gives_the_same_answer(
    bank: VariantBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bank.add(MATRIX, "Q4_K", weights(MATRIX))
    before = files(bank)
    again = VariantBank(bank.folder, bank.calibration)  # as after a restart
    monkeypatch.setattr(ggml, "quantize", lambda *args: pytest.fail("quantized again"))
    assert again.add(MATRIX, "Q4_K", weights(MATRIX)) == first
    assert files(bank) == before
    assert len(before) == 1


def test_the_key_follows_all_that_decides_the_bytes(
    bank: VariantBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weights(MATRIX)
    changed = w.copy()
    changed[3, 100] = np.nextafter(changed[3, 100], np.float32(9))
    keys = {
        "first": bank.key(MATRIX, "Q4_K", w),
        "type": bank.key(MATRIX, "Q5_K", w),
        "weights": bank.key(MATRIX, "Q4_K", changed),
        "name": bank.key(replace(MATRIX, name="blk.1.ffn_down.weight"), "Q4_K", w),
    }
    other = Calibration({MATRIX.name: imatrix(256) * 2}, {}, 1, "text")
    keys["imatrix"] = VariantBank(bank.folder, other).key(MATRIX, "Q4_K", w)
    monkeypatch.setattr(ggml, "version", lambda: "another")
    keys["version"] = bank.key(MATRIX, "Q4_K", w)
    assert len(set(keys.values())) == len(keys)


def test_the_key_follows_nothing_else(bank: VariantBank) -> None:
    w = weights(MATRIX)
    assert bank.key(MATRIX, "Q4_K", w) == bank.key(MATRIX, "Q4_K", w.copy())
    other = VariantBank(bank.folder, Calibration({MATRIX.name: imatrix(256) * 2}, {}, 9, "another"))
    assert bank.key(MATRIX, "Q8_0", w) == other.key(MATRIX, "Q8_0", w)


def test_variants_of_one_tensor_lie_beside_each_other(bank: VariantBank) -> None:
    sizes = {t: add(bank, MATRIX, t).nbytes for t in ("Q2_K", "Q4_K", "Q8_0", "BF16")}
    assert sizes == {t: MATRIX.bytes(t) for t in sizes}


def damage_last(raw: bytearray) -> bytearray:
    raw[-1] ^= 1
    return raw


def damage_checksum(raw: bytearray) -> bytearray:
    raw[12] ^= 1
    return raw


@pytest.mark.parametrize(
    "damage",
    [damage_last, damage_checksum, lambda r: r[:-1], lambda r: r + b"\0", lambda r: r[:20], lambda r: b""],
    ids=["flipped", "checksum", "cut", "longer", "header", "empty"],
)
def test_a_damaged_variant_is_noticed(bank: VariantBank, damage: Any) -> None:
    key, _ = bank.add(MATRIX, "Q4_K", weights(MATRIX))
    path = bank.path(key)
    path.write_bytes(damage(bytearray(path.read_bytes())))
    bank.register(MATRIX.name, "Q4_K", key)
    refused(lambda: bank.blocks(MATRIX, "Q4_K"), path, "run the search again")


def test_a_missing_variant_is_noticed(bank: VariantBank) -> None:
    key, _ = bank.add(MATRIX, "Q4_K", weights(MATRIX))
    bank.path(key).unlink()
    bank.register(MATRIX.name, "Q4_K", key)
    refused(lambda: bank.blocks(MATRIX, "Q4_K"), bank.path(key), "run the search again")


@pytest.mark.parametrize("left", [b"", b"garbage" * 20])
def test_what_is_no_variant_is_written_again(bank: VariantBank, left: bytes) -> None:
    first = bank.add(MATRIX, "Q4_K", weights(MATRIX))
    bank.path(first[0]).write_bytes(left)
    assert bank.add(MATRIX, "Q4_K", weights(MATRIX)) == first
    assert np.array_equal(add(bank, MATRIX, "Q4_K"), ggml.quantize(weights(MATRIX), "Q4_K", imatrix(256)))


def test_an_interrupted_write_leaves_nothing(bank: VariantBank, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compression.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bank.add(MATRIX, "Q4_K", weights(MATRIX))
    assert not files(bank)


def test_blocks_cannot_be_changed(bank: VariantBank) -> None:
    with pytest.raises(ValueError, match="read-only"):
        add(bank, MATRIX, "Q4_K")[0, 0] = 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
@pytest.mark.parametrize("tensor", [MATRIX, STACK], ids=lambda t: t.role)
def test_weights_that_cannot_be_quantized_name_their_tensor(
    bank: VariantBank, tensor: Tensor, bad: float
) -> None:
    w = weights(tensor)
    w[1, 2] = bad
    refused(lambda: bank.add(tensor, "Q4_K", w), tensor.name, "Q4_K", "finite")
    assert not files(bank)


def test_a_type_the_rows_do_not_take_names_its_tensor(bank: VariantBank) -> None:
    short = Tensor("blk.0.attn_k_b.weight", (4, 32), "attn_k_b", 0)
    refused(lambda: bank.add(short, "Q4_K", np.ones((4, 32), np.float32)), short.name, "256")
