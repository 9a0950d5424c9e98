"""How a candidate routes beside the base model: what pruning and fewer active experts do to its choices.

Both models run on the same tokens, each on its own states, so that drift of the states
counts too. The quick checks of arXiv 2509.25689 ask for stability of the router after
pruning; mass, agreement and entropy are our reading of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compression.candidate_model import CandidateModel
from compression.setting import Setting
from evaluators.texts import TextSet

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerRouting:
    """One MoE layer.

    Attributes:
        layer: Block number.
        kept_mass: Share of the base model's gates that goes to experts the candidate keeps.
        agreement: Share of the experts the base model selects for a token that the candidate selects too.
        entropy_base, entropy: Mean entropy of a token's gates, nats: how many experts it really uses.
        load_base, load: (experts,) share of a token's selections that each expert gets; they sum up to 1.
    """

    layer: int
    kept_mass: float
    agreement: float
    entropy_base: float
    entropy: float
    load_base: tuple[float, ...]
    load: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Choices:
    """What a router chose: (tokens, k) experts by number among all, and their gates, summing up to 1."""

    experts: np.ndarray
    gates: np.ndarray

    def load(self, count: int) -> np.ndarray:
        found = np.bincount(self.experts.ravel(), minlength=count)
        return found / max(1, found.sum())

    def entropy(self) -> float:
        g = np.maximum(self.gates, 1e-12)
        return float(-(g * np.log(g)).sum(1).mean())


def routing(
    model: CandidateModel, setting: Setting, base: Setting, text: TextSet, use: Callable[[bool], None]
) -> list[LayerRouting]:
    """Routing of every MoE layer.

    Args:
        model: The model; left as the candidate.
        setting, base: The candidate, and the uncompressed model.
        text: Windows to route.
        use: Called with False before the base model runs and with True before the candidate does, so that
            a candidate's repairs can be put in and out.
    """
    use(False)
    theirs = _choices(model, base, text)
    use(True)
    ours = _choices(model, setting, text)
    count, out = model.inventory.experts, []
    for layer in model.inventory.moe_layers:
        a, b = theirs[layer], ours[layer]
        kept = setting.blocks[layer].experts
        stays = np.isin(a.experts, range(count) if kept is None else kept)
        same = (a.experts[:, :, None] == b.experts[:, None, :]).any(2)
        out.append(
            LayerRouting(
                layer,
                float((a.gates * stays).sum() / a.gates.sum()),
                float(same.mean()),
                a.entropy(),
                b.entropy(),
                tuple(round(float(x), 6) for x in a.load(count)),
                tuple(round(float(x), 6) for x in b.load(count)),
            )
        )
    return out


def _choices(model: CandidateModel, setting: Setting, text: TextSet) -> dict[int, _Choices]:
    """What the router of every MoE layer chooses for all tokens of a text."""
    import torch

    found: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in model.inventory.moe_layers}
    with torch.inference_mode():
        model.set_types(setting.entry)
        states = model.embed(torch.from_numpy(text.windows.astype(np.int64)))
        for layer, block in enumerate(setting.blocks):
            model.set_block(layer, block)
            with model.held(layer):
                handle = None
                if layer in found:
                    # Registered after the hook that renumbers a pruned router's choices, so it sees those.
                    handle = model.shell.router(layer).module.register_forward_hook(
                        lambda module, args, output, rows=found[layer]: rows.append((output[2], output[1]))
                    )
                try:
                    states = model.run(states, layer, layer + 1)
                finally:
                    if handle is not None:
                        handle.remove()
    out = {}
    for layer, rows in found.items():
        experts = torch.cat([e.reshape(-1, e.shape[-1]) for e, _ in rows]).numpy()
        gates = torch.cat([g.reshape(-1, g.shape[-1]) for _, g in rows]).double().numpy()
        out[layer] = _Choices(experts, gates / np.maximum(gates.sum(1, keepdims=True), 1e-12))
    return out
