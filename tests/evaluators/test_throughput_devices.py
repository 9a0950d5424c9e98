"""What a device changes: decode rates, two tiers of memory, what fits and what is fastest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compression.families import open_inventory
from evaluators.throughput import Throughput, speeds
from search.problem import make_problem
from spaces.budget import Budget
from spaces.candidate import Candidate
from spaces.carry import Carry
from spaces.devices import DEVICES, Device
from spaces.errors import UserError
from spaces.inventory import Inventory
from tests.spaces.tiny import inventory

CONTEXT = 64
TINY = inventory()
LARGE = open_inventory("deepseek-v3")


def seconds(device: Device, candidate: Candidate, model: Inventory = TINY) -> float:
    carry = Carry(model, model)
    return 1 / float(Throughput(carry, device, CONTEXT).evaluate(candidate)["tokens_per_second"])


def split(model: Inventory, experts: str, others: str) -> Candidate:
    """Routed experts in one type, everything else in another."""
    types = tuple((t.name, experts if t.per_expert else others) for t in model.quantizable)
    return replace(Candidate.uniform(model, "Q8_0"), types=types)


def test_a_type_that_decodes_slowly_is_slow_however_few_its_bytes() -> None:
    bound = replace(DEVICES["dgx-spark"], rates=None)
    few, many = Candidate.uniform(TINY, "IQ3_S"), Candidate.uniform(TINY, "Q4_K")
    assert seconds(bound, few) < seconds(bound, many)
    cpu = replace(bound, rates={"IQ3_S": 1e9, "Q4_K": 1e15})
    assert seconds(cpu, few) > seconds(cpu, many)
    assert seconds(cpu, many) == seconds(bound, many)
    # By hand: the weights a token reads, at 1e9 a second; rows that IQ3_S does not take are in another type.
    share = TINY.top_k / TINY.experts
    weights = sum(
        t.parameters * (share if t.per_expert else 1)
        for t in TINY.quantizable
        if t.row % 256 == 0 and t.role != "token_embd"
    )
    assert seconds(cpu, few) == pytest.approx(weights / 1e9, rel=0.001)


def test_time_that_no_weight_accounts_for_is_added() -> None:
    candidate = Candidate.uniform(TINY, "Q4_K")
    device = DEVICES["dgx-spark"]
    late = seconds(replace(device, overhead=0.25), candidate)
    assert late == pytest.approx(seconds(device, candidate) + 0.25)


def test_a_table_that_is_the_output_matrix_too_is_read_whole() -> None:
    names = ("token_embd.weight", "output.weight")
    tied = replace(TINY, tensors=tuple(t for t in TINY.tensors if t.name != names[1]))
    table, output = (TINY.by_name[name] for name in names)
    assert table.shape == output.shape
    device = replace(DEVICES["dgx-spark"], bandwidth=1.0, efficiency=1.0)
    apart = seconds(device, Candidate.uniform(TINY, "Q8_0"))
    together = seconds(device, Candidate.uniform(tied, "Q8_0"), tied)
    assert apart - together == pytest.approx(table.bytes("Q8_0") / table.shape[0])


def tiers(gpu_memory: int, model: Inventory) -> Device:
    """A GPU whose bytes are free, with room for so much, and a host of a byte per second."""
    room = gpu_memory + 10**9 + model.compute_buffer_bytes(CONTEXT)
    return Device(
        "tiers", "Both", 10**12, 1e30, "test", efficiency=1.0, gpu_memory=room, host_bandwidth=1.0
    )  # fmt: skip


def test_experts_that_do_not_fit_the_gpu_are_read_from_the_host() -> None:
    candidate = Candidate.uniform(TINY, "Q8_0")
    experts = {
        layer: [t for t in TINY.quantizable if t.per_expert and t.layer == layer] for layer in TINY.moe_layers
    }
    layer = sum(t.bytes("Q8_0") for t in experts[TINY.moe_layers[0]])
    row = TINY.by_name["token_embd.weight"]
    core = sum(
        t.bytes("Q8_0" if t.quantizable else t.fixed_type)
        for t in TINY.tensors
        if t is not row and not (t.per_expert and t.quantizable)
    )
    core += TINY.kv_cache_bytes(CONTEXT) + row.bytes("Q8_0") // row.shape[0]
    active, layers = layer * TINY.top_k / TINY.experts, len(TINY.moe_layers)
    for fitting in range(layers + 1):
        on_host = (layers - fitting) * active
        for spare in (0, layer - 1):
            device = tiers(core + fitting * layer + spare, TINY)
            assert seconds(device, candidate) == pytest.approx(on_host, abs=1e-6)
    # Nothing on the GPU: all a token reads comes from the host, and half of the core from half a GPU.
    assert seconds(tiers(0, TINY), candidate) == pytest.approx(core + layers * active)
    assert seconds(tiers(core // 2, TINY), candidate) == pytest.approx(core / 2 + layers * active, rel=1e-4)


def test_the_last_layers_experts_are_on_the_gpu_first() -> None:
    first, *_, last = TINY.moe_layers
    layer = sum(t.bytes("Q8_0") for t in TINY.quantizable if t.per_expert and t.layer == first)
    others = sum(t.bytes("Q8_0") for t in TINY.quantizable if not t.per_expert)
    device = tiers(others + layer + 10**5, TINY)  # room for one layer and what is not quantized
    whole = Candidate.uniform(TINY, "Q8_0")

    def with_one_fewer(layer: int) -> float:
        layers = tuple(replace(m, top_k=m.top_k - (m.layer == layer)) for m in whole.layers)
        return seconds(device, replace(whole, layers=layers))

    assert with_one_fewer(last) == pytest.approx(seconds(device, whole))
    assert with_one_fewer(first) < 0.9 * seconds(device, whole)


def test_another_device_ranks_candidates_another_way() -> None:
    """Of two of DeepSeek-V3, unified memory takes the smaller one, two tiers the one with small experts."""
    precise, even = split(LARGE, "Q2_K", "Q8_0"), split(LARGE, "Q3_K", "Q4_K")
    unified, both = DEVICES["dgx-spark"], DEVICES["rtx-5090-ddr5-128"]
    assert seconds(unified, precise, LARGE) > 1.2 * seconds(unified, even, LARGE)
    assert seconds(both, precise, LARGE) < 0.9 * seconds(both, even, LARGE)
    # Types of the very same size: only a CPU tells them apart.
    slow, quick = Candidate.uniform(LARGE, "IQ3_S"), Candidate.uniform(LARGE, "Q3_K")
    assert seconds(unified, slow, LARGE) == seconds(unified, quick, LARGE)
    assert seconds(DEVICES["ddr5-desktop-192"], slow, LARGE) > 1.03 * seconds(
        DEVICES["ddr5-desktop-192"], quick, LARGE
    )


def test_another_device_allows_another_budget() -> None:
    def limit(name: str, size: int) -> int:
        problem = make_problem(TINY, Path("model"), "deepseek-v3", size * 10**9, DEVICES[name], 4096)
        return problem.budget.limit

    assert limit("ddr5-desktop-192", 150) == limit("rtx-5090-ddr5-128", 150) == 150 * 10**9
    with pytest.raises(UserError, match="does not fit the device"):
        limit("ryzen-ai-max-395", 150)


def test_speeds_are_those_of_every_device_it_fits() -> None:
    carry, candidate = Carry(LARGE, LARGE), Candidate.uniform(LARGE, "IQ1_S")
    rows = speeds(carry, candidate, CONTEXT)
    assert [row.device.name for row in rows] == list(DEVICES)
    size = LARGE.file_bytes(candidate.plan)
    for row in rows:
        assert row.fits == Budget.on(row.device, LARGE, size, CONTEXT).fits
        if row.fits:
            assert row.tokens_per_second == pytest.approx(1 / seconds(row.device, candidate, LARGE))
        else:
            assert row.tokens_per_second is None
    fits = {row.device.name for row in rows if row.fits}
    assert {"mac-studio-m3-ultra-256", "rtx-5090-ddr5-128", "ddr5-desktop-192"} <= fits
    assert not fits & {"rtx-5090", "raspberry-pi-5-16", "mac-studio-m3-ultra-96", "ddr5-desktop-96"}
