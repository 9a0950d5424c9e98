"""Decoding rate by the roofline: memory bandwidth over the bytes a token reads.

A token reads every tensor but the embedding table (one row of it) and, of the
routed experts, top-k of those kept: bytes = attention + shared + dense + router
+ output + sum over MoE layers of k / kept * expert bytes + KV cache. The rate is
eta * bandwidth / bytes with eta the share of peak bandwidth that is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spaces.candidate import Candidate
from spaces.carry import Carry
from spaces.devices import Device
from spaces.inventory import Inventory
from spaces.plan import Plan


def bytes_per_token(inventory: Inventory, plan: Plan, context: int) -> float:
    """Bytes read to decode one token with `context` tokens in the KV cache."""
    kept, top_k, types = dict(plan.kept), dict(plan.top_k), dict(plan.types)
    total = float(inventory.kv_cache_bytes(context))
    for t in inventory.tensors:
        type_name = types[t.name] if t.quantizable else "F32"
        experts = kept.get(t.layer) if t.layer is not None else None
        size = t.bytes(type_name, experts)
        if t.role == "token_embd":
            total += size / t.shape[0]
        elif t.per_expert and t.quantizable and t.layer is not None:
            total += size * top_k[t.layer] / kept[t.layer]
        else:
            total += size
    return total


class Throughput:
    """Tokens per second of the target on a device."""

    def __init__(self, carry: Carry, device: Device, context: int) -> None:
        self.carry, self.device, self.context = carry, device, context

    def evaluate(self, candidate: Candidate, fidelity: int = 0) -> Mapping[str, Any]:
        read = bytes_per_token(self.carry.target, self.carry.plan(candidate.plan), self.context)
        return {"tokens_per_second": self.device.efficiency * self.device.bandwidth / read}
