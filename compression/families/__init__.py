"""Where each model family keeps what GGUF names: one module per family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from compression.families.deepseek_v3 import DeepseekV3
from spaces.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spaces.inventory import Inventory


class Family(Protocol):
    """What the rest of the project asks of a family."""

    def view(self, model: Any, name: str) -> Tensor:
        """The weights that GGUF calls `name`, in GGUF's shape, writable in place."""

    def inputs(self, model: Any) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """Linear modules whose input columns are the rows of these GGUF tensors."""

    def outputs(self, model: Any) -> list[tuple[nn.Module, tuple[str, ...], slice]]:
        """Modules part of whose output is the input of these GGUF tensors."""

    def moe(self, model: Any, layer: int) -> Any:
        """The MoE block of a layer, with `gate` and `experts`."""

    def restrict(self, model: Any, layer: int, experts: Sequence[int], top_k: int) -> None:
        """Lets the router of a layer choose `top_k` of `experts` only, as if the rest were gone."""

    def shrink(self, model: Any, layer: int, experts: Sequence[int], top_k: int) -> None:
        """Resizes a layer to `experts` for good; the weights of the new size are left unset."""


_FAMILIES = {"deepseek_v3": DeepseekV3}


def family(inventory: Inventory) -> Family:
    """The family of a model; an unknown one is a `UserError` that lists the known."""
    if inventory.model_type not in _FAMILIES:
        raise unknown("model family", inventory.model_type, _FAMILIES)
    return _FAMILIES[inventory.model_type](inventory)
