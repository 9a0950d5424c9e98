"""PrefixLM gives what lm-eval's own model gives, in a fraction of the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from compression.checkpoint import load_tokenizer
from evaluators.prefix_lm import PrefixLM
from experiments.zoo import FAMILIES, REFERENCE, make

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(REFERENCE)


def plain(model: Any, tokenizer: Any) -> HFLM:
    return HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", max_length=LENGTH, batch_size=8,
        softmax_dtype="float32",
    )  # fmt: skip


def requests(seed: int = 0, items: int = 8) -> list[tuple[None, list[int], list[int]]]:
    """Four choices each; some contexts are longer than the model sees, some choices a single token."""
    generator = np.random.default_rng(seed)
    out = []
    for i in range(items):
        context = generator.integers(2, 4000, generator.integers(1, LENGTH + 20)).tolist()
        for _ in range(4):
            out.append((None, context, generator.integers(2, 4000, 1 if i % 3 else 6).tolist()))
    return out


def agree(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    errors = [abs(x - y) for (x, _), (y, _) in zip(found, expected, strict=True)]
    assert max(errors) < 1e-3
    assert np.std([y for y, _ in expected]) > 1


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_log_likelihoods_are_those_of_lm_eval(name: str, tokenizer: Any) -> None:
    model = make(name)  # gpt_oss has a window of 16, qwen3_next linear attention
    asked = requests()
    expected = plain(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    found = PrefixLM(model, tokenizer, max_length=LENGTH)._loglikelihood_tokens(asked, disable_tqdm=True)
    agree(found, expected)


@pytest.mark.parametrize("window", [5, 16])
def test_a_window_in_every_layer_is_kept_to(window: int, tokenizer: Any) -> None:
    model, asked = make("mixtral", sliding_window=window), requests(1)
    expected = plain(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    agree(PrefixLM(model, tokenizer, max_length=LENGTH)._loglikelihood_tokens(asked), expected)
    model.config.sliding_window = None
    other = PrefixLM(model, tokenizer, max_length=LENGTH)._loglikelihood_tokens(asked)
    assert max(abs(x - y) for (x, _), (y, _) in zip(other, expected, strict=True)) > 0.01


def test_four_choices_cost_about_one_pass_and_a_greedy_choice_is_seen(tokenizer: Any) -> None:
    model = make("deepseek_v3")
    context = list(range(100, 140))
    with torch.inference_mode():
        best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    choices = [[best], [best + 1, 3], [4, best], [5, 6, 7]]
    asked = [(None, context, choice) for choice in choices]
    computed = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, out: computed.append(out.shape))
    found = PrefixLM(model, tokenizer, max_length=LENGTH)._loglikelihood_tokens(asked)
    assert [shape[:2] for shape in computed] == [(1, 40 + 4)]
    computed.clear()
    expected = plain(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    assert sum(shape[0] * shape[1] for shape in computed) > 3 * 44
    assert (
        [greedy for _, greedy in found] == [greedy for _, greedy in expected] == [True, False, False, False]
    )


def test_passes_hold_as_many_tokens_as_asked_for(tokenizer: Any) -> None:
    model, asked = make("deepseek_v3"), requests(2, 40)
    shapes: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, out: shapes.append(out.shape))
    scores = []
    for tokens in (1, 600, 10**6):
        shapes.clear()
        scores.append(
            PrefixLM(model, tokenizer, max_length=LENGTH, tokens=tokens)._loglikelihood_tokens(asked)
        )
        if tokens == 600:
            assert len(shapes) > 1
            assert max(s[0] * s[1] for s in shapes) <= 600
    assert len(shapes) == 1
    for other in scores[1:]:
        agree(other, scores[0])


def test_rolling_and_generation_are_lm_evals(tokenizer: Any) -> None:
    model = make("deepseek_v3")
    text = "The ship left the harbour before dawn, and nobody on the quay had seen it go. " * 8
    rolling = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate((text, text[:50]))]
    stop = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    ask = [Instance("generate_until", {}, (t, stop), i) for i, t in enumerate((text, text[:90]))]
    ours, theirs = PrefixLM(model, tokenizer, max_length=LENGTH), plain(model, tokenizer)
    found, expected = (m.loglikelihood_rolling(rolling, disable_tqdm=True) for m in (ours, theirs))
    assert len(tokenizer(text).input_ids) > 2 * LENGTH
    assert found == pytest.approx(expected, abs=1e-2, rel=1e-5)
    answers = ours.generate_until(ask, disable_tqdm=True)
    assert answers == theirs.generate_until(ask, disable_tqdm=True)
    assert all(answers)
