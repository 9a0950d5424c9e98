"""Tokenizers that write spaces as ▁: from tokenizer.json and from tokenizer.model."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compression.checkpoint import load_tokenizer
from compression.sentencepiece_model import read_sentencepiece
from compression.tokenizer import gguf_tokenizer
from compression.tokenizer_from_gguf import fast_tokenizer
from spaces.errors import UserError
from tests.compression.support import refused
from tests.compression.tokenizer_kinds import PIECES, LlamaIds, in_pieces, random_text, save

ROWS = 1250
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module", params=PIECES)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", ""))
    save(in_pieces(request.param), folder, **SPECIAL)
    metadata = gguf_tokenizer(folder, ROWS)
    return {
        "name": request.param,
        "metadata": metadata,
        "tokenizer": load_tokenizer(folder),
        "llama": LlamaIds(metadata, folder),
        "back": fast_tokenizer(metadata),
    }


def test_llama_cpp_gives_the_tokenizers_ids_and_so_does_the_way_back(kind: dict[str, Any]) -> None:
    # llama.cpp puts a space after every special token and before every text.
    apart = ("</s>", "<s>")

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @example("Two  words, 123 Ünï\n\n x")
    @given(random_text(*apart, "▁", " ", "  ", "   ").map(lambda text: text.lstrip(" ")))
    def check(text: str) -> None:
        expected = kind["tokenizer"](text, add_special_tokens=False)["input_ids"]
        assert kind["llama"](text) == expected
        assert kind["back"](text, add_special_tokens=False)["input_ids"] == expected

    check()


def test_the_metadata_says_what_the_tokenizer_does(kind: dict[str, Any]) -> None:
    values = {key.removeprefix("tokenizer.ggml."): v.value for key, v in kind["metadata"].items()}
    assert values["model"] == ("t5" if kind["name"] == "unigram" else "llama")
    assert values["add_space_prefix"] == (kind["name"] != "no prefix")
    assert (values["add_bos_token"], values["add_eos_token"]) == (True, False)
    assert [values[f"{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    tokens, kinds = values["tokens"], values["token_type"]
    assert kinds[:3] == (2, 3, 3)
    assert {k for t, k in zip(tokens, kinds, strict=True) if t.startswith("<0x")} <= {6}
    assert kinds[-1] == 5
    assert len(tokens) == len(values["scores"]) == ROWS
    assert kind["back"]("a b")["input_ids"] == kind["tokenizer"]("a b")["input_ids"]


def test_special_tokens_in_text_are_found(kind: dict[str, Any]) -> None:
    text = "one</s>two" if kind["name"] != "mixtral" else "one</s>"
    assert kind["llama"](text) == kind["tokenizer"](text, add_special_tokens=False)["input_ids"]


def test_a_vocabulary_without_byte_pieces_is_refused_not_died_of(tmp_path: Path) -> None:
    # llama.cpp throws where it needs a byte that is no piece.
    save(in_pieces("llama", byte_pieces=False), tmp_path, **SPECIAL)
    refused(lambda: gguf_tokenizer(tmp_path, ROWS), tmp_path / "tokenizer.json", "llama", "--no-export")


def test_merges_that_scores_cannot_say_are_refused(tmp_path: Path) -> None:
    save(in_pieces("llama"), tmp_path, **SPECIAL)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    # "the" is never merged; llama.cpp merges whatever is a piece.
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "".join(m) != "▁the"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    refused(lambda: gguf_tokenizer(tmp_path, ROWS), "tokenizer.json", "▁the")


# tokenizer.model


def varint(value: int) -> bytes:
    value %= 2**64
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces: list[tuple[str, float, int]], *, kind: int = 2, **normalizer: int) -> bytes:
    numbers = {"add_dummy_prefix": 3, "remove_extra_whitespaces": 4}
    listed = b"".join(
        field(
            1, field(1, text.encode()) + field(2, score) + (field(3, piece_kind) if piece_kind != 1 else b"")
        )
        for text, score, piece_kind in pieces
    )
    trainer = field(3, kind) + field(40, 0) + field(41, 1) + field(42, 2) + field(43, -1)
    return (
        listed + field(2, trainer) + field(3, b"".join(field(numbers[k], v) for k, v in normalizer.items()))
    )


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with tokenizer.model alone, and the tokenizer of the same pieces."""
    folder, other = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("json")
    save(in_pieces("llama"), other, **SPECIAL)
    values = {k.removeprefix("tokenizer.ggml."): v.value for k, v in gguf_tokenizer(other, 1200).items()}
    pieces = list(zip(values["tokens"], values["scores"], values["token_type"], strict=True))  # type: ignore[arg-type]
    raw = sentencepiece_model(pieces, remove_extra_whitespaces=0)
    (folder / "tokenizer.model").write_bytes(raw)
    return folder, load_tokenizer(other)


