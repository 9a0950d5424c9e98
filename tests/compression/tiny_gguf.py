"""Small random models of several architectures, written by the gguf library: arrays first, file second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np

from tests.evaluators.tiny_deepseek import random_model, tensors
from tests.evaluators.tiny_deepseek import write_gguf as write_deepseek

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH, HEADS, HEAD, VOCABULARY = 2, 8, 2, 256, 256, 4, 64, 96
Arrays = dict[str, np.ndarray]


def _arrays(architecture: str) -> Arrays:
    generator = np.random.default_rng(3)
    out: Arrays = {}

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        out[name] = generator.normal(mean, 0.08, shape).astype(np.float32)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output_norm.weight", HIDDEN, mean=1)
    add("output.weight", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        block, kv = f"blk.{layer}.", HEADS if architecture == "olmoe" else HEADS // 2
        biased = architecture == "gpt-oss"
        add(block + "attn_norm.weight", HIDDEN, mean=1)
        add(block + ("post_attention_norm.weight" if biased else "ffn_norm.weight"), HIDDEN, mean=1)
        add(block + "attn_q.weight", HEADS * HEAD, HIDDEN)
        add(block + "attn_k.weight", kv * HEAD, HIDDEN)
        add(block + "attn_v.weight", kv * HEAD, HIDDEN)
        add(block + "attn_output.weight", HIDDEN, HEADS * HEAD)
        if biased:
            add(block + "attn_sinks.weight", HEADS)
            add(block + "attn_output.bias", HIDDEN)
            add(block + "ffn_gate_inp.bias", EXPERTS)
            for name, width in (("gate", WIDTH), ("up", WIDTH), ("down", HIDDEN)):
                add(block + f"ffn_{name}_exps.bias", EXPERTS, width)
        else:
            width = HEADS * HEAD if architecture == "olmoe" else HEAD
            add(block + "attn_q_norm.weight", width, mean=1)
            add(block + "attn_k_norm.weight", width, mean=1)
        add(block + "ffn_gate_inp.weight", EXPERTS, HIDDEN)
        add(block + "ffn_gate_exps.weight", EXPERTS, WIDTH, HIDDEN)
        add(block + "ffn_up_exps.weight", EXPERTS, WIDTH, HIDDEN)
        add(block + "ffn_down_exps.weight", EXPERTS, HIDDEN, WIDTH)
    return out


def _write(
    path: Path, architecture: str, arrays: Mapping[str, np.ndarray], experts: int, types: Mapping[str, str]
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"tiny {architecture}")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    # As old converters wrote it: the experts' width is this by the top-k, but for olmoe.
    writer.add_feed_forward_length(WIDTH if architecture == "olmoe" else WIDTH * TOP_K)
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(WIDTH)
        writer.add_sliding_window(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS if architecture == "olmoe" else HEADS // 2)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(TOP_K)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(VOCABULARY)
    for name, value in arrays.items():
        kind = gguf.GGMLQuantizationType[types.get(name, "F32")]
        data = np.ascontiguousarray(value)
        writer.add_tensor(name, data if kind == 0 else gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write(path: Path, architecture: str, types: Mapping[str, str] | None = None) -> Path:
    """A model with all its experts; F32 but for `types`."""
    if architecture == "deepseek2":
        return write_deepseek(path, random_model())
    return _write(path, architecture, _arrays(architecture), EXPERTS, types or {})


def write_pruned(path: Path, architecture: str, kept: Mapping[int, tuple[int, ...]]) -> Path:
    """The same model with only these experts, sliced here: what an F32 export must equal in llama.cpp."""
    from tests.evaluators import tiny_deepseek

    model = random_model() if architecture == "deepseek2" else None
    arrays = tensors(model) if model is not None else _arrays(architecture)
    for layer, experts in kept.items():
        for name in [n for n in arrays if n.startswith(f"blk.{layer}.")]:
            if any(part in name for part in ("_exps.", "ffn_gate_inp.", "exp_probs_b")):
                arrays[name] = arrays[name][list(experts)]
    count = len(next(iter(kept.values())))
    if model is None:
        return _write(path, architecture, arrays, count, {})
    patched: dict[str, Callable[..., Arrays] | int] = {"tensors": lambda _: arrays, "EXPERTS": count}
    before = {name: getattr(tiny_deepseek, name) for name in patched}
    for name, value in patched.items():
        setattr(tiny_deepseek, name, value)
    try:
        return write_deepseek(path, model)
    finally:
        for name, value in before.items():
            setattr(tiny_deepseek, name, value)
