"""The bank holds what ggml makes of each tensor, once, and notices damage."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression import ggml
from compression.variant_bank import HEADER_BYTES, Read, VariantBank, sound, variant_key
from spaces.inventory import Tensor
from tests.compression.support import refused

MATRIX = Tensor("blk.0.ffn_down.weight", (6, 256), "ffn_down", 0)
STACK = Tensor("blk.1.ffn_up_exps.weight", (3, 4, 256), "ffn_up_exps", 1, per_expert=True)
EMBEDDING = Tensor("token_embd.weight", (10, 256), "token_embd", None)


def weights(tensor: Tensor) -> np.ndarray:
    return np.random.default_rng(len(tensor.name)).standard_normal(tensor.shape).astype(np.float32)


def imatrix(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).lognormal(0, 2, shape).astype(np.float32)


COLUMNS = {MATRIX: imatrix(256), STACK: imatrix(3, 256), EMBEDDING: None}


@pytest.fixture
def bank(tmp_path: Path) -> VariantBank:
    return VariantBank(tmp_path / "bank")


def reading(w: np.ndarray) -> Read:
    """Gives weights as a checkpoint does: whole, or one expert's."""
    return lambda expert: w if expert is None else w[expert]


def quantize(
    bank: VariantBank, tensor: Tensor, *types: str, w: np.ndarray | None = None
) -> list[tuple[str, str, float]]:
    values = weights(tensor) if w is None else w
    return bank.add(tensor, types, reading(values), COLUMNS.get(tensor), "model")


def add(bank: VariantBank, tensor: Tensor, type_name: str) -> np.ndarray:
    ((_, key, _),) = quantize(bank, tensor, type_name)
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


@pytest.mark.parametrize("type_name", ["Q3_K", "Q8_0", "BF16"])  # the last two ignore the imatrix
@pytest.mark.parametrize("tensor", [MATRIX, STACK, EMBEDDING], ids=lambda t: t.role)
def test_the_error_is_weighted_by_the_imatrix(bank: VariantBank, tensor: Tensor, type_name: str) -> None:
    ((_, _, error),) = quantize(bank, tensor, type_name)
    w = weights(tensor).astype(np.float64)
    q = ggml.dequantize(add(bank, tensor, type_name), type_name)
    h = {MATRIX: imatrix(256), STACK: imatrix(3, 256)[:, None], EMBEDDING: np.ones(256)}[tensor]
    assert error == pytest.approx((h * (w - q) ** 2).sum() / (h * w**2).sum(), rel=1e-5)
    assert 1e-7 < error < 0.1


def test_a_type_asked_for_twice_is_made_once(bank: VariantBank) -> None:
    first, second = quantize(bank, MATRIX, "Q4_K", "Q4_K")
    assert first == second
    assert len(files(bank)) == 1


@pytest.mark.parametrize("tensor", [MATRIX, STACK, EMBEDDING], ids=lambda t: t.role)
def test_large_tensors_are_quantized_in_pieces_to_the_same_bytes(
    bank: VariantBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: Tensor
) -> None:
    types = ("Q4_K", "Q8_0")
    whole = quantize(bank, tensor, *types)
    monkeypatch.setattr("compression.variant_bank._ROWS", 3 * 256)
    other = VariantBank(tmp_path / "pieces")
    for (_, key, error), (_, same, near) in zip(whole, quantize(other, tensor, *types), strict=True):
        assert same == key
        assert near == pytest.approx(error, rel=1e-9)
        assert other.path(key).read_bytes()[-256:] == bank.path(key).read_bytes()[-256:]
        assert len(other.path(key).read_bytes()) == len(bank.path(key).read_bytes())


def test_several_types_are_made_of_one_reading(bank: VariantBank) -> None:
    asked: list[int | None] = []

    def read(expert: int | None) -> np.ndarray:
        asked.append(expert)
        return reading(weights(STACK))(expert)

    quantize(bank, STACK, "Q4_K")
    made = bank.add(STACK, ["Q2_K", "Q4_K", "Q8_0"], read, COLUMNS[STACK], "model")
    assert asked == [0, 1, 2]
    assert [type_name for type_name, _, _ in made] == ["Q2_K", "Q4_K", "Q8_0"]
    assert made == [row for t in ("Q2_K", "Q4_K", "Q8_0") for row in quantize(bank, STACK, t)]
    assert made[0][2] > made[1][2] > made[2][2]
    for type_name, key, _ in made:
        bank.register(STACK.name, type_name, key)
        expected = [
            ggml.quantize(w, type_name, None if type_name == "Q8_0" else h)
            for w, h in zip(weights(STACK), imatrix(3, 256), strict=True)
        ]
        assert np.array_equal(bank.blocks(STACK, type_name), expected), type_name


