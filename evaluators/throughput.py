"""Decoding rate of a candidate on a device, predicted.

A token reads every tensor but the embedding table (one row of it, unless it is the output matrix too),
of the routed experts top-k of those kept, and the KV cache. Each takes the time `Device.seconds` gives it;
their sum and the device's overhead are the time of a token.

Where a device has two tiers, everything but the routed experts is on the GPU, and the experts of as many
layers as fit beside it, the last layers first: what llama.cpp does with `--n-cpu-moe N`. Moving a token's
activations between the tiers is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from spaces.budget import Budget
from spaces.candidate import Candidate
from spaces.carry import Carry
from spaces.devices import DEVICES, Device
from spaces.inventory import Tensor
from spaces.plan import Plan

_GPU_RESERVE = 10**9
"""Bytes of a GPU that the driver and the display take, estimated; part of `Budget.reserve`."""


class Cost(NamedTuple):
    """What a tensor takes, or one expert of it.

    Attributes:
        size: Bytes in memory.
        gpu: Seconds to read and decode it, in the first tier.
        host: The same in the second tier; 0 where there is none.
    """

    size: float
    gpu: float
    host: float


class Throughput:
    """Tokens per second of the target on a device."""

    def __init__(self, carry: Carry, device: Device, context: int) -> None:
        """With `context` tokens in the KV cache."""
        self.carry, self.device, self.context = carry, device, context
        self._kv_cache = self._cost_of(carry.target.kv_cache_bytes(context))
        # Every trial asks for the same few hundred costs.
        self._costs: dict[tuple[str, str], Cost] = {}

    def evaluate(self, candidate: Candidate, fidelity: int = 0) -> Mapping[str, Any]:
        return {"tokens_per_second": 1 / self.seconds(self.carry.plan(candidate.plan))}

    def seconds(self, plan: Plan) -> float:
        """Seconds the target takes for a token under a plan of its own."""
        kept, top_k, types = dict(plan.kept), dict(plan.top_k), dict(plan.types)
        core = list(self._kv_cache)
        routed = {layer: [0.0, 0.0, 0.0] for layer in kept}
        for t in self.carry.target.tensors:
            type_name = types.get(t.name, t.fixed_type)
            size, gpu, host = self._costs.get((t.name, type_name)) or self._cost(t, type_name)
            into, stored, read = core, 1, 1
            if t.per_expert and t.layer is not None:
                stored = read = kept[t.layer]  # the router and biases, which have a row for every expert
                if t.quantizable:
                    into, read = routed[t.layer], top_k[t.layer]
            into[0] += stored * size
            into[1] += read * gpu
            into[2] += read * host
        return self.device.overhead + self._placed(Cost(*core), {i: Cost(*c) for i, c in routed.items()})

    def _placed(self, core: Cost, routed: Mapping[int, Cost]) -> float:
        """Seconds with everything in the tier that has room for it."""
        gpu_memory = self.device.gpu_memory
        if gpu_memory is None:
            return core.gpu + sum(c.gpu for c in routed.values())
        buffer = self.carry.target.compute_buffer_bytes(self.context)
        room = max(0, min(gpu_memory, self.device.memory) - _GPU_RESERVE - buffer)
        share = min(1.0, room / core.size)
        total = share * core.gpu + (1 - share) * core.host
        left = room - core.size
        for layer in sorted(routed, reverse=True):
            left -= routed[layer].size
            total += routed[layer].gpu if left >= 0 else routed[layer].host
        return total

    def _cost(self, tensor: Tensor, type_name: str) -> Cost:
        """Of what a token reads of a tensor, or of one expert of it."""
        # Of the embedding table one row, unless it is the output matrix too.
        row = tensor.role == "token_embd" and "output.weight" in self.carry.target.by_name
        parts = tensor.shape[0] if tensor.per_expert or row else 1
        cost = self._cost_of(tensor.bytes(type_name) / parts, tensor.parameters / parts, type_name)
        self._costs[tensor.name, type_name] = cost
        return cost

    def _cost_of(self, size: float, weights: float = 0, type_name: str = "") -> Cost:
        host = self.device.seconds(size, weights, type_name, host=True) if self.device.gpu_memory else 0.0
        return Cost(size, self.device.seconds(size, weights, type_name), host)


class Speed(NamedTuple):
    """A candidate on a device.

    Attributes:
        device: The profile.
        fits: Whether its weights, the KV cache and what else is needed fit the memory.
        tokens_per_second: Predicted decoding rate; None where it does not fit.
    """

    device: Device
    fits: bool
    tokens_per_second: float | None


def speeds(carry: Carry, candidate: Candidate, context: int) -> list[Speed]:
    """The target under a candidate on every device known, with `context` tokens in the KV cache."""
    plan = carry.plan(candidate.plan)
    size = carry.target.file_bytes(plan)
    rows = []
    for device in DEVICES.values():
        fits = Budget.on(device, carry.target, size, context).fits
        rate = 1 / Throughput(carry, device, context).seconds(plan) if fits else None
        rows.append(Speed(device, fits, rate))
    return rows
