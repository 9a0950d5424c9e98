"""Byte-level BPE: the pre-tokenizer's name is found, and llama.cpp gives the tokenizer's ids under it."""

from __future__ import annotations

import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from tokenizers import normalizers, pre_tokenizers

from compression.checkpoint import load_tokenizer
from compression.pre_tokenizers import BY_NAME, SPLITTINGS
from compression.tokenizer import gguf_tokenizer
from compression.tokenizer_from_gguf import fast_tokenizer
from compression.vocabulary_probe import TEXTS, trials
from spaces.gguf_layout import Value
from tests.compression.support import refused
from tests.compression.tokenizer_kinds import (
    BYTE_LEVEL,
    END,
    GPT2,
    GPT2_BYTES,
    LLAMA3,
    START,
    LlamaIds,
    byte_level,
    random_text,
    save,
    split,
)

ROWS = 1250


def unjoined(text: str) -> str:
    """With a space between a combining mark and an apostrophe, where llama.cpp splits elsewhere."""
    return "".join(
        a + " " if b == "'" and unicodedata.category(a).startswith("M") else a
        for a, b in pairwise(text + " ")
    )


@pytest.fixture(scope="module", params=BYTE_LEVEL)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A family's tokenizer, its metadata and what llama.cpp and the way back make of it."""
    name, steps, ignore_merges, normalizer = BYTE_LEVEL[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save(byte_level(steps, ignore_merges=ignore_merges, normalizer=normalizer), folder, eos_token=END)
    metadata = gguf_tokenizer(folder, ROWS)
    return {
        "name": name,
        "metadata": metadata,
        "tokenizer": load_tokenizer(folder),
        "llama": LlamaIds(metadata, folder),
        "back": fast_tokenizer(metadata),
        "composed": normalizer is not None,
    }


def test_the_familys_name_is_found(family: dict[str, Any]) -> None:
    found = family["metadata"]["tokenizer.ggml.pre"].value
    # Their regexes differ in \s*[\r\n] and \s*[\r\n]+, which is the same.
    assert found == family["name"] or {found, family["name"]} == {"qwen2", "bailingmoe"}


def test_llama_cpp_gives_the_tokenizers_ids_and_so_does_the_way_back(family: dict[str, Any]) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @example("Ünï 1234567 don't\n\n  x=  2;")
    @given(random_text())
    def check(text: str) -> None:
        if family["name"] in ("gpt-4o", "tekken"):
            text = unjoined(text)
        if family["composed"]:
            text = unicodedata.normalize("NFC", text)
        expected = family["tokenizer"](text, add_special_tokens=False)["input_ids"]
        assert family["llama"](text) == expected
        assert family["back"](text, add_special_tokens=False)["input_ids"] == expected
        assert family["back"].decode(expected) == family["tokenizer"].decode(expected)

    check()


def test_a_rule_of_no_names_is_refused_with_the_nearest_and_the_difference(tmp_path: Path) -> None:
    save(byte_level(split(r"[aeiou]+|\p{L}|\p{N}+|\s+")), tmp_path)
    message = refused(lambda: gguf_tokenizer(tmp_path, ROWS), tmp_path / "tokenizer.json", "--no-export")
    assert "pre-tokenizer" in message
    assert "nearest is '" in message
    assert " becomes [" in message


@pytest.mark.parametrize(
    "steps",
    [
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    ],
    ids=["a space in front", "no splitting", "spaces dropped"],
)
def test_a_rule_llama_cpp_cannot_follow_is_refused(tmp_path: Path, steps: Any) -> None:
    save(byte_level(steps), tmp_path)
    refused(lambda: gguf_tokenizer(tmp_path, ROWS), "tokenizer.json", "pre-tokenizer")


def with_a_word_no_merge_makes(folder: Path, pattern: str, *, ignore_merges: bool) -> Path:
    """A tokenizer in whose vocabulary stands a word that only `ignore_merges` finds."""
    save(byte_level(split(pattern), ignore_merges=ignore_merges), folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["qzxvk"] = len(spec["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize(("ignore_merges", "name"), [(True, "llama-bpe"), (False, "chatglm-bpe")])
def test_the_name_says_whether_merges_are_ignored(tmp_path: Path, ignore_merges: bool, name: str) -> None:
    folder = with_a_word_no_merge_makes(tmp_path, LLAMA3, ignore_merges=ignore_merges)
    metadata = gguf_tokenizer(folder, ROWS)
    assert metadata["tokenizer.ggml.pre"].value == name
    expected = load_tokenizer(folder)("qzxvk")["input_ids"]
    assert (len(expected) == 1) == ignore_merges
    assert LlamaIds(metadata, tmp_path)("qzxvk") == expected


def test_a_setting_no_name_has_is_refused(tmp_path: Path) -> None:
    folder = with_a_word_no_merge_makes(tmp_path, GPT2, ignore_merges=True)
    refused(lambda: gguf_tokenizer(folder, ROWS), "tokenizer.json", "ignore_merges")


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Lowercase()])
def test_a_normalizer_llama_cpp_lacks_is_refused(tmp_path: Path, normalizer: Any) -> None:
    save(byte_level([GPT2_BYTES], normalizer=normalizer), tmp_path)
    refused(lambda: gguf_tokenizer(tmp_path, ROWS), "tokenizer.json", "normalizer", type(normalizer).__name__)


def test_added_tokens_are_cut_out_as_they_are(tmp_path: Path) -> None:
    trained = byte_level([GPT2_BYTES], special=[END])
    trained.add_tokens(["<think>", "    "])
    metadata = gguf_tokenizer(save(trained, tmp_path), ROWS)
    tokenizer, found = load_tokenizer(tmp_path), LlamaIds(metadata, tmp_path)
    kinds = metadata["tokenizer.ggml.token_type"].value
    assert isinstance(kinds, tuple)
    for text, kind in (("<think>", 4), ("    ", 4), (END, 3), ("Ġthe", 1)):
        assert kinds[tokenizer.convert_tokens_to_ids(text)] == kind
    text = f"a <think>b{END}<think>\n         c"
    assert found(text) == tokenizer(text)["input_ids"]


def test_the_table_says_of_every_name_what_this_llama_cpp_does(tmp_path: Path) -> None:
    folder = with_a_word_no_merge_makes(tmp_path, LLAMA3, ignore_merges=False)
    metadata = gguf_tokenizer(folder, ROWS)
    word = load_tokenizer(folder).convert_tokens_to_ids("qzxvk")
    found = {name: LlamaIds(metadata, tmp_path, name) for name in BY_NAME}
    for splitting in SPLITTINGS:
        for name in splitting.names:
            assert (found[name]("qzxvk") == [word]) == splitting.ignore_merges, name
            for text in TEXTS[::4]:
                assert found[name](text) == found[splitting.names[0]](text), (name, text)


def test_a_name_that_aborts_llama_cpp_does_not_stop_the_others(tmp_path: Path) -> None:
    metadata = gguf_tokenizer(save(byte_level([GPT2_BYTES]), tmp_path), ROWS)
    texts = [f"one{START}", "two   10 times"]
    expected = load_tokenizer(tmp_path)(texts)["input_ids"]
    # `whitespace` asserts that no text has spaces; the last two are not reached.
    done = trials(metadata, texts, expected, ["whitespace", "nonsense", "qwen2", "gpt-2", "llama-bpe"])
    assert [trial.name for trial in done] == ["whitespace", "nonsense", "qwen2", "gpt-2"]
    assert "GGML_ASSERT" in str(done[0].error)
    assert "unknown pre-tokenizer" in str(done[1].error)
    assert [trial.agrees for trial in done] == [False, False, False, True]
    assert done[2].text == 1


def test_a_vocabulary_llama_cpp_dies_of_is_an_answer(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.model": Value("str", "none")}
    (done,) = trials(metadata, ["a"], [[1]])
    assert not done.agrees
    assert done.error
