"""GGUF files that are damaged or of something else: headers that lie, models that are none of ours."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from experiments.bad_inputs.case import Case, Make, World, export, search
from experiments.bad_inputs.search_places import PNG
from spaces.gguf_layout import TYPE_IDS, TensorInfo, Value
from spaces.gguf_layout import header as layout
from spaces.gguf_reader import read_header

_TO_JSON = "--model bad.gguf --uniform Q8_0 --out out.json"


def _key(name: bytes, kind: int, payload: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + payload


def _tensor(name: bytes = b"a", shape: Sequence[int] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
    return head + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)


_ARCHITECTURE = _key(b"general.architecture", TYPE_IDS["str"], struct.pack("<Q", 3) + b"moe")


def raw(entries: Sequence[bytes] = (_ARCHITECTURE,), tensors: Sequence[bytes] = ()) -> bytes:
    """A file made of entries and tensors that may break any rule, and 4 KiB of data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join([*entries, *tensors])
    return head + bytes(-len(head) % 32 + 4096)


def file(content: bytes) -> Make:
    """`bad.gguf`."""
    return lambda world: world.put("bad.gguf", content)


def patched(change: Callable[[bytes], bytes]) -> Make:
    """The good model with other bytes."""
    return lambda world: world.put("bad.gguf", change((world.folder / "model.gguf").read_bytes()))


def at(place: int, packing: str, *values: Any) -> Make:
    """The good model with other numbers at one place."""
    new = struct.pack(packing, *values)
    return patched(lambda raw: raw[:place] + new + raw[place + len(new) :])


Tensors = list[TensorInfo]


