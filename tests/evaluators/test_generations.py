"""Sampling is what it says, repetition is counted right, and llama.cpp's texts are reproducible."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluators.generations import (
    Sampling,
    compare,
    distinct,
    draw,
    drawer,
    final_loop,
    rates,
    repeated,
    text_before,
)
from evaluators.llama_cpp import file_generations, file_logits, logits_in_parts
from spaces.errors import UserError
from tests.evaluators.tiny_deepseek import CONFIG, random_model, write_gguf


def test_draws_follow_the_tempered_nucleus() -> None:
    p = np.array([0.1, 0.4, 0.2, 0.3])
    logits = np.log(p) + 7
    uniforms = (np.arange(1000) + 0.5) / 1000
    whole = np.bincount([draw(logits, u, 1.0, 1.0) for u in uniforms], minlength=4) / 1000
    np.testing.assert_allclose(whole, p, atol=2e-3)
    # 0.4 + 0.3 reach 0.65: the other two are not drawn.
    nucleus = np.bincount([draw(logits, u, 1.0, 0.65) for u in uniforms], minlength=4) / 1000
    np.testing.assert_allclose(nucleus, [0, 4 / 7, 0, 3 / 7], atol=2e-3)
    cold = np.bincount([draw(logits, u, 0.5, 1.0) for u in uniforms], minlength=4) / 1000
    np.testing.assert_allclose(cold, p**2 / (p**2).sum(), atol=2e-3)
    assert {draw(logits, u, 1.0, 1e-9) for u in uniforms} == {1}
    assert draw(logits, np.nextafter(1, 0), 1.0, 1.0) == 0


def test_a_seed_draws_the_same_again() -> None:
    logits = np.random.default_rng(0).standard_normal((50, 30))
    first, again, other = (
        [choose(row) for row in logits]
        for choose in (drawer(3, 1, 0.9), drawer(3, 1, 0.9), drawer(4, 1, 0.9))
    )
    assert first == again
    assert first != other


def test_repetition_of_known_sequences() -> None:
    assert repeated([], list(range(20))) == 0
    # 1 2 3 4 1 2 3 4 1 2: seven 4-grams, of which the last three were there.
    assert repeated([], [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]) == pytest.approx(3 / 7)
    assert repeated([9, 1, 2, 3, 4], [1, 2, 3, 4, 5]) == pytest.approx(1 / 2)
    assert repeated([1, 2, 3], [4, 5, 6, 7]) == 0  # what lies across the border is in neither
    assert math.isnan(repeated([1, 2, 3, 4, 5], [1, 2, 3]))


def test_distinct_of_known_sequences() -> None:
    row = [1, 1, 2, 1, 1, 2]
    assert [distinct(row, n) for n in (1, 2, 3, 4)] == pytest.approx([2 / 6, 3 / 5, 3 / 4, 3 / 3])
    assert distinct([5] * 10, 4) == pytest.approx(1 / 7)
    assert distinct(row * 3, 4) == pytest.approx(1 - repeated([], row * 3))
    assert math.isnan(distinct([1, 2], 3))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (list(range(40)), (0, 0)),
        ([*range(10), *[7] * 16], (1, 16)),
        ([*range(10), *[77] * 15], (0, 0)),  # a rule of dashes
        ([*range(10), *[20, 21, 22, 23, 24, 25] * 3], (6, 18)),
        ([*range(10), *[20, 21, 22, 23, 24, 25] * 3, 20, 21], (6, 20)),  # a round cut short by the end
        ([*range(10), *[20, 21, 22, 23, 24, 25, 26, 27] * 2], (0, 0)),  # said twice is no loop
        ([*range(10), *[20, 21, 22] * 9, 5], (0, 0)),  # it got out of it
        ([3] * 50, (1, 50)),
        ([], (0, 0)),
    ],
)
def test_the_loop_that_a_text_ends_in(tokens: list[int], expected: tuple[int, int]) -> None:
    assert final_loop(tokens) == expected


def test_rates_compare_as_much_as_both_have_written() -> None:
    text = [*range(20), *[50] * 20]
    found = rates([1, 2], text, np.r_[np.full(20, 3.0), np.zeros(20)], 20)
    assert (found.length, found.loop, found.loop_tokens) == (40, 1, 20)
    assert (found.repeated, found.distinct_1, found.base_nll) == (0, 1, 3)
    whole = rates([1, 2], text, np.r_[np.full(20, 3.0), np.zeros(20)], 40)
    assert (whole.distinct_1, whole.base_nll) == (21 / 40, 1.5)
    assert whole.repeated == pytest.approx(16 / 37)


def test_models_are_compared_prompt_by_prompt() -> None:
    count, prompts = 24, np.zeros((4, 2), np.int64)
    base = np.tile(np.arange(count), (4, 1))
    candidate = base.copy()
    candidate[0] = 7  # one of four falls into a loop
    candidate[3, 3:] = -1  # one ends after three tokens: too few for a 4-gram
    nll = {"base": np.full((4, count), 2.0), "candidate": np.array([1.0, 2, 2, 2])[:, None] * np.ones(count)}
    found = compare(prompts, {"base": base, "candidate": candidate}, nll, count)
    assert found["loop"]["candidate"] == 0.25
    assert found["loop"]["difference_se"] == pytest.approx(0.25)
    assert found["loop"]["p"] == pytest.approx(0.391, abs=1e-3)  # t = 1 of 3 degrees of freedom
    assert (found["length"]["base"], found["length"]["candidate"]) == (24, (24 * 3 + 3) / 4)
    assert (found["repeated"]["prompts"], found["distinct_3"]["prompts"]) == (3, 4)
    assert found["repeated"]["difference"] == pytest.approx(20 / 21 / 3)
    assert found["base_nll"]["difference"] == pytest.approx(-0.25)

    same = compare(
        prompts, {"base": base, "candidate": base}, {"base": nll["base"], "candidate": nll["base"]}, 8
    )
    assert all(row["difference"] == 0 and row["p"] is None for row in same.values())
    assert same["length"]["base"] == 8


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_model())


@pytest.fixture(scope="module")
def prompts() -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, 6))


def test_llama_cpp_writes_what_was_drawn(file: Path, prompts: np.ndarray, tmp_path: Path) -> None:
    sampling = Sampling((5, 6, 7))
    texts = file_generations(file, prompts, 10, sampling=sampling)
    assert texts.shape == (3, 10)
    logits = file_logits(file, np.concatenate([prompts, texts], 1), tmp_path / "logits.npy")
    for row, scores, seed in zip(texts, logits, sampling.seeds, strict=True):
        choose = drawer(seed, sampling.temperature, sampling.top_p)
        assert [choose(x) for x in scores[5:-1]] == row.tolist()
    assert np.array_equal(texts, file_generations(file, prompts, 10, sampling=sampling))
    # A prompt's text does not hang on its neighbours.
    alone = file_generations(file, prompts[2:], 10, sampling=replace(sampling, seeds=(7,)))
    assert np.array_equal(alone[0], texts[2])
    assert not np.array_equal(texts, file_generations(file, prompts, 10, sampling=Sampling((8, 9, 10))))


def test_greedy_texts_stop_before_the_end_token(file: Path, prompts: np.ndarray, tmp_path: Path) -> None:
    texts = file_generations(file, prompts, 10)
    logits = file_logits(file, np.concatenate([prompts, texts], 1), tmp_path / "logits.npy")
    assert np.array_equal(logits[:, 5:-1].argmax(-1), texts)
    end = int(texts[0, 4])
    for row, cut in zip(texts.tolist(), file_generations(file, prompts, 10, end=end), strict=True):
        before = row.index(end) if end in row else 10
        assert text_before(cut, 10) == row[:before]
        assert set(cut[before:]) <= {-1}


def test_logits_come_in_parts(
    file: Path, prompts: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = file_logits(file, prompts, tmp_path / "logits.npy")
    monkeypatch.setattr("evaluators.llama_cpp._PART", 2 * 4 * 6 * CONFIG.vocab_size)
    parts = [(part, np.array(rows)) for part, rows in logits_in_parts(file, prompts, tmp_path)]
    assert [part for part, _ in parts] == [slice(0, 2), slice(2, 3)]
    assert np.array_equal(np.concatenate([rows for _, rows in parts]), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["logits.npy"]


def test_bad_prompts_are_user_errors(file: Path, prompts: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"tiny\.gguf: prompts must be"):
        file_generations(file, prompts[0], 4)
    with pytest.raises(UserError, match=r"tiny\.gguf: 3 prompts need as many seeds, got 1"):
        file_generations(file, prompts, 4, sampling=Sampling((1,)))
    with pytest.raises(UserError, match=r"tiny\.gguf: token ids"):
        file_generations(file, prompts + 10**6, 4)
