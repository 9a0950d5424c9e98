"""LlamaModel in this process: settings, tokens and errors; `test_llama_cpp` checks it in a child."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DeepseekV3ForCausalLM

from compression.llama_symbols import LlamaError, check_layout, library
from evaluators.llama_runtime import LlamaModel
from tests.evaluators.tiny_deepseek import (
    CONFIG,
    MERGES,
    TOKENS,
    TOP_K,
    random_model,
    reference,
    tensors,
    write_gguf,
)

LENGTH = 48


@pytest.fixture(scope="module")
def model() -> DeepseekV3ForCausalLM:
    return random_model()


@pytest.fixture(scope="module")
def file(model: DeepseekV3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, LENGTH))


def test_exact_is_closer_than_the_default_settings(
    model: DeepseekV3ForCausalLM, file: Path, windows: np.ndarray
) -> None:
    expected = reference(model, windows[:1])[0]
    errors = {}
    for exact in (True, False):
        with LlamaModel(file, context=LENGTH, exact=exact) as runtime:
            errors[exact] = np.abs(runtime.logits(windows[0]) - expected).max()
            assert runtime.bytes == sum(value.nbytes for value in tensors(model).values())
    # An F16 KV cache is what makes the difference.
    assert errors[True] <= 1e-4
    assert errors[False] > 10 * errors[True]


def test_top_k_replaces_the_files(model: DeepseekV3ForCausalLM, file: Path, windows: np.ndarray) -> None:
    gates = [layer.mlp.gate for layer in model.model.layers[CONFIG.first_k_dense_replace :]]
    for gate in gates:
        gate.top_k = 1
    expected = reference(model, windows[:1])[0]
    for gate in gates:
        gate.top_k = TOP_K
    assert np.abs(expected - reference(model, windows[:1])[0]).max() > 0.1
    with LlamaModel(file, context=LENGTH, top_k=1) as runtime:
        assert np.abs(runtime.logits(windows[0]) - expected).max() <= 1e-3


def test_every_call_starts_from_an_empty_cache(file: Path, windows: np.ndarray) -> None:
    with LlamaModel(file, context=LENGTH) as runtime:
        first = runtime.logits(windows[0])
        continued = runtime.generate(windows[1, :8], 8)
        assert runtime.generate(windows[1, :8], 8) == continued
        assert min(runtime.speed(LENGTH - 8, 8)) > 0
        assert np.array_equal(runtime.logits(windows[0]), first)


def test_tokenize_is_the_files_byte_level_bpe(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    vocabulary = {text: i for i, text in enumerate(TOKENS)}
    expected = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    expected.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected.add_special_tokens(["<|end|>"])
    text = "the cat,  the héron\n123 other<|end|>then"
    ids = expected.encode(text).ids
    assert {vocabulary["Ġthe"], vocabulary["<|end|>"]} <= set(ids)
    with LlamaModel(write_gguf(tmp_path / "t.gguf", model, tokenizer=True), context=8) as runtime:
        assert runtime.tokenize(text) == ids
        assert runtime.tokenize("") == []


def test_tokenize_without_a_tokenizer_is_an_error(file: Path) -> None:
    with LlamaModel(file, context=8) as runtime, pytest.raises(ValueError, match="no tokenizer"):
        runtime.tokenize("text")


@pytest.mark.parametrize("tokens", [[], [-1], [CONFIG.vocab_size], [1] * 9, [[1, 2]], [0.5]])
def test_bad_tokens_are_refused_before_llama_cpp_sees_them(file: Path, tokens: Any) -> None:
    with LlamaModel(file, context=8) as runtime, pytest.raises(ValueError, match="token"):
        runtime.logits(tokens)


def test_a_closed_model_is_not_used(file: Path) -> None:
    with LlamaModel(file, context=8) as runtime:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        runtime.logits([1])


def test_load_error_carries_llama_cpps_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"nonsense" * 100)
    for top_k in (None, 1):
        with pytest.raises(LlamaError, match="magic"):
            LlamaModel(garbage, context=8, top_k=top_k)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "value"), [("n_batch", 512), ("op_offload", 7)])
def test_another_layout_is_a_clear_error(name: str, value: int) -> None:
    model, context = library().llama_model_default_params(), library().llama_context_default_params()
    fake = SimpleNamespace(
        llama_model_default_params=lambda: model, llama_context_default_params=lambda: context
    )
    check_layout(fake)
    setattr(context, name, value)
    with pytest.raises(RuntimeError, match=f"default {name} reads as {value}.*install the xllamacpp"):
        check_layout(fake)
