"""What a candidate makes of a GGUF file: the right bytes, of the predicted size, that llama.cpp runs."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compression import gguf_requantize
from compression.ggml import dequantize, quantize
from compression.gguf_file import GgufFile
from compression.gguf_inventory import describe_gguf
from compression.gguf_requantize import requantize
from evaluators.llama_cpp import file_logits, probe_file
from spaces.candidate import Candidate, MoeLayer
from spaces.gguf_layout import TensorInfo, Value, header
from spaces.inventory import Inventory
from tests.compression import tiny_gguf
from tests.compression.support import mixed_types, refused

ARCHITECTURES = ("deepseek2", "qwen3moe", "olmoe", "gpt-oss")
KEPT = ((0, 2, 3, 5, 7), (1, 2, 4, 6, 7))


def candidate(
    inventory: Inventory,
    types: Mapping[str, str] | str,
    kept: tuple[tuple[int, ...], ...] = KEPT,
    top_k: int | tuple[int, ...] = 2,
) -> Candidate:
    """Other experts in each layer; tensors not in `types` keep their type."""
    each = top_k if isinstance(top_k, tuple) else (top_k,) * len(inventory.moe_layers)
    layers = [MoeLayer(i, kept[n % len(kept)], each[n]) for n, i in enumerate(inventory.moe_layers)]
    chosen = inventory.uniform_plan(types).types if isinstance(types, str) else types
    named = dict(chosen)
    return Candidate(
        tuple(layers), tuple((t.name, named.get(t.name, t.fixed_type)) for t in inventory.quantizable)
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    experts = {f"blk.{i}.ffn_{n}_exps.weight": "MXFP4" for i in range(2) for n in ("gate", "up", "down")}
    return {
        a: tiny_gguf.write(folder / f"{a}.gguf", a, experts if a == "gpt-oss" else {}) for a in ARCHITECTURES
    }


def imatrix_of(inventory: Inventory) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    return {
        t.name: generator.gamma(1, 1, (t.shape[0] if len(t.shape) == 3 else 1, t.row)).astype(np.float32)
        for t in inventory.quantizable
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pruned_mixed_file_has_the_right_bytes_and_runs(
    architecture: str, models: dict[str, Path], tmp_path: Path
) -> None:
    source = GgufFile.open(models[architecture])
    inventory, out = describe_gguf(source), tmp_path / "out.gguf"
    assert inventory.experts == 8
    types = mixed_types(inventory)
    # Some copied as they are, and one that is only good with an imatrix.
    last = inventory.moe_layers[-1]
    types.pop(f"blk.{last}.ffn_up_exps.weight")
    types[f"blk.{last}.ffn_gate_exps.weight"] = "IQ2_XXS"
    wanted, imatrix = candidate(inventory, types), imatrix_of(inventory)
    seen: list[int] = []
    size = requantize(source, wanted, out, imatrix, seen.append)

    assert size == out.stat().st_size == inventory.file_bytes(wanted.plan) == seen[-1]
    assert seen == sorted(seen)
    assert os.listdir(tmp_path) == ["out.gguf"]
    made, experts = GgufFile.open(out), {m.layer: list(m.experts) for m in wanted.layers}
    assert list(made.tensors) == list(source.tensors)
    assert made.metadata == inventory.plan_metadata(wanted.plan)
    for t in inventory.tensors:
        stored = source.raw(t.name)
        if t.per_expert:
            assert t.layer is not None
            stored = stored.reshape(8, -1)[experts[t.layer]].reshape(5, *t.shape[1:-1], -1)
            stored = stored if len(t.shape) > 1 else stored.reshape(-1)
        type_name, was = dict(wanted.types).get(t.name, t.fixed_type), source.tensors[t.name].type_name
        if type_name != was:
            floats, squares = dequantize(stored, was), imatrix[t.name]
            if floats.ndim == 3:
                chosen = experts[t.layer] if t.per_expert and t.layer is not None else range(len(floats))
                parts = [quantize(f, type_name, squares[e]) for f, e in zip(floats, chosen, strict=True)]
                stored = np.stack(parts)
            else:
                stored = quantize(floats, type_name, squares[0])
        assert made.tensors[t.name].type_name == type_name
        np.testing.assert_array_equal(made.raw(t.name), stored)
    probe = probe_file(out, [1, 2, 3, 4], generate=8)
    assert len(probe.generated) == 8
    assert probe.model_bytes == sum(t.size for t in made.tensors.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_sees_the_file_that_numpy_slices_make(architecture: str, tmp_path: Path) -> None:
    source = GgufFile.open(tiny_gguf.write(tmp_path / "all.gguf", architecture))
    inventory = describe_gguf(source)
    requantize(source, candidate(inventory, {}), tmp_path / "ours.gguf")
    kept = {i: KEPT[n % 2] for n, i in enumerate(inventory.moe_layers)}
    tiny_gguf.write_pruned(tmp_path / "theirs.gguf", architecture, kept)
    windows = np.random.default_rng(0).integers(0, 90, (2, 24))
    ours, theirs, whole = (
        file_logits(tmp_path / f"{name}.gguf", windows, tmp_path / f"{name}.npy")
        for name in ("ours", "theirs", "all")
    )
    np.testing.assert_array_equal(ours, theirs)
    assert np.abs(ours - whole).max() > 0.1


def test_another_top_k_does_not_change_the_width_that_old_files_imply(
    models: dict[str, Path], tmp_path: Path
) -> None:
    source = GgufFile.open(models["qwen3moe"])
    assert "qwen3moe.expert_feed_forward_length" not in source.metadata
    inventory = describe_gguf(source)
    requantize(source, candidate(inventory, {}, top_k=1), tmp_path / "out.gguf")
    assert len(probe_file(tmp_path / "out.gguf", [1, 2], generate=2).generated) == 2


def test_chunks_threads_and_parts_do_not_change_the_file(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = GgufFile.open(models["olmoe"])
    inventory = describe_gguf(source)
    wanted, imatrix = candidate(inventory, "Q4_K"), imatrix_of(inventory)
    requantize(source, wanted, tmp_path / "whole.gguf", imatrix)
    monkeypatch.setattr(gguf_requantize, "_CHUNK", 700)
    requantize(source, wanted, tmp_path / "chunks.gguf", imatrix, threads=3)
    assert (tmp_path / "chunks.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()

    names, first = list(source.tensors), tmp_path / "part-00001-of-00002.gguf"
    for number, chosen in enumerate((names[:9], names[9:])):
        keys = {"split.no": Value("u16", number), "split.count": Value("u16", 2)}
        head = header(
            {**(source.metadata if number == 0 else {}), **keys}, [source.tensors[n].info for n in chosen]
        )
        data = b"".join(source.raw(n).tobytes() + bytes(-source.tensors[n].size % 32) for n in chosen)
        first.with_name(f"part-0000{number + 1}-of-00002.gguf").write_bytes(head + data)
    requantize(GgufFile.open(first), wanted, tmp_path / "parts.gguf", imatrix)
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_memory_stays_small(tmp_path: Path) -> None:
    """A stack of 128 MB, of which a few MB may be in memory."""
    infos = [
        TensorInfo("blk.0.ffn_gate_inp.weight", (64, 512), 0, 64 * 512 * 4),
        TensorInfo("blk.0.ffn_down_exps.weight", (64, 1024, 512), 0, 64 * 1024 * 512 * 4),
    ]
    numbers = {
        "expert_count": 64, "expert_used_count": 2, "block_count": 1, "embedding_length": 512,
        "attention.head_count": 8, "context_length": 9, "vocab_size": 9,
    }  # fmt: skip
    metadata = {f"any.{k}": Value("u32", v) for k, v in numbers.items()}
    path = tmp_path / "sparse.gguf"
    path.write_bytes(header({"general.architecture": Value("str", "any"), **metadata}, infos))
    os.truncate(path, path.stat().st_size + sum(t.size for t in infos))
    source = GgufFile.open(path)
    wanted = candidate(describe_gguf(source), "Q8_0", kept=(tuple(range(0, 64, 2)),))
    tracemalloc.start()
    try:
        requantize(source, wanted, tmp_path / "out.gguf", threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6


def test_what_llama_cpp_could_not_run_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    source, out = GgufFile.open(models["qwen3moe"]), tmp_path / "out.gguf"
    inventory = describe_gguf(source)
    fine = candidate(inventory, "Q8_0")

    def check(wanted: Candidate, *parts: str, imatrix: dict[str, np.ndarray] | None = None) -> None:
        refused(
            lambda: requantize(source, wanted, out, imatrix, name="candidate.json"), "candidate.json", *parts
        )
        assert os.listdir(tmp_path) == []

    def typed(name: str, type_name: str) -> Candidate:
        return replace(fine, types=tuple((n, type_name if n == name else t) for n, t in fine.types))

    stack = "blk.0.ffn_up_exps.weight"
    check(candidate(inventory, "Q8_0", (KEPT[0], KEPT[1][:4])), "differ by layer")
    check(candidate(inventory, "Q8_0", top_k=(1, 2)), "differ by layer")
    check(candidate(inventory, "Q8_0", ((0, 1),), top_k=3), "top_k must be within 1..2")
    check(candidate(inventory, "Q8_0", ((1, 0, 2),)), "ascending")
    check(candidate(inventory, "Q8_0", ((1, 8),)), "within 0..7")
    check(replace(fine, layers=fine.layers[:1]), "layers must be the MoE layers [0, 1]")
    check(replace(fine, types=fine.types[1:]), "types must name")
    check(typed(stack, "Q4_K_M"), stack, "did you mean 'Q4_K'")
    check(typed(stack, "I32"), stack, "unknown type of weights")
    check(typed(stack, "IQ2_S"), stack, "IQ2_S needs an imatrix", "--imatrix FILE")
    imatrix = imatrix_of(inventory)
    del imatrix[stack]
    check(typed(stack, "IQ1_S"), stack, "needs an imatrix of this tensor", "larger type", imatrix=imatrix)
    imatrix[stack] = np.ones((1, inventory.by_name[stack].row), np.float32)
    check(typed(stack, "IQ1_S"), "1 x 256 values", "8 x 256", imatrix=imatrix)
    # Types that llama-quantize takes for the embedding without an imatrix.
    requantize(source, typed("token_embd.weight", "IQ3_XXS"), out)


def _edited(
    path: Path, folder: Path, metadata: Mapping[str, Value], rename: Mapping[str, str] | None = None
) -> GgufFile:
    """The model with other metadata or names, its data unchanged."""
    source = GgufFile.open(path)
    infos = [replace(t.info, name=(rename or {}).get(t.name, t.name)) for t in source.tensors.values()]
    data = b"".join(source.raw(n).tobytes() + bytes(-t.size % 32) for n, t in source.tensors.items())
    out = folder / "edited.gguf"
    out.write_bytes(header({**source.metadata, **metadata}, infos) + data)
    return GgufFile.open(out)


def test_groups_are_pruned_evenly_and_stay_reachable(models: dict[str, Path], tmp_path: Path) -> None:
    groups = {
        "deepseek2.expert_group_count": Value("u32", 2),
        "deepseek2.expert_group_used_count": Value("u32", 1),
        "deepseek2.expert_used_count": Value("u32", 3),
    }
    source, out = _edited(models["deepseek2"], tmp_path, groups), tmp_path / "out.gguf"
    inventory = describe_gguf(source)
    assert (inventory.groups, inventory.top_k, inventory.moe_layers) == (2, 3, (1, 2))

    def attempt(kept: tuple[int, ...], top_k: int) -> None:
        requantize(source, candidate(inventory, {}, (kept,), top_k), out)

    refused(lambda: attempt((0, 1, 2, 4, 5), 2), "as many experts kept in each of the 2 groups")
    refused(lambda: attempt((0, 4), 1), "needs 2 experts kept per group, got 1")
    refused(lambda: attempt((0, 1, 4, 5), 3), "chooses its 3 experts from 1 groups, which keep 2 each")
    attempt((0, 1, 3, 4, 6, 7), 3)
    assert len(probe_file(out, [1, 2, 3], generate=2).generated) == 2


@pytest.mark.parametrize(
    ("role", "becomes", "reason"),
    [("attn_k", "ffn_gate_tid2eid", "fixed table"), ("attn_k", "ffn_up_chexps", "adjugate experts")],
)
def test_models_whose_experts_are_known_by_number_are_quantized_only(
    role: str, becomes: str, reason: str, models: dict[str, Path], tmp_path: Path
) -> None:
    renamed = {f"blk.0.{role}.weight": f"blk.0.{becomes}.weight"}
    source, out = _edited(models["olmoe"], tmp_path, {}, renamed), tmp_path / "out.gguf"
    inventory = describe_gguf(source)
    refused(lambda: requantize(source, candidate(inventory, "Q8_0"), out), reason, "must keep its 8 experts")
    requantize(source, candidate(inventory, "Q8_0", (tuple(range(8)),)), out)


def test_weights_that_are_not_finite_leave_nothing_behind(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = bytearray(models["olmoe"].read_bytes())
    stored = GgufFile.open(models["olmoe"]).tensors["blk.1.ffn_up_exps.weight"]
    at = stored.offset + stored.size // 8 * 4 + 8
    content[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    source = GgufFile.open(path)
    wanted = candidate(describe_gguf(source), "Q8_0")
    out = tmp_path / "out.gguf"
    refused(lambda: requantize(source, wanted, out), path, "blk.1.ffn_up_exps.weight, slice 4", "finite")
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_what_a_killed_conversion_left_goes(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / ".out.gguf.1.2.part").write_bytes(b"half")
    source = GgufFile.open(models["olmoe"])
    requantize(source, candidate(describe_gguf(source), "Q8_0"), tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == ["out.gguf"]


def test_the_place_of_the_file_is_checked(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = GgufFile.open(models["olmoe"])
    wanted = candidate(describe_gguf(source), "Q8_0")
    link = tmp_path / "link.gguf"
    link.symlink_to(source.path)
    refused(lambda: requantize(source, wanted, link), link, "is the model itself")
    refused(lambda: requantize(source, wanted, tmp_path), tmp_path, "is a folder")
    usage = type("usage", (), {"free": 10**5})
    monkeypatch.setattr(gguf_requantize.shutil, "disk_usage", lambda _: usage)
    refused(lambda: requantize(source, wanted, tmp_path / "new" / "out.gguf"), "100,000 free")
    assert not (tmp_path / "new").exists()
