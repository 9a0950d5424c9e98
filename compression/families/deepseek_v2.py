"""DeepSeek-V2: latent attention, softmax router, shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compression.families.base import boolean, u32
from compression.families.experts import SIGMOID, SOFTMAX
from compression.families.latent import Latent
from compression.families.parts import Block
from spaces.errors import UserError
from spaces.gguf_layout import Value


class DeepseekV2(Latent):
    model_type = "deepseek_v2"

    @property
    def _limited(self) -> bool:
        return bool(self.config.topk_method == "group_limited_greedy")

    @property
    def groups(self) -> int:
        return int(self.config.n_group) if self._limited else 1

    @property
    def groups_used(self) -> int:
        return int(self.config.topk_group) if self._limited else 1

    def feed_forward(self, block: Block) -> None:
        block.router("mlp.gate", self.expert_count, self.config.hidden_size)

    def hyperparameters(self) -> dict[str, Value]:
        return super().hyperparameters() | {
            "expert_weights_norm": boolean(False),
            "expert_gating_func": u32(SOFTMAX),
        }

    def inexpressible(self) -> Iterator[str]:
        yield from super().inexpressible()
        c = self.config
        if self._limited and c.topk_group < c.n_group:
            yield (
                f"group_limited_greedy routing to {c.topk_group} of {c.n_group} groups (llama.cpp ranks a "
                "group by its two best experts, DeepSeek-V2 by its best)"
            )
        if c.norm_topk_prob:
            yield "norm_topk_prob = True (transformers' deepseek_v2 does not renormalise)"

    def _check(self) -> None:
        super()._check()
        if self.config.topk_method not in ("greedy", "group_limited_greedy"):
            raise UserError(
                f"{self.name}: config.json: topk_method must be greedy or group_limited_greedy, "
                f"got {self.config.topk_method!r}"
            )

    @classmethod
    def reads(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return super().reads(metadata, shapes) and metadata.get("expert_gating_func") != SIGMOID

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        groups = metadata.get("expert_group_count", 1)
        return super().config_of(metadata, shapes) | {
            "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
            "n_group": groups,
            "topk_group": metadata.get("expert_group_used_count", 1),
            "norm_topk_prob": bool(metadata.get("expert_weights_norm", False)),
        }
