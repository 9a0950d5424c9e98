"""What each part of a candidate costs: its damage with the other parts undone, and with that part undone.

Damage is not additive: a part alone and the same part on top of the others differ, so both
are measured. The settings share most of their blocks, which a population computes once.
"""

from __future__ import annotations

from dataclasses import dataclass

from compression.setting import Setting, Settings
from spaces.candidate import Candidate
from spaces.inventory import Tensor

LEVERS = ("experts", "top-k", "types")


@dataclass(frozen=True)
class Part:
    """One part of a candidate.

    Attributes:
        kind: `all`, `only` (a lever alone), `without` (all but a lever), `role` (types of one role alone),
            `layer experts` (pruning and top-k of one layer alone), `layer types`.
        name: The lever, role or layer.
        setting: The model with just that.
    """

    kind: str
    name: str
    setting: Setting


def role_of(tensor: Tensor) -> str:
    """The role of a tensor, as people speak of it."""
    if tensor.layer is None:
        return "output" if tensor.role == "output" else "embedding"
    if tensor.per_expert:
        return "routed experts, down" if "down" in tensor.role else "routed experts, gate and up"
    if "shexp" in tensor.role:
        return "shared expert"
    return "dense feed-forward" if tensor.role.startswith("ffn") else "attention"


def parts(settings: Settings, candidate: Candidate) -> list[Part]:
    """All parts of a candidate; levers it does not use come out as the uncompressed model."""
    whole = settings.of(candidate)
    out = [Part("all", "", whole)]
    for lever in LEVERS:
        out.append(Part("only", lever, _with(settings, candidate, {lever})))
        out.append(Part("without", lever, _with(settings, candidate, {*LEVERS} - {lever})))
    by_name, types = settings.inventory.by_name, dict(candidate.types)
    for role in dict.fromkeys(role_of(by_name[n]) for n in types):
        some = {n: t for n, t in types.items() if role_of(by_name[n]) == role}
        out.append(Part("role", role, settings.of_types(some)))
    for layer in range(settings.inventory.layers):
        some = {n: t for n, t in types.items() if by_name[n].layer == layer}
        out.append(Part("layer types", str(layer), settings.of_types(some)))
    for m in candidate.layers:
        setting = settings.routed(settings.base, m.layer, m.experts, m.top_k)
        out.append(Part("layer experts", str(m.layer), setting))
    return out


def _with(settings: Settings, candidate: Candidate, levers: set[str]) -> Setting:
    """The candidate with some of its levers and the others as in the uncompressed model."""
    setting = settings.of_types(dict(candidate.types) if "types" in levers else {})
    for m in candidate.layers:
        experts = m.experts if "experts" in levers else None
        setting = settings.routed(setting, m.layer, experts, m.top_k if "top-k" in levers else None)
    return setting
