"""One-at-a-time damage: the setting in which one option alone differs from the uncompressed model."""

from __future__ import annotations

from typing import Any

from compression.setting import Setting, Settings
from spaces.space import Space


def alone(settings: Settings, space: Space, decision: str, choice: Any) -> Setting:
    """The uncompressed model with one option taken.

    Args:
        settings: Of the model.
        space: Names the options.
        decision: `blk.N.experts`, `blk.N.top_k` or a tensor's name.
        choice: (experts kept, criterion), active experts, or a GGUF type.
    """
    if decision.endswith(".experts"):
        layer = int(decision.split(".")[1])
        return settings.routed(settings.base, layer, space.experts(layer, choice[0], choice[1]))
    if decision.endswith(".top_k"):
        return settings.routed(settings.base, int(decision.split(".")[1]), None, int(choice))
    return settings.of_types({decision: choice})
