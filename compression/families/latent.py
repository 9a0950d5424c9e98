"""Multi-head latent attention, as DeepSeek-V2 and V3 have it and llama.cpp's `deepseek2` runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

from compression.families.base import u32
from compression.families.experts import Deepseek
from compression.families.parts import Block, Layout
from compression.families.yarn import Yarn, settings_of, yarn
from spaces.gguf_layout import Value


def _latent(heads: int, nope: int, key: bool) -> Layout:
    """The key half (heads, latent, nope) or value half (heads, value, latent) of kv_b_proj."""

    def layout(x: Any) -> Any:
        per_head = x.reshape(heads, -1, x.shape[-1])
        return per_head[:, :nope].swapaxes(1, 2) if key else per_head[:, nope:]

    return layout


class Latent(Deepseek):
    """Attention, dense layers, experts and shared experts of `deepseek2`; a subclass adds its router."""

    architecture = "deepseek2"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "yarn")
    positive: ClassVar[tuple[str, ...]] = (
        "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "kv_lora_rank",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    )  # fmt: skip

    def feed_forward(self, block: Block) -> None:
        """The router's parts."""
        raise NotImplementedError

    @cached_property
    def yarn(self) -> Yarn | None:
        """How its rope is stretched."""
        return yarn(self.config, self.config.qk_rope_head_dim, self.name)

    @property
    def kv_values(self) -> int:
        c = self.config
        return int((c.kv_lora_rank + c.qk_rope_head_dim) * c.num_hidden_layers)

    def block(self, block: Block) -> None:
        c = self.config
        hidden, heads, latent = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
        nope, rope, value = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        block.norm("attn_norm", "input_layernorm", hidden)
        query = "self_attn.q_proj"
        if c.q_lora_rank is None:
            block.linear("attn_q", query, heads * (nope + rope), hidden)
        else:
            query = "self_attn.q_b_proj"
            block.linear("attn_q_a", "self_attn.q_a_proj", c.q_lora_rank, hidden)
            block.norm("attn_q_a_norm", "self_attn.q_a_layernorm", c.q_lora_rank)
            block.linear("attn_q_b", query, heads * (nope + rope), c.q_lora_rank)
        block.linear("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
        block.norm("attn_kv_a_norm", "self_attn.kv_a_layernorm", latent)
        # llama.cpp multiplies the non-rotary part of the query with attn_k_b.
        block.add(
            "attn_k_b", "self_attn.kv_b_proj.weight", heads, latent, nope,
            layout=_latent(heads, nope, True), output=(query, slice(0, nope)),
        )  # fmt: skip
        block.add(
            "attn_v_b", "self_attn.kv_b_proj.weight", heads, value, latent,
            layout=_latent(heads, nope, False),
        )  # fmt: skip
        block.linear("attn_output", "self_attn.o_proj", hidden, heads * value)
        block.norm("ffn_norm", "post_attention_layernorm", hidden)
        if not self.is_moe(block.layer or 0):
            return block.mlp("mlp", hidden, c.intermediate_size)
        self.feed_forward(block)
        block.experts("mlp.experts", self.expert_count, hidden, self.expert_width)
        self.shared(block)

    @property
    def _lite(self) -> bool:
        """Whether llama.cpp takes the model for a small one by its layers, whatever the metadata says."""
        c = self.config
        return c.num_hidden_layers in (26, 27) or (c.num_hidden_layers == 48 and c.vocab_size == 128256)

    def hyperparameters(self) -> dict[str, Value]:
        c = self.config
        values = super().hyperparameters() | {
            "attention.head_count_kv": u32(1),
            "attention.kv_lora_rank": u32(c.kv_lora_rank),
            "attention.key_length": u32(c.kv_lora_rank + c.qk_rope_head_dim),
            "attention.value_length": u32(c.kv_lora_rank),
            "attention.key_length_mla": u32(c.qk_nope_head_dim + c.qk_rope_head_dim),
            "attention.value_length_mla": u32(c.v_head_dim),
            "rope.dimension_count": u32(c.qk_rope_head_dim),
            # 0 tells that there is a whole query matrix; without the entry most layer counts fail to load.
            "attention.q_lora_rank": u32(c.q_lora_rank or 0),
        }
        return values | (self.yarn.latent_metadata() if self.yarn else {})

    def inexpressible(self) -> Iterator[str]:
        yield from super().inexpressible()
        if self.yarn:
            yield from self.yarn.refusals()
        if self.config.q_lora_rank is not None and self._lite:
            yield (
                f"q_lora_rank = {self.config.q_lora_rank} with {self.config.num_hidden_layers} layers "
                "(llama.cpp's deepseek2 expects a whole query matrix in a model of that size)"
            )
        if not getattr(self.config, "rope_interleave", True):
            yield "rope_interleave = False (llama.cpp's deepseek2 rotates neighbouring columns)"
        if self.config.attention_bias:
            yield "attention_bias = True (llama.cpp's deepseek2 has no biases)"

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        fields = super().config_of(metadata, shapes)
        rope = metadata["rope.dimension_count"]
        return fields | {
            "rope_parameters": fields["rope_parameters"] | settings_of(metadata, latent=True),
            "num_key_value_heads": fields["num_attention_heads"],
            "q_lora_rank": metadata.get("attention.q_lora_rank") or None,
            "kv_lora_rank": metadata["attention.kv_lora_rank"],
            "qk_rope_head_dim": rope,
            "qk_nope_head_dim": metadata["attention.key_length_mla"] - rope,
            "v_head_dim": metadata["attention.value_length_mla"],
        }
