"""A router that can forget experts and remember them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class Router:
    """Holds a router's rows of all experts and lets it see those of some.

    The router then is, number for number, the one of the pruned model; the experts it
    chooses are renumbered to where they lie among all. Costs nothing to undo.

    Args:
        module: A transformers router: returns (logits, weights, chosen experts).
        axes: Its per-expert parameters and buffers, by name below it, with the axis that counts experts.
        counts: Its attributes that count experts.
    """

    def __init__(self, module: nn.Module, axes: Mapping[str, int], counts: Sequence[str]) -> None:
        import torch

        self.module, self.axes, self.counts = module, axes, counts
        # What inference mode makes can never be differentiated again, so nothing is made in it here.
        with torch.inference_mode(False):
            self.full = {name: _get(module, name).detach().clone() for name in axes}
        self.kept: Tensor | None = None
        self.top_k: int = module.top_k  # type: ignore[assignment]
        self._hook = module.register_forward_hook(self._renumber)

    def keep(self, experts: Sequence[int] | None, top_k: int) -> None:
        """Leaves `experts` (ascending; None: all) to choose `top_k` from."""
        import torch

        self.kept = None if experts is None else torch.as_tensor(list(experts))
        with torch.inference_mode(False):
            for name, axis in self.axes.items():
                full = self.full[name]
                _set(self.module, name, full if self.kept is None else full.index_select(axis, self.kept))
        first = next(iter(self.axes))
        count = _get(self.module, first).shape[self.axes[first]]
        for attribute in self.counts:
            if hasattr(self.module, attribute):
                setattr(self.module, attribute, count)
        self.module.top_k = self.top_k = top_k  # type: ignore[assignment]

    def close(self) -> None:
        """Leaves the module to itself, as it stands."""
        self._hook.remove()

    def _renumber(self, module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, chosen = output
        return (logits, weights, chosen) if self.kept is None else (logits, weights, self.kept[chosen])


def _get(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), leaf)
    return found


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    import torch

    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
