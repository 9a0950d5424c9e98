"""gpt-oss: attention sinks, every other layer within a window, clamped experts with biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

from compression.families.base import Family, u32
from compression.families.parts import Block, Layout
from compression.families.yarn import Yarn, settings_of, yarn
from spaces.gguf_layout import Value

_ALPHA, _LIMIT = 1.702, 7.0  # of llama.cpp's activation, whatever the file says


def _every_other(first: int) -> Layout:
    """The gate (0) or up (1) rows of matrices (experts, hidden, 2 * width) or biases (experts, 2 * width)."""

    def layout(x: Any) -> Any:
        return x[..., first::2].swapaxes(1, -1)

    return layout


def _transposed(x: Any) -> Any:
    """Rows of matrices (experts, width, hidden); biases (experts, hidden) as they are."""
    return x.swapaxes(1, -1)


class GptOss(Family):
    model_type = "gpt_oss"
    architecture = "gpt-oss"
    router = "mlp.router"
    expert_field = "num_local_experts"
    ties = False
    rope_types: ClassVar[tuple[str, ...]] = ("default", "yarn")
    positive = ("head_dim", "num_key_value_heads", "sliding_window")

    @property
    def expert_width(self) -> int:
        return int(self.config.intermediate_size)

    @cached_property
    def yarn(self) -> Yarn | None:
        """How its rope is stretched."""
        return yarn(self.config, self.head_size, self.name)

    def block(self, block: Block) -> None:
        c, size, hidden = self.config, self.head_size, self.config.hidden_size
        heads, groups, bias = c.num_attention_heads, c.num_key_value_heads, c.attention_bias
        block.norm("attn_norm", "input_layernorm", hidden)
        block.linear("attn_q", "self_attn.q_proj", heads * size, hidden, bias=bias)
        block.linear("attn_k", "self_attn.k_proj", groups * size, hidden, bias=bias)
        block.linear("attn_v", "self_attn.v_proj", groups * size, hidden, bias=bias)
        block.linear("attn_output", "self_attn.o_proj", hidden, heads * size, bias=bias)
        block.add("attn_sinks", "self_attn.sinks", heads)
        block.norm("post_attention_norm", "post_attention_layernorm", hidden)
        block.router("mlp.router", self.expert_count, hidden)
        block.add("ffn_gate_inp", "mlp.router.bias", self.expert_count, suffix="bias", per_expert=True)
        self._experts(block)

    def _experts(self, block: Block) -> None:
        count, hidden, width = self.expert_count, self.config.hidden_size, self.expert_width
        for role, parameter, rows, columns, layout in (
            ("ffn_gate_exps", "gate_up_proj", width, hidden, _every_other(0)),
            ("ffn_up_exps", "gate_up_proj", width, hidden, _every_other(1)),
            ("ffn_down_exps", "down_proj", hidden, width, _transposed),
        ):
            path = f"mlp.experts.{parameter}"
            block.add(role, path, count, rows, columns, per_expert=True, layout=layout)
            block.add(role, f"{path}_bias", count, rows, suffix="bias", per_expert=True, layout=layout)

    def hyperparameters(self) -> dict[str, Value]:
        values = {
            "attention.key_length": u32(self.head_size),
            "attention.value_length": u32(self.head_size),
            "rope.dimension_count": u32(self.head_size),
            "attention.sliding_window": u32(self.config.sliding_window),
            "expert_feed_forward_length": u32(self.expert_width),
        }
        return values | (self.yarn.metadata() if self.yarn else {})

    def approximations(self) -> Iterator[str]:
        if self.yarn:
            yield from self.yarn.rounding()

    def inexpressible(self) -> Iterator[str]:
        c = self.config
        if self.yarn:
            yield from self.yarn.fixed()
        if c.swiglu_alpha != _ALPHA or c.swiglu_limit != _LIMIT:
            yield (
                f"swiglu_alpha = {c.swiglu_alpha} and swiglu_limit = {c.swiglu_limit} "
                f"(llama.cpp's gpt-oss has {_ALPHA} and {_LIMIT})"
            )
        kinds = ("sliding_attention", "full_attention")
        if list(c.layer_types) != [kinds[i % 2] for i in range(c.num_hidden_layers)]:
            yield "layer_types (llama.cpp's gpt-oss has a window in every other layer, from the first)"
        if not c.attention_bias:
            yield "attention_bias = False (llama.cpp's gpt-oss needs biases)"

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        fields = super().config_of(metadata, shapes)
        return fields | {
            "rope_parameters": fields["rope_parameters"] | settings_of(metadata),
            "head_dim": metadata["attention.key_length"],
            "intermediate_size": metadata["expert_feed_forward_length"],
            "sliding_window": metadata["attention.sliding_window"],
            "attention_bias": "blk.0.attn_q.bias" in shapes,
        }
