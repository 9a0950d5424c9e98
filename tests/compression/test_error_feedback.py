"""Feedback never loses in the error it is about, gains where inputs correlate, and keeps to the format."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import ggml, sealed
from compression.calibration import Calibration
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint, open_checkpoint
from compression.error_feedback import feedback_error, quantize_with_feedback
from compression.hessians import DAMPING, Hessians, damped
from compression.variant_bank import VariantBank
from evaluators.texts import TextSet
from search.cache_files import save_text
from search.worker import Setup, Worker
from spaces.inventory import Tensor
from spaces.quant_types import QUANT_TYPES
from tests.compression.support import candidate, logits, provide, refused

TYPES = ("Q2_K", "IQ2_XXS", "Q4_K", "IQ1_S", "IQ3_S", "Q6_K", "Q8_0", "Q4_0", "IQ4_NL")
MATRIX = Tensor("blk.0.ffn_down.weight", (6, 256), "ffn_down", 0)
STACK = Tensor("blk.1.ffn_up_exps.weight", (3, 4, 256), "ffn_up_exps", 1, per_expert=True)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def hessian(row: int, seed: int = 0, correlated: float = 0.8) -> np.ndarray:
    """Of inputs that are mostly mixtures of a few sources."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((4 * row, row)) * rng.lognormal(0, 0.5, row)
    shared = rng.standard_normal((4 * row, 12)) @ rng.standard_normal((12, row)) / 12**0.5
    x = correlated * shared + (1 - correlated) * own
    return damped((x.T @ x / len(x)).astype(np.float32))


def naive(w: np.ndarray, blocks: np.ndarray, type_name: str, h: np.ndarray) -> np.ndarray:
    """One row at a time, in float64."""
    e = ggml.dequantize(blocks, type_name).astype(np.float64) - w
    return np.array([row @ h.astype(np.float64) @ row for row in e.reshape(-1, e.shape[-1])])


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("row", [256, 768])
def test_no_row_is_worse_and_most_are_better(type_name: str, row: int) -> None:
    w, h = weights(24, row), hessian(row)
    columns = np.diag(h).copy()
    plain = ggml.quantize(w, type_name, columns)
    fed = quantize_with_feedback(w, type_name, columns, h)
    before, after = naive(w, plain, type_name, h), naive(w, fed, type_name, h)
    assert (after <= before * (1 + 1e-9)).all()
    assert (after < before).mean() > 0.9
    assert after.sum() < 0.85 * before.sum()
    assert fed.shape == plain.shape
    assert fed.dtype == plain.dtype
    assert not np.array_equal(fed, plain)


@pytest.mark.parametrize("type_name", TYPES)
def test_its_blocks_are_ones_that_ggml_makes(type_name: str) -> None:
    """Each superblock is what the quantizer itself would give for some weights: it is on the grid."""
    w, h = weights(4, 256), hessian(256)
    columns = np.diag(h).copy()
    values = ggml.dequantize(quantize_with_feedback(w, type_name, columns, h), type_name)
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= 3 * np.abs(w).max()
    counts = {len(np.unique(block)) for block in values.reshape(-1, 32)}
    most = {len(np.unique(b)) for b in ggml.dequantize(ggml.quantize(w, type_name, columns), type_name)}
    assert max(counts) <= max(most)


@pytest.mark.parametrize("type_name", TYPES)
def test_without_correlation_it_is_the_plain_quantizer(type_name: str) -> None:
    w = weights(5, 512)
    columns = np.random.default_rng(3).lognormal(0, 1, 512).astype(np.float32)
    fed = quantize_with_feedback(w, type_name, columns, np.diag(columns))
    assert np.array_equal(fed, ggml.quantize(w, type_name, columns))


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_single_numbers_have_nothing_to_feed_back(type_name: str) -> None:
    w, h = weights(3, 64), hessian(64)
    assert np.array_equal(quantize_with_feedback(w, type_name, None, h), ggml.quantize(w, type_name))


def test_leading_axes_and_no_rounds() -> None:
    w, h = weights(2, 3, 256), hessian(256)
    columns = np.diag(h).copy()
    flat = quantize_with_feedback(w.reshape(6, 256), "Q3_K", columns, h)
    assert np.array_equal(quantize_with_feedback(w, "Q3_K", columns, h), flat.reshape(2, 3, -1))
    plain = ggml.quantize(w, "Q3_K", columns)
    assert np.array_equal(quantize_with_feedback(w, "Q3_K", columns, h, rounds=0), plain)
    assert quantize_with_feedback(w[:0], "Q3_K", columns, h).shape == (0, 3, 110)