def test_a_tokenizer_model_alone_is_enough(llama_files: tuple[Path, Any], tmp_path: Path) -> None:
    folder, tokenizer = llama_files
    metadata = gguf_tokenizer(folder, 1300)
    found = LlamaIds(metadata, tmp_path)
    for text in ("Hello world", "a  b\n\tc", "naïve 🙂 日本", "one</s>two", "12345"):
        assert found(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    values = {k.removeprefix("tokenizer.ggml."): v.value for k, v in metadata.items()}
    assert [values[f"{name}_token_id"] for name in ("bos", "eos")] == [1, 2]
    assert "padding_token_id" not in values
    assert (values["add_bos_token"], values["add_eos_token"]) == (True, False)
    assert isinstance(values["tokens"], tuple)
    assert values["tokens"][1299] == "[PAD1299]"


def test_added_tokens_of_the_json_files_come_after_the_pieces(
    llama_files: tuple[Path, Any], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama_files[0] / "tokenizer.model").read_bytes())
    decoder = {"1": {"content": "<s>", "special": True}, "1200": {"content": "<|im_end|>", "special": True}}
    config = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    metadata = gguf_tokenizer(tmp_path, 1201)
    assert metadata["tokenizer.ggml.eos_token_id"].value == 1200
    assert metadata["tokenizer.ggml.add_bos_token"].value is False
    assert LlamaIds(metadata, tmp_path)("<|im_end|>") == [1200]
    refused(lambda: gguf_tokenizer(tmp_path, 1200), "tokenizer.model", "1200")


def test_equal_pieces_get_names_of_their_own(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [("▁", -1.0, 1), ("▁", -2.0, 1), ("[PAD262]", -3.0, 1)]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(pieces, remove_extra_whitespaces=0))
    tokens = gguf_tokenizer(tmp_path, 263)["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, tuple)
    assert tokens[259:] == ("▁", "▁[260]", "[PAD262]", "[PAD262][262]")


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        (b"", "no SentencePiece"),
        (b"{}", "SentencePiece"),
        (sentencepiece_model([("a", 0.0, 1)], kind=3), "BPE and Unigram"),
        (field(1, field(2, 0.5)), "not a SentencePiece"),
        (field(1, b"\x0a\x7fcut"), "cut short"),
        (sentencepiece_model([("a", 0.0, 1)])[:-1], "cut short"),
        (sentencepiece_model([("a", 0.0, 1)]) + field(3, field(2, b"map")), "character map"),
    ],
)
def test_a_bad_tokenizer_model_is_refused(tmp_path: Path, raw: bytes, rule: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    refused(lambda: gguf_tokenizer(tmp_path, 1000), tmp_path / "tokenizer.model", rule)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 200), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_tokenizer_model_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: bool
) -> None:
    raw = bytearray(sentencepiece_model([("<unk>", 0.0, 2), ("▁a", -1.0, 1), ("b", -2.0, 1)] * 3))
    at %= len(raw)
    raw[at] = byte
    file = tmp_path_factory.getbasetemp() / "damaged.model"
    file.write_bytes(raw[:at] if cut else raw)
    with suppress(UserError):
        read_sentencepiece(file)
