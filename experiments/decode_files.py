"""GGUF files to time decoding with: a Mixture-of-Experts of a known family, made of random blocks.

What a token costs depends on shapes and types, not on values. So a pool of a million random weights is
quantized once per type by ggml, and its blocks are repeated to fill every tensor: a file of any mixture of
types costs as much as writing it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compression.families import family
from compression.files import atomic
from compression.ggml import quantize
from spaces.gguf_layout import ALIGNMENT, Value, header
from spaces.inventory import Inventory
from spaces.plan import Plan

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 8192,
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 8, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
"""Rows of Qwen3-30B-A3B. All eight experts may be active, so that a small file is much to read."""

_POOL = 2**20


def inventory(layers: int) -> Inventory:
    """The model with so many layers: 48 million weights each, and 34 million outside them."""
    return family({**CONFIG, "num_hidden_layers": layers}, f"random-{layers}").inventory()


class Files:
    """Writes files of the model, quantizing for each type once.

    Attributes:
        model: The model.
        folder: Where they lie.
    """

    def __init__(self, model: Inventory, folder: Path) -> None:
        self.model, self.folder = model, folder
        self._blocks: dict[tuple[str, int], np.ndarray] = {}
        self._pool = np.random.default_rng(0).standard_normal(_POOL, np.float32)

    def write(self, name: str, plan: Plan) -> Path:
        """NAME.gguf in `plan`'s types, of which the tokenizer is left out; kept if it is there already."""
        path = self.folder / f"{name}.gguf"
        if path.exists():
            return path
        infos = self.model.infos(plan)
        metadata = {**self.model.plan_metadata(plan), "tokenizer.ggml.model": Value("str", "none")}
        types = dict(plan.types)
        with atomic(path) as stream:
            stream.write(header(metadata, infos))
            for info, tensor in zip(infos, self.model.tensors, strict=True):
                blocks = self._rows(types.get(tensor.name, tensor.fixed_type), tensor.row)
                left = info.size
                while left > 0:
                    left -= stream.write(blocks.reshape(-1)[:left].data)
                stream.write(b"\0" * (-info.size % ALIGNMENT))
        return path

    def _rows(self, type_name: str, row: int) -> np.ndarray:
        """(rows, bytes) blocks of the pool, cut into rows of `row` weights."""
        key = type_name, row
        if key not in self._blocks:
            weights = self._pool[: _POOL // row * row].reshape(-1, row) * np.float32(row**-0.5)
            self._blocks[key] = quantize(weights, type_name, np.ones(row, np.float32))
        return self._blocks[key]
