"""Routed and shared experts as several families have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from compression.families.base import Family, boolean, f32, shortest, u32
from compression.families.parts import Block
from spaces.gguf_layout import Value

Shapes = Mapping[str, tuple[int, ...]]

SOFTMAX, SIGMOID = 1, 2
"""llama.cpp's numbers of `expert_gating_func`."""


class Stepped(Family):
    """Experts in every n-th layer but those named, as Qwen's configs say it."""

    def is_moe(self, layer: int) -> bool:
        c = self.config
        return layer not in c.mlp_only_layers and (layer + 1) % c.decoder_sparse_step == 0

    def hyperparameters(self) -> dict[str, Value]:
        return super().hyperparameters() | {"expert_feed_forward_length": u32(self.expert_width)}

    def inexpressible(self) -> Iterator[str]:
        yield from super().inexpressible()
        if len(self.moe_layers) < self.config.num_hidden_layers:
            yield f"dense layers (llama.cpp's {self.architecture} has experts in every layer)"

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        return super().config_of(metadata, shapes) | {
            "moe_intermediate_size": metadata["expert_feed_forward_length"],
            "norm_topk_prob": bool(cls.renormalises),
        }


class GatedShared(Stepped):
    """Beside the routed experts a shared one behind a sigmoid gate, as Qwen's configs say it."""

    def shared(self, block: Block) -> None:
        """The parts of the shared expert."""
        c = self.config
        block.add("ffn_gate_inp_shexp", "mlp.shared_expert_gate.weight", c.hidden_size)
        block.mlp("mlp.shared_expert", c.hidden_size, c.shared_expert_intermediate_size, "_shexp")

    def hyperparameters(self) -> dict[str, Value]:
        width = u32(self.config.shared_expert_intermediate_size)
        return super().hyperparameters() | {"expert_shared_feed_forward_length": width}

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        width = shapes["blk.0.ffn_gate_shexp.weight"][0]
        return super().config_of(metadata, shapes) | {"shared_expert_intermediate_size": width}


class Deepseek(Family):
    """Dense layers first, then layers of routed and shared experts, as DeepSeek's configs say it."""

    expert_field = "n_routed_experts"
    positive: ClassVar[tuple[str, ...]] = ("moe_intermediate_size", "n_routed_experts", "n_shared_experts")

    def shared(self, block: Block) -> None:
        """The parts of the shared experts, which are one network."""
        width = self.expert_width * self.config.n_shared_experts
        block.mlp("mlp.shared_experts", self.config.hidden_size, width, "_shexp")

    def hyperparameters(self) -> dict[str, Value]:
        c = self.config
        return super().hyperparameters() | {
            "leading_dense_block_count": u32(c.first_k_dense_replace),
            "expert_feed_forward_length": u32(self.expert_width),
            "expert_shared_count": u32(c.n_shared_experts),
            "expert_weights_scale": f32(c.routed_scaling_factor),
        }

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        return super().config_of(metadata, shapes) | {
            "first_k_dense_replace": metadata.get("leading_dense_block_count", 0),
            "moe_intermediate_size": metadata["expert_feed_forward_length"],
            "n_shared_experts": metadata["expert_shared_count"],
            # llama.cpp scales by nothing where the entry is missing or 0.
            "routed_scaling_factor": shortest(metadata.get("expert_weights_scale") or 1.0),
        }


class Sigmoid(Deepseek):
    """Sigmoid scores, a bias that only selects, and groups ranked by their two best experts."""

    scoring = "sigmoid"
    least_per_group = 2

    @property
    def groups(self) -> int:
        return int(self.config.n_group)

    def feed_forward(self, block: Block) -> None:
        """The router's parts."""
        block.router("mlp.gate", self.expert_count, self.config.hidden_size)
        block.add(
            "exp_probs_b",
            "mlp.gate.e_score_correction_bias",
            self.expert_count,
            suffix="bias",
            per_expert=True,
        )

    def hyperparameters(self) -> dict[str, Value]:
        c = self.config
        values = super().hyperparameters() | {
            "expert_weights_norm": boolean(c.norm_topk_prob),
            "expert_gating_func": u32(SIGMOID),
        }
        # llama.cpp aborts on groups that are all used, which is as good as none.
        if c.n_group > c.topk_group:
            values["expert_group_count"] = u32(c.n_group)
            values["expert_group_used_count"] = u32(c.topk_group)
        return values

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        return super().config_of(metadata, shapes) | {
            "norm_topk_prob": bool(metadata.get("expert_weights_norm", False)),
            "n_group": metadata.get("expert_group_count", 1),
            "topk_group": metadata.get("expert_group_used_count", 1),
        }
