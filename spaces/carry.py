"""Carries decisions from the model that is searched to the model the budget speaks of.

A target tensor takes the type of the source tensor of the same role at the
same relative depth; a target layer takes its share of experts and of top-k.
With the same model on both sides everything is carried to itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from spaces.inventory import Inventory
from spaces.plan import Plan
from spaces.quant_types import fitting


def _at_relative_depth(position: int, count: int, choices: Sequence[int]) -> int:
    """The entry of `choices` as deep among them as `position` is among `count`."""
    return choices[min(len(choices) - 1, (2 * position + 1) * len(choices) // (2 * count))]


def _most_similar(role: str, known: Iterable[str]) -> str:
    """`role` itself where it is known, else the known one that shares the longest beginning."""

    def shared(other: str) -> int:
        return next((i for i, (a, b) in enumerate(zip(role, other, strict=False)) if a != b), len(role))

    return role if role in known else max(known, key=shared)


class Carry:
    """The mapping from a source model's decisions to a target model."""

    def __init__(self, source: Inventory, target: Inventory) -> None:
        self.source, self.target = source, target

    def kept(self, experts: int) -> int:
        """Experts the target keeps where the source keeps `experts`; whole numbers per group."""
        if self.source is self.target:
            return experts
        whole = self.target.experts // self.target.groups
        per_group = max(self.target.least_per_group, round(whole * experts / self.source.experts))
        return self.target.groups * per_group

    def top_k(self, top_k: int, kept: int) -> int:
        """Active experts of the target where the source has `top_k`; `kept` is the target's count."""
        return min(kept, max(1, round(top_k * self.target.top_k / self.source.top_k)))

    @cached_property
    def layer_of(self) -> dict[int, int]:
        """Source MoE layer of every target MoE layer."""
        layers = self.target.moe_layers
        return {
            layer: _at_relative_depth(i, len(layers), self.source.moe_layers)
            for i, layer in enumerate(layers)
        }

    @cached_property
    def tensor_of(self) -> dict[str, str]:
        """Source tensor of every quantizable target tensor."""
        by_role: dict[str, dict[int, str]] = {}
        for t in self.source.quantizable:
            by_role.setdefault(t.role, {})[-1 if t.layer is None else t.layer] = t.name
        target_layers: dict[str, list[int]] = {}
        for t in self.target.quantizable:
            target_layers.setdefault(t.role, []).append(-1 if t.layer is None else t.layer)
        out = {}
        for t in self.target.quantizable:
            # A role the source does not have (another attention form) follows the most similar one.
            role = _most_similar(t.role, by_role)
            layers = target_layers[t.role]
            position = layers.index(-1 if t.layer is None else t.layer)
            out[t.name] = by_role[role][_at_relative_depth(position, len(layers), sorted(by_role[role]))]
        return out

    @cached_property
    def targets_of(self) -> dict[str, list[str]]:
        """Target tensors of every source tensor."""
        out: dict[str, list[str]] = {t.name: [] for t in self.source.quantizable}
        for target, source in self.tensor_of.items():
            out[source].append(target)
        return out

    def plan(self, plan: Plan) -> Plan:
        """The target's plan for a plan of the source."""
        kept, top_k, types = dict(plan.kept), dict(plan.top_k), dict(plan.types)
        target_kept = {i: self.kept(kept[s]) for i, s in self.layer_of.items()}
        return Plan(
            kept=tuple(target_kept.items()),
            top_k=tuple((i, self.top_k(top_k[s], target_kept[i])) for i, s in self.layer_of.items()),
            types=tuple(
                (t.name, fitting(types[self.tensor_of[t.name]], t.row)) for t in self.target.quantizable
            ),
        )

    def bytes(self, tensor: str, type_name: str, experts: int) -> int:
        """Target bytes, padding included, of all that follows a source tensor.

        Args:
            tensor: Name of the source tensor.
            type_name: Its type.
            experts: Experts the source keeps in that layer; ignored for other tensors.
        """
        from spaces.gguf_layout import padded

        total = 0
        for name in self.targets_of[tensor]:
            t = self.target.by_name[name]
            total += padded(t.bytes(fitting(type_name, t.row), self.kept(experts)))
        return total