def test_more_rounds_lose_nothing() -> None:
    w, h = weights(16, 256), hessian(256)
    errors = [
        feedback_error(w, quantize_with_feedback(w, "IQ2_XXS", np.diag(h).copy(), h, rounds=n), "IQ2_XXS", h)
        for n in (0, 1, 2, 4)
    ]
    for fewer, more in pairwise(errors):
        assert (more <= fewer * (1 + 1e-9)).all()
        assert more.sum() < fewer.sum()


def test_the_error_is_that_of_the_outputs() -> None:
    rng = np.random.default_rng(0)
    w, x = weights(5, 256), rng.standard_normal((300, 256))
    blocks = ggml.quantize(w, "Q2_K", np.ones(256, np.float32))
    difference = x @ (ggml.dequantize(blocks, "Q2_K") - w).astype(np.float64).T
    found = feedback_error(w, blocks, "Q2_K", x.T @ x / 300)
    np.testing.assert_allclose(found, (difference**2).mean(0), rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(
        [("Q2_K", 256), ("IQ1_M", 256), ("Q5_K", 512), ("Q8_0", 96), ("Q5_0", 64), ("IQ4_NL", 32)]
    ),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 7, 1000]),
    st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
    st.sampled_from([0.0, 1e-12, 1.0, 1e6]),
)
def test_whatever_the_shape_rank_and_scale(
    kind: tuple[str, int], rows: int, seed: int, inputs: int, size: float, scale: float
) -> None:
    type_name, row = kind
    rng = np.random.default_rng(seed)
    w = (size * rng.standard_normal((rows, row)) * rng.integers(0, 2, (rows, 1))).astype(np.float32)
    w = np.clip(w, -3e4, 3e4)
    x = rng.standard_normal((inputs, row)) * scale
    h = (x.T @ x / inputs).astype(np.float32)
    columns = np.diag(h).copy()
    plain = ggml.quantize(w, type_name, columns)
    fed = quantize_with_feedback(w, type_name, columns, h)
    assert fed.shape == plain.shape
    before, after = naive(w, plain, type_name, h), naive(w, fed, type_name, h)
    slack = 1e-9 * np.abs(before).max()  # a Hessian rounded to float32 may be a little indefinite
    assert (after <= before + slack).all()


@pytest.mark.parametrize("bad", [np.eye(32), np.ones(256), np.full((256, 256), np.nan), np.ones((256, 255))])
def test_hessians_that_do_not_fit_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="hessian must be finite and 256 x 256"):
        quantize_with_feedback(weights(2, 256), "Q4_K", None, bad)


