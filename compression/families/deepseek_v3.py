"""DeepSeek-V3: latent attention, sigmoid router with a selection bias, shared expert.

The multi-token-prediction layer of the published checkpoint is left out, as every
llama.cpp conversion for decoding does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compression.families.experts import SIGMOID, Sigmoid
from compression.families.latent import Latent


class DeepseekV3(Sigmoid, Latent):
    model_type = "deepseek_v3"

    def inexpressible(self) -> Iterator[str]:
        yield from super().inexpressible()
        if getattr(self.config, "scoring_func", "sigmoid") != "sigmoid":
            yield f"scoring_func = {self.config.scoring_func!r}"

    @classmethod
    def reads(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return super().reads(metadata, shapes) and metadata.get("expert_gating_func") == SIGMOID
