"""Grouped-query attention, and the blocks of the families that have it in every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

from compression.families.base import Family, u32
from compression.families.parts import Block, rotary, whole
from compression.families.yarn import Yarn, settings_of, yarn
from spaces.gguf_layout import Value

Shapes = Mapping[str, tuple[int, ...]]


class GroupedQuery(Family):
    """Blocks of a norm, attention, a norm and a feed-forward network with or without experts.

    Attributes:
        interleaved: Whether llama.cpp rotates neighbouring rows of a head, where transformers rotates
            its first half against the second.
        bias_field: The config's field that gives the projections biases.
        biased: Which of q, k, v and o it gives them to.
        adds_output_bias: Whether llama.cpp's graph adds a bias after the output projection.
        norm_spans: What q_norm and k_norm scale: each "head" or the "whole" projection.
        square: Whether llama.cpp wants the heads together to be as wide as the model.
        own_keys: Whether llama.cpp wants as many key as query heads.
        second_norm: GGUF's name of the norm before the feed-forward network.
        old_routers: Older names of the router's module on disk.
        each, fused: Older names of experts on disk, as `Block.experts` takes them, below the block.
    """

    interleaved: ClassVar[bool] = False
    bias_field: ClassVar[str] = "attention_bias"
    biased: ClassVar[str] = "qkvo"
    adds_output_bias: ClassVar[bool] = False
    norm_spans: ClassVar[str] = "head"
    square: ClassVar[bool] = False
    own_keys: ClassVar[bool] = False
    second_norm: ClassVar[str] = "ffn_norm"
    old_routers: ClassVar[tuple[str, ...]] = ()
    each: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    fused: ClassVar[tuple[tuple[str, str], ...]] = ()
    rope_types = ("default", "yarn")

    @property
    def has_bias(self) -> bool:
        return bool(getattr(self.config, self.bias_field, False))

    @property
    def normed(self) -> bool:
        """Whether queries and keys are normed."""
        return False

    @property
    def rotary_size(self) -> int:
        """Columns of a head that are rotated."""
        return self.head_size

    @cached_property
    def yarn(self) -> Yarn | None:
        """How its rope is stretched."""
        return yarn(self.config, self.rotary_size, self.name)

    def block(self, block: Block) -> None:
        c = self.config
        block.norm("attn_norm", "input_layernorm", c.hidden_size)
        self.attention(block)
        block.norm(self.second_norm, "post_attention_layernorm", c.hidden_size)
        if not self.is_moe(block.layer or 0):
            return block.mlp("mlp", c.hidden_size, c.intermediate_size)
        self.feed_forward(block)
        block.experts(
            self.experts,
            self.expert_count,
            c.hidden_size,
            self.expert_width,
            each=self.each,
            fused=self.fused,
        )
        self.shared(block)

    def attention(self, block: Block) -> None:
        """The parts of the attention."""
        c, size = self.config, self.head_size
        for letter, heads in (
            ("q", c.num_attention_heads), ("k", c.num_key_value_heads), ("v", c.num_key_value_heads),
        ):  # fmt: skip
            block.linear(
                f"attn_{letter}", f"self_attn.{letter}_proj", heads * size, c.hidden_size,
                bias=self.has_bias and letter in self.biased,
                layout=rotary(heads) if self.interleaved and letter != "v" else whole,
            )  # fmt: skip
            if self.normed and letter != "v":
                span = size if self.norm_spans == "head" else heads * size
                block.norm(f"attn_{letter}_norm", f"self_attn.{letter}_norm", span)
        block.linear(
            "attn_output", "self_attn.o_proj", c.hidden_size, c.num_attention_heads * size,
            bias=self.has_bias and "o" in self.biased,
        )  # fmt: skip

    def feed_forward(self, block: Block) -> None:
        """The router's parts."""
        block.router(self.router, self.expert_count, self.config.hidden_size, aliases=self.old_routers)

    def shared(self, block: Block) -> None:
        """The parts of the shared experts, of which there are none."""

    def hyperparameters(self) -> dict[str, Value]:
        values = super().hyperparameters() | {
            "attention.key_length": u32(self.head_size),
            "attention.value_length": u32(self.head_size),
            "rope.dimension_count": u32(self.rotary_size),
        }
        return values | (self.yarn.metadata() if self.yarn else {})

    def approximations(self) -> Iterator[str]:
        yield from super().approximations()
        if self.yarn:
            yield from self.yarn.rounding()

    def inexpressible(self) -> Iterator[str]:
        yield from super().inexpressible()
        c, arch = self.config, self.architecture
        if self.yarn:
            yield from self.yarn.refusals()
        if self.has_bias and "o" in self.biased and not self.adds_output_bias:
            yield f"{self.bias_field} = True (llama.cpp's {arch} adds no bias to attention's output)"
        if self.square and c.num_attention_heads * self.head_size != c.hidden_size:
            yield (
                f"{c.num_attention_heads} heads of {self.head_size} "
                f"(llama.cpp's {arch} takes them to be as wide as hidden_size, {c.hidden_size}, together)"
            )
        if self.own_keys and c.num_key_value_heads != c.num_attention_heads:
            yield (
                f"num_key_value_heads = {c.num_key_value_heads} (llama.cpp's {arch} has one for each of "
                f"{c.num_attention_heads} heads)"
            )
        window = getattr(c, "sliding_window", None)
        types = getattr(c, "layer_types", None) or ["sliding_attention"]
        if window and "sliding_attention" in types and window < c.max_position_embeddings:
            yield f"sliding_window = {window} (llama.cpp's {arch} attends to all tokens)"

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        fields = super().config_of(metadata, shapes)
        heads = metadata["attention.head_count"]
        fields["head_dim"] = metadata.get("attention.key_length", metadata["embedding_length"] // heads)
        fields["rope_parameters"] |= settings_of(metadata)
        fields[cls.bias_field] = "blk.0.attn_q.bias" in shapes
        return fields
