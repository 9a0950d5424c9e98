"""Qwen3-Next: gated delta nets, every fourth layer gated attention instead; experts beside a shared one.

The layers for further tokens of the published checkpoints (`mtp.*`) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from compression.families.base import u32
from compression.families.experts import GatedShared
from compression.families.parts import Block, Code, Layout
from spaces.gguf_layout import Value

# A_log is the logarithm of a decay; llama.cpp has the decay, negative.
_DECAY = Code(lambda x: -np.exp(x), lambda x: np.log(-x))
_L2_EPSILON = 1e-6  # transformers' when it normalises the delta net's queries and keys


def _cut(heads: int, *pieces: slice) -> Layout:
    """Rows that each key head has in `pieces` of its own, those of all heads together piece by piece."""

    def layout(x: Any) -> Any:
        per_head = x.reshape(heads, -1, x.shape[-1])
        return tuple(per_head[:, piece] for piece in pieces)

    return layout


class Qwen3Next(GatedShared):
    model_type = "qwen3_next"
    architecture = "qwen3next"
    renormalises = True
    norm_plus = 1.0
    positive: ClassVar[tuple[str, ...]] = (
        "moe_intermediate_size", "shared_expert_intermediate_size", "head_dim", "num_key_value_heads",
        "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
        "linear_num_value_heads",
    )  # fmt: skip

    def _attends(self, layer: int) -> bool:
        return bool(self.config.layer_types[layer] == "full_attention")

    @property
    def _full(self) -> list[int]:
        return [i for i in range(self.config.num_hidden_layers) if self._attends(i)]

    @property
    def _interval(self) -> int:
        """Every how many layers there is attention; 0 where llama.cpp's rule does not give the layers."""
        c = self.config
        interval = self._full[0] + 1 if self._full else c.num_hidden_layers + 1
        regular = list(range(interval - 1, c.num_hidden_layers, interval))
        return interval if self._full == regular else 0

    @property
    def kv_values(self) -> int:
        return int(2 * self.config.num_key_value_heads * self.head_size * len(self._full))

    def block(self, block: Block) -> None:
        c, hidden = self.config, self.config.hidden_size
        block.norm("attn_norm", "input_layernorm", hidden, plus=1.0)
        if self._attends(block.layer or 0):
            self._attention(block)
        else:
            self._delta_net(block)
        block.norm("post_attention_norm", "post_attention_layernorm", hidden, plus=1.0)
        if not self.is_moe(block.layer or 0):
            return block.mlp("mlp", hidden, c.intermediate_size)
        block.router("mlp.gate", self.expert_count, hidden)
        block.experts("mlp.experts", self.expert_count, hidden, self.expert_width)
        self.shared(block)

    def _attention(self, block: Block) -> None:
        c, size, hidden = self.config, self.head_size, self.config.hidden_size
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        # Each head's query rows are followed by those of its gate, as in GGUF.
        block.linear("attn_q", "self_attn.q_proj", 2 * heads * size, hidden)
        block.norm("attn_q_norm", "self_attn.q_norm", size, plus=1.0)
        block.linear("attn_k", "self_attn.k_proj", groups * size, hidden)
        block.norm("attn_k_norm", "self_attn.k_norm", size, plus=1.0)
        block.linear("attn_v", "self_attn.v_proj", groups * size, hidden)
        block.linear("attn_output", "self_attn.o_proj", hidden, heads * size)

    def _delta_net(self, block: Block) -> None:
        c, hidden = self.config, self.config.hidden_size
        heads, values = c.linear_num_key_heads, c.linear_num_value_heads
        key, value = c.linear_key_head_dim, c.linear_value_head_dim
        every = values * value  # rows of all value heads
        # In memory each key head has its query, key, values and gates; GGUF has the gates apart.
        begin, end = 2 * key, 2 * key + every // heads
        block.linear(
            "attn_qkv", "linear_attn.in_proj_qkvz", 2 * heads * key + every, hidden,
            layout=_cut(heads, slice(0, key), slice(key, begin), slice(begin, end)),
        )  # fmt: skip
        block.linear(
            "attn_gate", "linear_attn.in_proj_qkvz", every, hidden, layout=_cut(heads, slice(end, None))
        )
        block.add(
            "ssm_conv1d", "linear_attn.conv1d.weight", 2 * heads * key + every, c.linear_conv_kernel_dim,
            quantizable=False,
        )  # fmt: skip
        block.add("ssm_dt", "linear_attn.dt_bias", values, suffix="bias")
        block.add("ssm_a", "linear_attn.A_log", values, suffix="", code=_DECAY)
        block.linear("ssm_ba", "linear_attn.in_proj_ba", 2 * values, hidden)
        block.norm("ssm_norm", "linear_attn.norm", value)
        block.linear("ssm_out", "linear_attn.out_proj", hidden, every)

    def hyperparameters(self) -> dict[str, Value]:
        c = self.config
        return super().hyperparameters() | {
            "attention.key_length": u32(self.head_size),
            "attention.value_length": u32(self.head_size),
            "rope.dimension_count": u32(self.head_size * c.rope_parameters.get("partial_rotary_factor", 1.0)),
            "full_attention_interval": u32(self._interval),
            "ssm.conv_kernel": u32(c.linear_conv_kernel_dim),
            "ssm.state_size": u32(c.linear_key_head_dim),
            "ssm.group_count": u32(c.linear_num_key_heads),
            "ssm.time_step_rank": u32(c.linear_num_value_heads),
            "ssm.inner_size": u32(c.linear_num_value_heads * c.linear_value_head_dim),
        }

    def inexpressible(self) -> Iterator[str]:
        yield from super().inexpressible()
        c = self.config
        if not self._interval:
            yield f"attention in layers {self._full} (llama.cpp's qwen3next has it in every n-th)"
        if c.linear_key_head_dim != c.linear_value_head_dim:
            yield (
                f"linear_key_head_dim = {c.linear_key_head_dim} and linear_value_head_dim = "
                f"{c.linear_value_head_dim} (llama.cpp's qwen3next has one size for both)"
            )
        if c.rms_norm_eps != _L2_EPSILON:
            yield (
                f"rms_norm_eps = {c.rms_norm_eps} (llama.cpp's qwen3next normalises the delta net's queries "
                f"and keys with it, transformers with {_L2_EPSILON})"
            )
        if c.attention_bias:
            yield "attention_bias = True (llama.cpp's qwen3next has no biases)"

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        fields = super().config_of(metadata, shapes)
        size, values = metadata["attention.key_length"], metadata["ssm.time_step_rank"]
        rope = {"partial_rotary_factor": metadata["rope.dimension_count"] / size}
        attends = [f"blk.{i}.attn_q.weight" in shapes for i in range(fields["num_hidden_layers"])]
        return fields | {
            "rope_parameters": fields["rope_parameters"] | rope,
            "head_dim": size,
            "layer_types": ["full_attention" if a else "linear_attention" for a in attends],
            "linear_conv_kernel_dim": metadata["ssm.conv_kernel"],
            "linear_key_head_dim": metadata["ssm.state_size"],
            "linear_value_head_dim": metadata["ssm.inner_size"] // values,
            "linear_num_key_heads": metadata["ssm.group_count"],
            "linear_num_value_heads": values,
        }
