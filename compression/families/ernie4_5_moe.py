"""ERNIE 4.5: rotation of neighbouring columns, softmax router with a selection bias, shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compression.families.attention import GroupedQuery
from compression.families.base import u32
from compression.families.parts import Block
from spaces.gguf_layout import Value

_LEAST_SUM = 2.0**-14  # below it llama.cpp divides by this


def _only(x: Any) -> Any:
    """The bias (1, experts) of the one group of experts."""
    return x[0]


class Ernie45Moe(GroupedQuery):
    model_type = "ernie4_5_moe"
    architecture = "ernie4_5-moe"
    expert_field = "moe_num_experts"
    renormalises = True
    bias_field = "use_bias"
    positive = ("moe_intermediate_size",)

    def is_moe(self, layer: int) -> bool:
        c = self.config
        within = c.moe_layer_start_index <= layer <= c.moe_layer_end_index
        return within and (layer + 1) % c.moe_layer_interval == 0

    def feed_forward(self, block: Block) -> None:
        super().feed_forward(block)
        block.add(
            "exp_probs_b", "mlp.gate.moe_statics.e_score_correction_bias", self.expert_count, suffix="bias",
            per_expert=True, axis=1, layout=_only, aliases=["mlp.moe_statics.e_score_correction_bias"],
        )  # fmt: skip

    @property
    def _shared_width(self) -> int:
        return int(self.expert_width * self.config.moe_num_shared_experts)

    def shared(self, block: Block) -> None:
        if self._shared_width:
            block.mlp("mlp.shared_experts", self.config.hidden_size, self._shared_width, "_shexp")

    def hyperparameters(self) -> dict[str, Value]:
        return super().hyperparameters() | {
            "expert_feed_forward_length": u32(self.expert_width),
            "expert_shared_count": u32(self.config.moe_num_shared_experts),
            "expert_shared_feed_forward_length": u32(self._shared_width),
            "interleave_moe_layer_step": u32(1),
            "leading_dense_block_count": u32(self.moe_layers[0]),
        }

    def inexpressible(self) -> Iterator[str]:
        yield from super().inexpressible()
        c = self.config
        if self.moe_layers != tuple(range(self.moe_layers[0], c.num_hidden_layers)):
            yield (
                f"moe_layer_interval = {c.moe_layer_interval}, moe_layer_end_index = {c.moe_layer_end_index} "
                "(llama.cpp's ernie4_5-moe has experts in every layer after the first with any)"
            )
        if c.moe_norm_min > _LEAST_SUM:
            yield f"moe_norm_min = {c.moe_norm_min} (llama.cpp has {_LEAST_SUM:.2g})"

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width = metadata["expert_feed_forward_length"]
        # Its own converter writes another number than the tensor has.
        shared = next((s[0] for n, s in shapes.items() if n.endswith("ffn_gate_shexp.weight")), 0)
        return super().config_of(metadata, shapes) | {
            "moe_intermediate_size": width,
            "moe_num_shared_experts": shared // width,
            "moe_layer_start_index": metadata.get("leading_dense_block_count", 0),
            "moe_layer_interval": metadata.get("interleave_moe_layer_step", 1),
        }