def test_a_second_add_writes_nothing_and_gives_the_same_answer(
    bank: VariantBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quantize(bank, MATRIX, "Q4_K")
    before = files(bank)
    again = VariantBank(bank.folder)  # as after a restart
    monkeypatch.setattr(ggml, "quantize", lambda *args: pytest.fail("quantized again"))
    assert quantize(again, MATRIX, "Q4_K") == first
    assert files(bank) == before
    assert len(before) == 1


def test_the_key_follows_all_that_decides_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    h = imatrix(256)
    keys = {
        "first": variant_key(MATRIX, "Q4_K", h, "model"),
        "type": variant_key(MATRIX, "Q5_K", h, "model"),
        "checkpoint": variant_key(MATRIX, "Q4_K", h, "another"),
        "name": variant_key(replace(MATRIX, name="blk.1.ffn_down.weight"), "Q4_K", h, "model"),
        "shape": variant_key(replace(MATRIX, shape=(3, 512)), "Q4_K", h, "model"),
        "imatrix": variant_key(MATRIX, "Q4_K", h * 2, "model"),
        "no imatrix": variant_key(MATRIX, "Q4_K", None, "model"),
        "feedback": variant_key(MATRIX, "Q4_K", h, "model", feedback=True),
    }
    monkeypatch.setattr(ggml, "version", lambda: "another")
    keys["version"] = variant_key(MATRIX, "Q4_K", h, "model")
    assert len(set(keys.values())) == len(keys)


def test_the_error_is_never_that_of_another_imatrix(bank: VariantBank) -> None:
    w, h = weights(MATRIX), imatrix(256)
    errors = [bank.add(MATRIX, ["Q8_0"], reading(w), x, "model")[0][2] for x in (h, h[::-1], None, h)]
    assert len(set(errors)) == 3
    assert errors[0] == errors[3]


def test_the_key_follows_nothing_else(bank: VariantBank) -> None:
    h = imatrix(256)
    assert variant_key(MATRIX, "Q4_K", h, "model") == variant_key(MATRIX, "Q4_K", h.copy(), "model")
    assert quantize(bank, MATRIX, "Q4_K")[0][1] == variant_key(MATRIX, "Q4_K", h, "model")


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
    ((_, key, _),) = quantize(bank, MATRIX, "Q4_K")
    path = bank.path(key)
    path.write_bytes(damage(bytearray(path.read_bytes())))
    bank.register(MATRIX.name, "Q4_K", key)
    refused(lambda: bank.blocks(MATRIX, "Q4_K"), path, "run the search again")


def test_every_flipped_bit_of_a_header_is_noticed_and_made_good(bank: VariantBank) -> None:
    first = quantize(bank, MATRIX, "Q4_K")
    ((_, key, _),) = first
    path = bank.path(key)
    whole = path.read_bytes()
    for bit in range(8 * HEADER_BYTES):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        assert not bank.holds(key), bit
        assert not sound(path), bit
        if bit % 8 == bit // 8 % 8:  # one of each byte, as this takes longer
            assert quantize(VariantBank(bank.folder), MATRIX, "Q4_K") == first
            assert path.read_bytes() == whole
            path.write_bytes(raw)
        bank.register(MATRIX.name, "Q4_K", key)
        refused(lambda: bank.blocks(MATRIX, "Q4_K"), path, "damaged", "run the search again")
    assert quantize(bank, MATRIX, "Q4_K") == first
    assert sound(path)


def test_a_missing_variant_is_noticed(bank: VariantBank) -> None:
    ((_, key, _),) = quantize(bank, MATRIX, "Q4_K")
    bank.path(key).unlink()
    bank.register(MATRIX.name, "Q4_K", key)
    refused(lambda: bank.blocks(MATRIX, "Q4_K"), bank.path(key), "run the search again")


@pytest.mark.parametrize("left", [b"", b"garbage" * 20])
def test_what_is_no_variant_is_written_again(bank: VariantBank, left: bytes) -> None:
    first = quantize(bank, MATRIX, "Q4_K")
    bank.path(first[0][1]).write_bytes(left)
    assert quantize(bank, MATRIX, "Q4_K") == first
    assert np.array_equal(add(bank, MATRIX, "Q4_K"), ggml.quantize(weights(MATRIX), "Q4_K", imatrix(256)))


def test_an_interrupted_write_leaves_nothing(bank: VariantBank, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compression.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(bank, MATRIX, "Q4_K", "Q5_K")
    assert not files(bank)


def test_a_bank_that_keeps_nothing_gives_the_same_blocks(bank: VariantBank) -> None:
    expected = add(bank, STACK, "Q4_K")
    other = VariantBank(bank.folder, keep=False)
    found = add(other, STACK, "Q4_K")
    assert np.array_equal(found, expected)
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is None
    assert np.array_equal(other.blocks(STACK, "Q4_K"), expected)
    # The sums of a variant are checked once, its size and header every time.
    ((_, key, _),) = quantize(bank, STACK, "Q4_K")
    bank.path(key).write_bytes(bank.path(key).read_bytes()[:-1])
    refused(lambda: other.blocks(STACK, "Q4_K"), bank.path(key), "run the search again")


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
    refused(lambda: quantize(bank, tensor, "Q4_K", "Q8_0", w=w), tensor.name, "Q4_K", "finite")
    assert not files(bank)


def test_a_type_the_rows_do_not_take_names_its_tensor(bank: VariantBank) -> None:
    short = Tensor("blk.0.attn_k_b.weight", (4, 32), "attn_k_b", 0)
    refused(lambda: quantize(bank, short, "Q4_K", w=np.ones((4, 32), np.float32)), short.name, "256")
