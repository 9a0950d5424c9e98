"""KL divergence and its companions follow their formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.candidate_model import CandidateModel
from evaluators.divergence import Divergence, Reference, base_states, compare, measure
from evaluators.texts import TextSet
from tests.compression.support import candidate, log_softmax, logits, mixed_types, provide

VOCABULARY = 50


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(3 * np.random.default_rng(seed).standard_normal((*shape, VOCABULARY))).float()


def test_compare_is_the_formula_in_float64() -> None:
    base, other = random_logits(0, 3, 7), random_logits(1, 3, 7)
    windows = torch.from_numpy(np.random.default_rng(2).integers(0, VOCABULARY, (3, 7)))
    kl, nll, top1 = compare(base, other, windows)
    log_p, log_q = log_softmax(base.numpy()), log_softmax(other.numpy())
    for w in range(3):
        divergence = [
            sum(math.exp(log_p[w, i, v]) * (log_p[w, i, v] - log_q[w, i, v]) for v in range(VOCABULARY))
            for i in range(7)
        ]
        assert kl[w].item() == pytest.approx(np.mean(divergence), rel=1e-5)
        surprise = [-log_q[w, i, windows[w, i + 1]] for i in range(6)]
        assert nll[w].item() == pytest.approx(np.mean(surprise), rel=1e-5)
        agree = [log_p[w, i].argmax() == log_q[w, i].argmax() for i in range(7)]
        assert top1[w].item() == pytest.approx(np.mean(agree))


def test_kl_has_a_direction_and_ignores_constants() -> None:
    base, other, windows = random_logits(0, 2, 5), random_logits(1, 2, 5), torch.zeros(2, 5, dtype=torch.long)
    there, back = compare(base, other, windows)[0], compare(other, base, windows)[0]
    assert (there > 0).all()
    assert not torch.allclose(there, back, rtol=0.01)
    assert torch.allclose(there, compare(base + 100, other - 50, windows)[0], rtol=1e-3)
    assert compare(base, base.clone(), windows)[0].abs().max() < 1e-6


def test_one_reference_serves_many_candidates() -> None:
    base, windows = random_logits(0, 2, 5), torch.zeros(2, 5, dtype=torch.long)
    reference = Reference(base, windows)
    for seed in (1, 2, 1):
        other = random_logits(seed, 2, 5)
        for found, expected in zip(reference.compare(other), compare(base, other, windows), strict=True):
            assert torch.equal(found, expected)


@pytest.fixture
def states(tiny_model: CandidateModel, tiny_texts: dict[str, TextSet], tmp_path: Path) -> np.ndarray:
    base_states(tiny_model, tiny_texts["search"], tmp_path / "base.npy")
    found: np.ndarray = np.load(tmp_path / "base.npy", mmap_mode="r")
    return found


def test_base_states_give_the_base_models_logits(
    tiny_model: CandidateModel, tiny_texts: dict[str, TextSet], states: np.ndarray
) -> None:
    windows = tiny_texts["search"].windows
    assert states.shape == (*windows.shape, tiny_model.inventory.hidden)
    assert states.dtype == np.float32
    found = states @ tiny_model.base_output.numpy().T
    assert np.abs(found - logits(tiny_model, windows)).max() < 1e-4


def test_the_base_model_does_not_diverge_from_itself(
    tiny_model: CandidateModel, tiny_texts: dict[str, TextSet], states: np.ndarray
) -> None:
    result = measure(tiny_model, tiny_texts["search"], states)
    assert result.kl.shape == result.nll.shape == result.top1.shape == (8,)
    assert abs(result.mean_kl) < 1e-6
    assert result.top1.min() == 1


def test_a_candidate_is_measured_against_the_uncompressed_model(
    tiny_model: CandidateModel, tiny_texts: dict[str, TextSet], states: np.ndarray
) -> None:
    text = tiny_texts["search"]
    base = log_softmax(logits(tiny_model, text.windows))
    wanted = candidate(tiny_model.inventory, {1: (0, 1, 3)}, {2: 1}, mixed_types(tiny_model.inventory))
    # The output matrix changes too: base logits must come from the original one.
    assert dict(wanted.types)["output.weight"] != "BF16"
    tiny_model.apply(provide(tiny_model, wanted))
    own = log_softmax(logits(tiny_model, text.windows))
    result = measure(tiny_model, text, states)
    expected = (np.exp(base) * (base - own)).sum(-1).mean(-1)
    np.testing.assert_allclose(result.kl, expected, rtol=1e-3, atol=1e-6)
    assert expected.min() > 1e-3
    nll = -np.take_along_axis(own[:, :-1], text.windows[:, 1:, None].astype(np.int64), -1)[..., 0].mean(-1)
    np.testing.assert_allclose(result.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(result.top1, (base.argmax(-1) == own.argmax(-1)).mean(-1))
    assert result.scores()["tokens"] == text.windows.size


def test_windows_are_measured_one_by_one(
    tiny_model: CandidateModel, tiny_texts: dict[str, TextSet], states: np.ndarray
) -> None:
    tiny_model.restrict(1, (0, 1, 3))
    text = tiny_texts["search"]
    whole = measure(tiny_model, text, states)
    head = measure(tiny_model, text.head(3 * text.windows.shape[1]), states)
    np.testing.assert_allclose(head.kl, whole.kl[:3], rtol=1e-4)
    rest = measure(tiny_model, replace(text, windows=text.windows[3:]), states[3:])
    np.testing.assert_allclose(rest.kl, whole.kl[3:], rtol=1e-4)


@pytest.mark.parametrize("together", [0.5, 1, 4], ids=["less than one", "one", "four"])
def test_more_windows_than_fit_at_once_are_all_measured(
    tiny_model: CandidateModel,
    tiny_texts: dict[str, TextSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    together: float,
) -> None:
    text = TextSet("x", tiny_texts["calibration"].windows[:11, :16], ("x",) * 11, 3.0)
    base_states(tiny_model, text, tmp_path / "base.npy")
    states = np.load(tmp_path / "base.npy")
    tiny_model.restrict(1, (0, 1, 3))
    expected = measure(tiny_model, text, states)
    assert expected.kl.shape == (11,)
    assert expected.kl.min() > 1e-4
    monkeypatch.setattr("evaluators.divergence._LOGITS", int(together * 16 * tiny_model.inventory.vocabulary))
    found = measure(tiny_model, text, states)
    for name in ("kl", "nll", "top1"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, err_msg=name)
    tiny_model.reset()
    assert abs(measure(tiny_model, text, states).mean_kl) < 1e-6


def divergence(kl: list[float], nll: list[float]) -> Divergence:
    return Divergence(np.array(kl), np.array(nll), np.linspace(0, 1, len(kl)), 64, 3.5)


def test_scores_are_aggregated_over_windows() -> None:
    found = divergence([0.1, 0.3, 0.2, 0.6], [2.0, 3.0, 4.0, 1.0]).scores()
    assert found["kl"] == pytest.approx(0.3)
    # Sample deviation of the windows over the root of their number.
    deviation = math.sqrt((0.2**2 + 0 + 0.1**2 + 0.3**2) / 3)
    assert found["kl_se"] == pytest.approx(deviation / 2)
    assert found["perplexity"] == pytest.approx(math.exp(2.5))
    assert found["bits_per_byte"] == pytest.approx(2.5 / math.log(2) / 3.5)
    assert found["top1"] == pytest.approx(0.5)
    assert found["tokens"] == 256


def test_one_window_tells_nothing_of_the_error() -> None:
    assert divergence([0.1], [2.0]).kl_se == math.inf


def test_a_ruined_model_has_a_finite_perplexity() -> None:
    assert math.isfinite(divergence([5000.0, 1.0], [5000.0, 1.0]).perplexity)