def test_weights_that_cannot_be_quantized_are_refused() -> None:
    w = weights(2, 256)
    w[1, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        quantize_with_feedback(w, "Q4_K", None, hessian(256))
    with pytest.raises(ValueError, match="needs an imatrix"):
        quantize_with_feedback(weights(2, 256), "IQ1_S", None, hessian(256))


@pytest.mark.parametrize("tensor", [MATRIX, STACK], ids=lambda t: t.role)
def test_a_bank_keeps_both_kinds_apart(tmp_path: Path, tensor: Tensor) -> None:
    bank, w = VariantBank(tmp_path), weights(*tensor.shape)
    h = np.stack([hessian(256, seed=e) for e in range(3)]) if tensor.per_expert else hessian(256)
    columns = np.diagonal(h, axis1=-2, axis2=-1).copy()
    types = ["Q2_K", "Q8_0", "BF16"]

    def add(full: np.ndarray | None) -> list[tuple[str, str, float]]:
        return bank.add(tensor, types, lambda e: w if e is None else w[e], columns, "model", full)

    plain, fed = add(None), add(h)
    assert len({key for _, key, _ in (*plain, *fed)}) == 6
    assert add(None) == plain
    assert add(h) == fed
    for type_name, key, error in fed:
        bank.register(tensor.name, type_name, key)
        blocks = bank.blocks(tensor, type_name)
        per_expert = [columns, w, h] if tensor.per_expert else [columns[None], w[None], h[None]]
        lost = total = 0.0
        for c, v, f, own in zip(*per_expert, blocks.reshape(*per_expert[1].shape[:2], -1), strict=True):
            by = None if type_name in ("Q8_0", "BF16") else c
            assert np.array_equal(own, quantize_with_feedback(v, type_name, by, f))
            lost += naive(v, own, type_name, f).sum()
            total += sum(r @ f.astype(np.float64) @ r for r in v.astype(np.float64))
        assert error == pytest.approx(lost / total, rel=1e-6)


def fresh(checkpoint: Checkpoint, stream: bool = False) -> CandidateModel:
    return CandidateModel(checkpoint, checkpoint.inventory, VariantBank(Path("unused")), stream)


@pytest.fixture(scope="module")
def windows(tiny_texts: dict[str, TextSet]) -> np.ndarray:
    return tiny_texts["calibration"].windows


@pytest.fixture(scope="module")
def collected(tiny: Checkpoint, windows: np.ndarray) -> dict[str, np.ndarray]:
    found = Hessians(fresh(tiny), windows)
    return {t.name: found.of(t.name) for t in tiny.inventory.quantizable if t.role != "token_embd"}


def test_their_diagonal_is_the_imatrix(
    collected: dict[str, np.ndarray], tiny: Checkpoint, tiny_calibration: Calibration
) -> None:
    assert set(collected) == set(tiny_calibration.imatrix)
    for name, matrices in collected.items():
        tensor = tiny.inventory.by_name[name]
        each = matrices if tensor.per_expert else matrices[None]
        assert each.shape[1:] == (tensor.row, tensor.row)
        expected = np.atleast_2d(tiny_calibration.imatrix[name])
        for matrix, columns in zip(each, expected, strict=True):
            np.testing.assert_allclose(np.diag(matrix) - DAMPING * columns.mean(), columns, rtol=1e-3)
            assert np.abs(matrix - matrix.T).max() <= 1e-5 * np.abs(matrix).max()
            assert np.linalg.eigvalsh(matrix.astype(np.float64))[0] > 0


def test_they_are_products_of_the_inputs(
    collected: dict[str, np.ndarray], tiny: Checkpoint, windows: np.ndarray
) -> None:
    model, seen = fresh(tiny), []
    module = model.model.get_submodule("model.layers.2.self_attn.o_proj")
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    logits(model, windows)
    handle.remove()
    x = torch.cat(seen).double().numpy()
    expected = damped(x.T @ x / len(x))
    found = collected["blk.2.attn_output.weight"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_layers_may_be_asked_for_in_any_order_of_any_model(
    collected: dict[str, np.ndarray], tiny: Checkpoint, tiny_model: CandidateModel, windows: np.ndarray
) -> None:
    tiny_model.apply(provide(tiny_model, candidate(tiny.inventory, {1: (0, 1, 2)}, types="Q4_0")))
    streamed = fresh(tiny, stream=True)
    for model in (tiny_model, streamed):
        found = Hessians(model, windows)
        for name in ("output.weight", "blk.2.ffn_down_exps.weight", "blk.1.ffn_up_exps.weight"):
            assert np.array_equal(found.of(name), collected[name]), name
        with pytest.raises(KeyError):
            found.of("token_embd.weight")
    assert all(v.is_meta for n, v in streamed.model.named_parameters() if ".layers." in n)


def test_an_expert_no_token_reached_takes_the_layers_mean(tiny: Checkpoint, windows: np.ndarray) -> None:
    model = fresh(tiny)
    model.shell.router(1).full["e_score_correction_bias"][5] = -100.0
    model.reset()
    found = Hessians(model, windows).of("blk.1.ffn_down_exps.weight")
    others = found[[e for e in range(8) if e != 5]]
    assert (
        np.trace(others, axis1=1, axis2=2).min()
        < np.trace(found[5])
        < np.trace(others, axis1=1, axis2=2).max()
    )


def test_a_worker_feeds_back_only_where_its_setup_says_so(
    tiny_checkpoint: Path, tiny_texts: dict[str, TextSet], tiny_calibration: Calibration, tmp_path: Path
) -> None:
    save_text(tiny_texts["calibration"], tmp_path)
    tiny_calibration.save(tmp_path / "calibration.npz")
    digest = tiny_texts["calibration"].digest
    made_of = {"model": open_checkpoint(tiny_checkpoint).fingerprint, "text calibration": digest}
    sealed.seal(tmp_path / "calibration.npz", made_of)
    plain = Worker(Setup(str(tiny_checkpoint), "tiny", str(tmp_path)))
    able = Worker(Setup(str(tiny_checkpoint), "tiny", str(tmp_path), feedback=True))
    name = "blk.2.ffn_up_exps.weight"
    with pytest.raises(ValueError, match=r"needs Setup\.feedback"):
        plain.quantize(name, ["Q2_K"], True)
    before = plain.quantize(name, ["Q2_K"])
    assert able.quantize(name, ["Q2_K"]) == before
    ((_, _, key, error),) = able.quantize(name, ["Q2_K"], True)
    assert key != before[0][2]
    assert 0 < error < before[0][3]
    embedding = able.quantize("token_embd.weight", ["Q2_K"], True)
    assert embedding == plain.quantize("token_embd.weight", ["Q2_K"])
    refused(lambda: able.quantize("blk.0.attn_k_b.weight", ["Q4_K"], True), "attn_k_b", "256")
    assert QUANT_TYPES["Q2_K"].block == 256
