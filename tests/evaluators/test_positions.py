"""Damage by position: buckets, means, errors and the trend are those of constructed inputs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.candidate_model import CandidateModel
from evaluators.divergence import TokenDivergence, base_states, measure, references, token_divergence
from evaluators.positions import buckets, by_position, trend, usable_context
from evaluators.texts import TextSet


def tokens(kl: np.ndarray, nll: float = 2.0, base: float = 1.5) -> TokenDivergence:
    return TokenDivergence(kl, np.full(kl.shape, nll), np.ones(kl.shape), np.full(kl.shape, base))


def test_buckets_double_and_cover_every_position_once() -> None:
    assert buckets(0, 16) == [(0, 1), (2, 3), (4, 7), (8, 15)]
    assert buckets(0, 11) == [(0, 1), (2, 3), (4, 7), (8, 10)]
    assert buckets(0, 1) == [(0, 0)]
    assert buckets(32, 544, 512) == [(32, 63), (64, 127), (128, 255), (256, 511), (512, 543)]
    assert buckets(5, 20, 10) == [(5, 7), (8, 9), (10, 15), (16, 19)]
    assert buckets(32, 100, 4096) == buckets(32, 100)
    for end in range(1, 70):
        assert [i for a, b in buckets(0, end) for i in range(a, b + 1)] == list(range(end))


def test_rows_hold_means_and_errors_over_windows() -> None:
    kl = np.array([[1.0, 3, 5, 7, 2, 2, 2], [3.0, 5, 5, 9, 4, 4, 4]])
    rows = by_position(tokens(kl))
    assert [(r["first"], r["last"]) for r in rows] == [(0, 1), (2, 3), (4, 6)]
    assert [r["kl"] for r in rows] == [3.0, 6.5, 3.0]
    # Two windows: the error is half their difference.
    assert [r["kl_se"] for r in rows] == pytest.approx([1.0, 0.5, 1.0])
    assert [r["cumulative"]["kl"] for r in rows] == pytest.approx([3.0, 4.75, kl.mean()])
    for row in (*rows, *(r["cumulative"] for r in rows)):
        assert row["perplexity"] == pytest.approx(math.exp(2))
        assert row["base_perplexity"] == pytest.approx(math.exp(1.5))
        assert (row["nll_increase"], row["nll_increase_se"], row["top1"]) == (0.5, 0, 1)


def test_the_increase_is_paired_by_window() -> None:
    base = np.array([[1.0, 1], [9.0, 9]])
    found = TokenDivergence(base, base + 0.25, base, base)
    (row,) = by_position(found)
    assert row["nll_se"] == pytest.approx(4)
    assert (row["nll_increase"], row["nll_increase_se"]) == (0.25, 0)


def test_the_trend_of_a_power_law_is_its_exponent() -> None:
    # Buckets of one position each, so that their means are the law itself.
    spans = [(i, i) for i in (0, 1, 3, 7, 15)]
    law = 0.1 * (np.arange(16) + 1.0) ** 0.3
    damage = law * np.array([[1.0], [2.0], [5.0]])  # windows differ in level, not in shape
    found = trend(damage, spans)
    assert found is not None
    assert found.slope == pytest.approx(0.3 * math.log(2))
    assert found.se == pytest.approx(0, abs=1e-12)
    assert found.p < 1e-6


def test_the_trends_error_is_what_the_slope_varies_by() -> None:
    rng, spans = np.random.default_rng(0), buckets(0, 64)
    slopes, errors, p = [], [], []
    for _ in range(400):
        level = rng.lognormal(0, 0.5, (40, 1))
        found = trend(0.1 * level * rng.lognormal(0, 0.7, (40, 64)), spans)
        assert found is not None
        slopes.append(found.slope)
        errors.append(found.se)
        p.append(found.p)
    assert abs(np.mean(slopes)) < 4 * np.std(slopes) / 20
    assert np.mean(errors) == pytest.approx(np.std(slopes), rel=0.1)
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09  # no change is there, so 5 % are false alarms


def test_the_context_ends_where_the_base_model_is_lost() -> None:
    rng = np.random.default_rng(0)
    nll = rng.gamma(2.0, 1.5, (40, 127)) + 2 / (np.arange(127) + 1)
    assert usable_context(nll) is None
    lost = nll.copy()
    lost[:, 64:] += 1
    assert usable_context(lost) == 64
    # A rise within the noise, and one that is sure but too small to matter.
    assert usable_context(nll + np.r_[np.zeros(64), np.full(63, 0.11)]) is None
    assert usable_context(np.ones((40, 127)) + np.r_[np.zeros(64), np.full(63, 0.05)]) is None


def test_no_damage_has_no_trend() -> None:
    assert trend(np.zeros((3, 8)), buckets(0, 8)) is None
    assert trend(np.ones((1, 8)), buckets(0, 8)) is None


def test_tokens_of_a_model_are_those_its_windows_are_means_of(
    tiny_model: CandidateModel, tiny_texts: dict[str, TextSet], tmp_path: Path
) -> None:
    text = tiny_texts["search"]
    base_states(tiny_model, text, tmp_path / "base.npy")
    states = np.load(tmp_path / "base.npy")
    windows = torch.from_numpy(text.windows.astype(np.int64))

    def scored() -> TokenDivergence:
        with torch.inference_mode():
            hidden = tiny_model.hidden(windows)
        return token_divergence(
            references(tiny_model, windows, states), lambda part: tiny_model.logits(hidden[part])
        )

    same = scored()
    assert same.kl.shape == (8, text.windows.shape[1] - 1)
    assert np.abs(same.kl).max() < 1e-5
    assert same.top1.min() == 1
    np.testing.assert_allclose(same.nll, same.base_nll, atol=1e-4)
    assert all(abs(row["kl"]) < 1e-6 for row in by_position(same))

    tiny_model.restrict(1, (0, 1, 3))
    pruned, whole = scored(), measure(tiny_model, text, states)
    assert pruned.kl.mean() > 1e-3
    np.testing.assert_allclose(pruned.base_nll, same.base_nll)
    np.testing.assert_allclose(pruned.nll.mean(1), whole.nll, rtol=1e-5)
    # The last position, which predicts nothing in the window, is in the windows' KL only.
    length = text.windows.shape[1]
    rest = whole.kl * length - pruned.kl.sum(1)
    assert (rest > 0).all()
    assert rest.mean() < 20 * pruned.kl.mean()


def test_the_first_positions_see_less(
    tiny_model: CandidateModel, tiny_texts: dict[str, TextSet], tmp_path: Path
) -> None:
    """Position i is about what follows token i: changing later tokens leaves it as it is."""
    text = tiny_texts["search"]
    changed = text.windows.copy()
    changed[:, 20:] = changed[:, 20:][:, ::-1]
    found = []
    for windows in (text.windows, changed):
        some = TextSet("x", windows, text.sources, text.bytes_per_token)
        tiny_model.reset()
        base_states(tiny_model, some, tmp_path / "base.npy")
        states = np.load(tmp_path / "base.npy")
        tiny_model.restrict(2, (0, 5))
        ids = torch.from_numpy(windows.astype(np.int64))
        with torch.inference_mode():
            hidden = tiny_model.hidden(ids)
        bases = references(tiny_model, ids, states)
        found.append(token_divergence(bases, lambda part, h=hidden: tiny_model.logits(h[part])))  # type: ignore[misc]
    np.testing.assert_allclose(found[0].kl[:, :20], found[1].kl[:, :20], rtol=1e-3, atol=1e-5)
    assert np.abs(found[0].kl[:, 20:] - found[1].kl[:, 20:]).max() > 1e-3
