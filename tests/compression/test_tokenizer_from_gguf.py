"""The way back: what is special in it; `test_tokenizer_bpe` and `_spm` compare the ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from compression.pre_tokenizers import BY_NAME
from compression.tokenizer import gguf_tokenizer
from compression.tokenizer_from_gguf import fast_tokenizer
from spaces.errors import UserError
from spaces.gguf_layout import Value
from tests.compression.support import refused
from tests.compression.tokenizer_kinds import END, GPT2_BYTES, START, byte_level, in_pieces, save

ROWS = 1250
KEY = "tokenizer.ggml."
NAMED = (
    "gpt-2", "llama-bpe", "qwen2", "qwen35", "deepseek-llm", "deepseek-coder", "deepseek-v3", "gpt-4o",
    "olmo", "smollm", "glm4", "chatglm-bpe", "tekken", "default", "kimi-k2", "bailingmoe", "minimax-m2",
)  # fmt: skip


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Value]:
    tokenizer = byte_level([GPT2_BYTES])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, 1)]
    )
    folder = save(tokenizer, tmp_path_factory.mktemp("bpe"), bos_token=START, eos_token=END, pad_token=END)
    return gguf_tokenizer(folder, ROWS)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Value]:
    folder = save(in_pieces("llama"), tmp_path_factory.mktemp("spm"), unk_token="<unk>")
    return gguf_tokenizer(folder, ROWS)


@pytest.mark.parametrize("name", NAMED)
def test_a_vocabulary_under_each_name_comes_back_with_llama_cpps_ids(
    metadata: dict[str, Value], name: str
) -> None:
    # It compares on the probe texts itself.
    fast_tokenizer({**metadata, f"{KEY}pre": Value("str", name)})
    assert name in BY_NAME


def test_a_name_whose_rule_is_not_llama_cpps_is_refused(metadata: dict[str, Value]) -> None:
    # llama.cpp's afmoe looks past the digits' borders at blanks.
    changed = {**metadata, f"{KEY}pre": Value("str", "afmoe")}
    refused(lambda: fast_tokenizer(changed), "becomes", "original checkpoint")


def test_special_tokens_come_back(metadata: dict[str, Value]) -> None:
    back = fast_tokenizer(metadata)
    assert (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (1, 0, 0)
    assert back.unk_token is None
    assert back("x")["input_ids"] == [1, *back("x", add_special_tokens=False)["input_ids"]]
    assert back.decode(back(f"a{END}b")["input_ids"], skip_special_tokens=True) == "ab"
    assert len(back) == ROWS


def without(key: str) -> Any:
    return lambda values: values.pop(f"{KEY}{key}")


def having(key: str, kind: str, value: Any) -> Any:
    return lambda values: values.update({f"{KEY}{key}": Value(kind, value)})


BPE_DAMAGE = [
    (without("model"), "model"),
    (having("model", "str", "bert"), "bert"),
    (having("pre", "str", "qwen22"), "did you mean 'qwen2'"),
    (without("merges"), "merges"),
    (having("merges", "str", ("never seen",)), "fit together"),
    (having("merges", "str", ("nospace",)), "fit together"),
    (having("merges", "i32", (1, 2)), "fit together"),
    (having("tokens", "str", ("a", "a")), "convert"),
    (having("tokens", "str", ()), "convert"),
    (having("tokens", "u32", 3), "fit together"),
    (having("bos_token_id", "u32", 10**6), "fit together"),
]
CHARSMAP = {f"{KEY}model": Value("str", "t5"), f"{KEY}precompiled_charsmap": Value("i32", (1, 2))}
SPM_DAMAGE = [
    (without("scores"), "scores"),
    (without("token_type"), "token_type"),
    (having("scores", "f32", (0.0,)), "fit together"),
    (having("token_type", "i32", (1,)), "fit together"),
    (lambda v: v.update(CHARSMAP), "precompiled_charsmap"),
]


@pytest.mark.parametrize(("damage", "named"), BPE_DAMAGE)
def test_damaged_merges_metadata_is_refused(metadata: dict[str, Value], damage: Any, named: str) -> None:
    changed = dict(metadata)
    damage(changed)
    refused(lambda: fast_tokenizer(changed), named)


@pytest.mark.parametrize(("damage", "named"), SPM_DAMAGE)
def test_damaged_pieces_metadata_is_refused(pieces: dict[str, Value], damage: Any, named: str) -> None:
    changed = dict(pieces)
    damage(changed)
    refused(lambda: fast_tokenizer(changed), named)


def test_a_saved_tokenizer_gives_the_same_metadata_again(
    metadata: dict[str, Value], pieces: dict[str, Value], tmp_path: Path
) -> None:
    for name, values in (("bpe", metadata), ("spm", pieces)):
        fast_tokenizer(values).save_pretrained(tmp_path / name)
        try:
            again = gguf_tokenizer(tmp_path / name, ROWS)
        except UserError as error:  # pragma: no cover
            pytest.fail(str(error))
        for key in ("tokens", "merges", "add_bos_token", "add_space_prefix"):
            assert again.get(f"{KEY}{key}") == values.get(f"{KEY}{key}"), (name, key)