def told(change: Callable[[dict[str, Value], Tensors], object]) -> Make:
    """A file with the good model's header, changed; its data are zeros, NaN in the last kilobyte."""

    def make(world: World) -> None:
        header = read_header(world.folder / "model.gguf")
        metadata, tensors = dict(header.metadata), [t.info for t in header.tensors]
        change(metadata, tensors)
        data = sum(-(-t.size // 32) * 32 for t in tensors)
        world.put("bad.gguf", layout(metadata, tensors) + bytes(data - 1024) + b"\0\0\xc0\x7f" * 256)

    return make


def _without(part: str) -> Make:
    return told(lambda metadata, _: metadata.pop(next(k for k in metadata if k.endswith(part))))


def _says(part: str, value: Value) -> Make:
    return told(lambda m, _: m.update({next(k for k in m if k.endswith(part)): value}))


def _drop(part: str) -> Make:
    def change(_: dict[str, Value], tensors: Tensors) -> None:
        tensors[:] = [t for t in tensors if part not in t.name]

    return told(change)


def _fewer_experts(_: dict[str, Value], tensors: Tensors) -> None:
    place = next(i for i, t in enumerate(tensors) if "ffn_down_exps" in t.name)
    t = tensors[place]
    tensors[place] = TensorInfo(t.name, (4, *t.shape[1:]), t.type_id, t.size // 2)


def _one_of_three(metadata: dict[str, Value], _: Tensors) -> None:
    metadata["split.count"] = Value("u16", 3)


def _bad(wrong: str, *says: str, make: Make) -> Case:
    return export(wrong, _TO_JSON, "bad.gguf", *says, make=make)


HEADERS: tuple[Case, ...] = (
    _bad("an empty GGUF file", "the file is empty", make=file(b"")),
    _bad("a picture called .gguf", "not a GGUF file", make=file(PNG)),
    _bad("a GGUF file of two bytes", make=file(b"GG")),
    _bad("a GGUF file that ends after its magic", "the file ends within the version", make=file(b"GGUF")),
    _bad("a GGUF file of version 1", "version must be 2 or 3, got 1", make=at(4, "<I", 1)),
    _bad("a GGUF file of version 4", "version must be 2 or 3, got 4", make=at(4, "<I", 4)),
    _bad("a big-endian GGUF file", "a big-endian GGUF file", make=at(4, ">I", 3)),
    _bad("a GGUF file of 2^63 tensors", "tensors, more than", make=at(8, "<Q", 2**63)),
    _bad("a GGUF file of 2^64-1 entries", "metadata entries, more than", make=at(16, "<Q", 2**64 - 1)),
    _bad("a GGUF file with an entry less", make=at(16, "<Q", 1)),
    _bad(
        "a GGUF file cut short in its header", "than its 500 bytes can hold",
        make=patched(lambda raw: raw[:500]),
    ),
    _bad("a GGUF file cut short in its data", "it is cut short", make=patched(lambda raw: raw[:-1000])),
    _bad(
        "a key of 2^62 bytes", "the key of metadata entry 0",
        make=file(raw([struct.pack("<Q", 2**62) + b"x" * 64])),
    ),
    _bad("a key of no letters", "the key of metadata entry 0", make=file(raw([_key(b"", 4, bytes(4))]))),
    _bad("a key that is no UTF-8", "is not UTF-8", make=file(raw([_key(b"\xff\xfe", 4, bytes(4))]))),
    _bad(
        "a key that stands twice", "'general.architecture' stands twice", make=file(raw([_ARCHITECTURE] * 2)),
    ),
    _bad("a value of an unknown kind", "unknown kind 99", make=file(raw([_key(b"a", 99, bytes(64))]))),
    _bad("a boolean of 2", "neither 0 nor 1", make=file(raw([_key(b"a", 7, b"\2" + bytes(64))]))),
    _bad(
        "a string of 2^60 bytes", "the file ends within",
        make=file(raw([_key(b"a", 8, struct.pack("<Q", 2**60))])),
    ),
    _bad(
        "an array of 2^61 elements", "elements",
        make=file(raw([_key(b"a", 9, struct.pack("<IQ", 0, 2**61))])),
    ),
    _bad(
        "arrays within arrays, 64 deep", "deep",
        make=file(raw([_key(b"a", 9, struct.pack("<IQ", 9, 1) * 64)])),
    ),
    _bad(
        "an alignment of 0", "general.alignment must be a power of two",
        make=file(raw([_key(b"general.alignment", 4, bytes(4))])),
    ),
    _bad(
        "an alignment of 24", "got u32 24",
        make=file(raw([_key(b"general.alignment", 4, struct.pack("<I", 24))])),
    ),
)  # fmt: skip

TENSORS: tuple[Case, ...] = (
    _bad(
        "a tensor of no axes", "must have 1 to 4 axes, it says 0",
        make=file(raw(tensors=[_tensor(shape=())])),
    ),
    _bad(
        "a tensor of 5 axes", "must have 1 to 4 axes, it says 5",
        make=file(raw(tensors=[_tensor(shape=(1,) * 5)])),
    ),
    _bad("a tensor with an axis of 0", "is empty", make=file(raw(tensors=[_tensor(shape=(32, 0))]))),
    _bad("a tensor of 2^63 numbers", "would take", make=file(raw(tensors=[_tensor(shape=(2**63,))]))),
    _bad(
        "a tensor whose size overflows 64 bits", "would take",
        make=file(raw(tensors=[_tensor(shape=(2**32,) * 4)])),
    ),
    _bad(
        "a tensor of an unknown type", "is of type 250, unknown here",
        make=file(raw(tensors=[_tensor(kind=250)])),
    ),
    _bad(
        "a row that is no whole block", "packs blocks of 256",
        make=file(raw(tensors=[_tensor(shape=(33,), kind=12)])),
    ),
    _bad(
        "a tensor's name of 64 bytes", "must be 1 to 63 bytes", make=file(raw(tensors=[_tensor(b"n" * 64)])),
    ),
    _bad(
        "a tensor that stands twice", "'a' stands twice",
        make=file(raw(tensors=[_tensor(), _tensor(offset=128)])),
    ),
    _bad(
        "an offset that is not aligned", "must be a multiple of 32",
        make=file(raw(tensors=[_tensor(offset=4)])),
    ),
    _bad("an offset beyond the file", "it is cut short", make=file(raw(tensors=[_tensor(offset=2**40)]))),
    _bad("tensors that overlap", "overlap", make=file(raw(tensors=[_tensor(), _tensor(b"b", offset=96)]))),
)  # fmt: skip

MODELS: tuple[Case, ...] = (
    _bad(
        "a GGUF file without an architecture", "general.architecture is missing",
        make=_without("architecture"),
    ),
    _bad("a dense GGUF model", "not a Mixture-of-Experts model", make=_without("expert_count")),
    _bad("a GGUF model of one expert", "expert_count is 1", make=_says("expert_count", Value("u32", 1))),
    _bad("a GGUF model without a top-k", "expert_used_count", make=_without("expert_used_count")),
    _bad(
        "a GGUF model with a top-k of 9 in 8", "must be within 1..8",
        make=_says("used_count", Value("u32", 9)),
    ),
    _bad("a GGUF model without a number of layers", "block_count", make=_without("block_count")),
    _bad("a GGUF model of 2^31 layers", "block_count", make=_says("block_count", Value("u32", 2**31))),
    _bad(
        "a GGUF model whose context is a string", "context_length",
        make=_says("context_length", Value("str", "x")),
    ),
    _bad("a GGUF model without experts' tensors", "no stacked experts", make=_drop("_exps")),
    _bad(
        "a GGUF model with experts missing in one tensor", "must have the 8 experts",
        make=told(_fewer_experts),
    ),
    _bad(
        "a part of a split GGUF model under another name", "a part of a model split in 3",
        make=told(_one_of_three),
    ),
    search(
        "a GGUF model without the embedding", "--model bad.gguf", "bad.gguf", "token_embd.weight",
        make=_drop("token_embd"),
    ),
    search(
        "a GGUF model of another architecture", "--model bad.gguf", "bad.gguf",
        make=_says("general.architecture", Value("str", "moe9000")),
    ),
    search(
        "a GGUF model as a budget's dense target", "--target bad.gguf", "bad.gguf", "experts",
        make=_without("expert_count"),
    ),
    export(
        "a GGUF model with NaN", "--model bad.gguf --uniform Q8_0 --out out.gguf", "bad.gguf", "blk.1",
        make=told(lambda *_: None),
    ),
)  # fmt: skip

CASES = (*HEADERS, *TENSORS, *MODELS)
