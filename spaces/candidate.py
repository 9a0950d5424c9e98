"""A candidate: one compression config of one model, complete and checkable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spaces.errors import UserError
from spaces.inventory import Inventory
from spaces.json_text import parse_once
from spaces.plan import Plan
from spaces.quant_types import quant_type

VERSION = 1


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected a whole number, got {value!r}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a type's name, got {value!r}")
    return value


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"expected a list of whole numbers, got {type(values).__name__}")
    return tuple(_integer(v) for v in values)


@dataclass(frozen=True)
class MoeLayer:
    """Which experts of a layer stay, in ascending order, and how many a token uses."""

    layer: int
    experts: tuple[int, ...]
    top_k: int


@dataclass(frozen=True)
class Candidate:
    """Experts, top-k and types of a compressed model. Frozen, hashable, JSON both ways.

    Attributes:
        layers: One entry per MoE layer, in order.
        types: (tensor name, GGUF type) of every quantizable tensor, in file order.
    """

    layers: tuple[MoeLayer, ...]
    types: tuple[tuple[str, str], ...]

    @classmethod
    def uniform(cls, inventory: Inventory, type_name: str) -> Candidate:
        """Nothing pruned, every tensor in one type (or its fallback)."""
        everyone = tuple(range(inventory.experts))
        layers = tuple(MoeLayer(i, everyone, inventory.top_k) for i in inventory.moe_layers)
        return cls(layers, inventory.uniform_plan(type_name).types)

    @cached_property
    def plan(self) -> Plan:
        """The candidate without the names of its experts."""
        return Plan(
            kept=tuple((m.layer, len(m.experts)) for m in self.layers),
            top_k=tuple((m.layer, m.top_k) for m in self.layers),
            types=self.types,
        )

    @property
    def portable(self) -> bool:
        """Whether stock llama.cpp can run it; see `Plan.portable`."""
        return self.plan.portable

    @cached_property
    def key(self) -> str:
        """Content hash, 16 hex digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Canonical JSON: equal candidates give equal text."""
        layers = [{"layer": m.layer, "experts": list(m.experts), "top_k": m.top_k} for m in self.layers]
        return json.dumps({"version": VERSION, "layers": layers, "types": dict(self.types)})

    @classmethod
    def from_json(cls, text: str, source: str = "candidate") -> Candidate:
        """Parses what `to_json` wrote.

        Raises:
            UserError: Not JSON, another version, or fields of the wrong kind.
        """
        try:
            data: dict[str, Any] = parse_once(text)
            if type(data["version"]) is not int or data["version"] != VERSION:
                raise UserError(f"{source}: version must be {VERSION}, got {data['version']!r}")
            layers = tuple(
                MoeLayer(_integer(m["layer"]), _integers(m["experts"]), _integer(m["top_k"]))
                for m in data["layers"]
            )
            return cls(layers, tuple((n, _name(t)) for n, t in data["types"].items()))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{source}: not a candidate ({type(error).__name__}: {error}); expected "
                '{"version": 1, "layers": [{"layer", "experts", "top_k"}], "types": {tensor: type}}'
            ) from error

    def validate(self, inventory: Inventory, source: str = "candidate") -> None:
        """Checks every choice against the model it is for.

        Raises:
            UserError: The first rule that does not hold, with the values.
        """
        expected = inventory.moe_layers
        if tuple(m.layer for m in self.layers) != expected:
            raise UserError(f"{source}: layers must be the MoE layers {list(expected)} of {inventory.name}")
        for m in self.layers:
            e = m.experts
            if list(e) != sorted(set(e)) or not e or e[0] < 0 or e[-1] >= inventory.experts:
                raise UserError(
                    f"{source}: layer {m.layer}: experts must be distinct, ascending and within "
                    f"0..{inventory.experts - 1}, got {list(e)[:8]}"
                )
            if not 1 <= m.top_k <= min(len(e), inventory.top_k):
                raise UserError(
                    f"{source}: layer {m.layer}: top_k must be within 1..{min(len(e), inventory.top_k)} "
                    f"({len(e)} experts kept, {inventory.top_k} active in the model), got {m.top_k}"
                )
            size = inventory.experts // inventory.groups
            counts = {sum(x // size == g for x in e) for g in range(inventory.groups)}
            if len(counts) != 1:
                raise UserError(
                    f"{source}: layer {m.layer}: group-limited routing needs as many experts kept in each of "
                    f"the {inventory.groups} groups, got {sorted(counts)}"
                )
            if m.top_k > inventory.groups_used * min(counts):
                raise UserError(
                    f"{source}: layer {m.layer}: a token chooses its {m.top_k} experts from "
                    f"{inventory.groups_used} groups, which keep {min(counts)} each"
                )
            if min(counts) < inventory.least_per_group:
                raise UserError(
                    f"{source}: layer {m.layer}: this family's router needs {inventory.least_per_group} "
                    f"experts kept per group, got {min(counts)}"
                )
        names = tuple(t.name for t in inventory.quantizable)
        if tuple(n for n, _ in self.types) != names:
            wrong = sorted(set(names) ^ {n for n, _ in self.types}) or ["their order"]
            raise UserError(
                f"{source}: types must name the quantizable tensors of {inventory.name} in file order; "
                f"differs at {wrong[0]}"
            )
        for tensor, (name, type_name) in zip(inventory.quantizable, self.types, strict=True):
            if not quant_type(type_name).fits(tensor.row):
                raise UserError(
                    f"{source}: {name}: {type_name} packs blocks of {quant_type(type_name).block} weights, "
                    f"but its rows have {tensor.row}"
                )
