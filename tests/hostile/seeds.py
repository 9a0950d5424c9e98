"""Small valid inputs of every kind that is fuzzed."""

from __future__ import annotations

import json
import struct
from typing import Any

from spaces.candidate import Candidate
from spaces.gguf_layout import PACKING, TYPE_IDS, Value, padded
from spaces.quant_types import quant_type
from tests.spaces.tiny import CONFIG, inventory

MODEL = inventory()
"""What candidates are checked against."""

TENSORS: dict[str, dict[str, Any]] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "model.b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]},
}
SAFETENSORS = {"__metadata__": {"format": "pt"}, **TENSORS}
INDEX = {"metadata": {"total_size": 32}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
CANDIDATE: dict[str, Any] = json.loads(Candidate.uniform(MODEL, "Q4_K").to_json())
CONFIGS = [CONFIG]

_P = "qwen3moe."
_METADATA = {
    "general.architecture": Value("str", "qwen3moe"), "general.name": Value("str", "tiny"),
    "general.alignment": Value("u32", 32), _P + "context_length": Value("u32", 64),
    _P + "embedding_length": Value("u32", 32), _P + "block_count": Value("u32", 1),
    _P + "feed_forward_length": Value("u32", 32), _P + "expert_feed_forward_length": Value("u32", 32),
    _P + "attention.head_count": Value("u32", 1), _P + "attention.head_count_kv": Value("u32", (1,)),
    _P + "attention.key_length": Value("u32", 32), _P + "attention.value_length": Value("u32", 32),
    _P + "attention.layer_norm_rms_epsilon": Value("f32", 1e-6), _P + "rope.freq_base": Value("f32", 1e4),
    _P + "expert_count": Value("u32", 2), _P + "expert_used_count": Value("u32", 1),
    "tokenizer.ggml.tokens": Value("str", ("a", "b")), "tokenizer.ggml.scores": Value("f64", (0.5, 1.5)),
    "any.nested": Value("array", (Value("u8", (1, 2)), Value("str", ("x",)))),
    "any.flag": Value("bool", True),
}  # fmt: skip
_SHAPES = {
    "token_embd.weight": (2, 32), "output_norm.weight": (32,), "output.weight": (2, 32),
    "blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,), "blk.0.attn_q.weight": (2, 32),
    "blk.0.attn_k.weight": (2, 32), "blk.0.attn_v.weight": (2, 32), "blk.0.attn_output.weight": (2, 32),
    "blk.0.attn_q_norm.weight": (32,), "blk.0.attn_k_norm.weight": (32,),
    "blk.0.ffn_gate_inp.weight": (2, 32), "blk.0.ffn_gate_exps.weight": (2, 2, 32),
    "blk.0.ffn_up_exps.weight": (2, 2, 32), "blk.0.ffn_down_exps.weight": (2, 2, 32),
}  # fmt: skip


def safetensors_file(header: bytes) -> bytes:
    """A file of that header and the body of `SAFETENSORS`."""
    return struct.pack("<Q", len(header)) + header + bytes(range(32))


def gguf_parts() -> list[bytes]:
    """A GGUF file of a small qwen3moe, field by field."""
    parts = [b"GGUF", _u32(3), _u64(len(_SHAPES)), _u64(len(_METADATA))]
    for key, value in _METADATA.items():
        parts += [*_text(key), *_value(value)]
    offset = 0
    for name, shape in _SHAPES.items():
        kind = quant_type("Q8_0" if len(shape) > 1 and "gate_inp" not in name else "F32")
        parts += [
            *_text(name),
            _u32(len(shape)),
            *(_u64(n) for n in shape[::-1]),
            _u32(kind.id),
            _u64(offset),
        ]
        rows = 1
        for n in shape[:-1]:
            rows *= n
        offset += padded(rows * kind.row_bytes(shape[-1]))
    size = sum(map(len, parts))
    return [*parts, bytes(padded(size) - size), bytes(offset)]


def sentencepiece_parts() -> list[bytes]:
    """A tokenizer.model of three pieces, field by field."""
    parts = []
    for text, kind in ((b"<unk>", 2), (b"a", 1), ("▁b".encode(), 1)):
        piece = [b"\x0a", bytes([len(text)]), text, b"\x15", struct.pack("<f", -1.5), b"\x18", bytes([kind])]
        parts += [b"\x0a", bytes([sum(map(len, piece))]), *piece]
    return [*parts, b"\x12", b"\x02", b"\x18", b"\x02", b"\x1a", b"\x04", b"\x18\x01\x20\x01"]


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def _text(text: str) -> list[bytes]:
    return [_u64(len(text.encode())), text.encode()]


def _value(value: Value) -> list[bytes]:
    if isinstance(value.value, tuple):
        return [_u32(TYPE_IDS["array"]), *_array(value)]
    if value.kind == "str":
        return [_u32(TYPE_IDS["str"]), *_text(str(value.value))]
    return [_u32(TYPE_IDS[value.kind]), struct.pack("<" + PACKING[value.kind], value.value)]


def _array(value: Value) -> list[bytes]:
    assert isinstance(value.value, tuple)
    head = [_u32(TYPE_IDS[value.kind]), _u64(len(value.value))]
    if value.kind == "array":
        return [*head, *(part for item in value.value for part in _array(item))]
    if value.kind == "str":
        return [*head, *(part for item in value.value for part in _text(item))]
    return [*head, *(struct.pack("<" + PACKING[value.kind], item) for item in value.value)]
