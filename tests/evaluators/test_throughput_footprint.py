"""Sizes and rates of a plan, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint
from compression.families import open_inventory
from compression.gguf_export import export_gguf
from evaluators.footprint import Footprint
from evaluators.throughput import Throughput
from spaces.budget import Budget
from spaces.carry import Carry
from spaces.devices import DEVICES
from spaces.inventory import Inventory
from spaces.plan import Plan
from tests.compression.support import candidate, provide

BUDGET = Budget(
    weights=10**9, device_memory=10**10, context=512, kv_cache=1000, compute_buffer=200, reserve=30
)
DEVICE = replace(DEVICES["dgx-spark"], bandwidth=1e9, efficiency=0.5)
VOCABULARY, HIDDEN, WIDTH, EXPERTS = 4096, 256, 256, 8
HEADS, Q, KV, NOPE, ROPE, VALUE = 4, 128, 64, 32, 32, 64


def read(inventory: Inventory, plan: Plan, context: int) -> float:
    """Bytes of one token: seconds at a byte per second."""
    slow = replace(DEVICE, bandwidth=1.0, efficiency=1.0)
    return Throughput(Carry(inventory, inventory), slow, context).seconds(plan)


def q8(weights: int) -> float:
    return weights * 34 / 32


def read_by_hand(kept: int, top_k: int, context: int) -> float:
    """Bytes of one token of the tiny model in Q8_0."""
    attention = (
        Q * HIDDEN + HEADS * (NOPE + ROPE) * Q + (KV + ROPE) * HIDDEN
        + HEADS * KV * NOPE + HEADS * VALUE * KV + HIDDEN * HEADS * VALUE
    )  # fmt: skip
    norms = 4 * (2 * HIDDEN + Q + KV)
    expert = 3 * HIDDEN * WIDTH
    router = 4 * (kept * HIDDEN + kept)
    dense = q8(3 * HIDDEN * 256)
    blocks = 3 * (q8(attention) + norms) + dense + 2 * (router + q8(expert) * (1 + top_k))
    cache = 3 * (KV + ROPE) * context * 2
    return q8(HIDDEN) + 4 * HIDDEN + q8(VOCABULARY * HIDDEN) + blocks + cache


@pytest.mark.parametrize(("kept", "top_k", "context"), [(8, 2, 0), (8, 2, 512), (5, 2, 512), (5, 1, 4096)])
def test_a_token_reads_what_the_formula_says(tiny: Checkpoint, kept: int, top_k: int, context: int) -> None:
    by_hand = read_by_hand(kept, top_k, context)
    plan = tiny.inventory.uniform_plan("Q8_0", kept, top_k)
    assert read(tiny.inventory, plan, context) == pytest.approx(by_hand)
    wanted = candidate(tiny.inventory, {1: tuple(range(kept)), 2: tuple(range(kept))}, {1: top_k, 2: top_k})
    speed = Throughput(Carry(tiny.inventory, tiny.inventory), DEVICE, context).evaluate(wanted)
    assert speed == {"tokens_per_second": pytest.approx(0.5e9 / by_hand)}


def test_layers_of_a_ragged_plan_count_by_themselves(tiny: Checkpoint) -> None:
    inventory = tiny.inventory
    whole = read(inventory, candidate(inventory).plan, 100)
    one = read(inventory, candidate(inventory, top_k={2: 1}).plan, 100)
    assert whole - one == pytest.approx(q8(3 * HIDDEN * WIDTH))
    # Experts that are not active are not read; their rows of the router are.
    fewer = read(inventory, candidate(inventory, {2: (0, 1, 2)}).plan, 100)
    assert whole - fewer == pytest.approx(5 * 4 * (HIDDEN + 1))


def test_less_to_read_is_faster(tiny: Checkpoint) -> None:
    inventory = tiny.inventory

    def speed(context: int = 512, **choices: object) -> float:
        carry = Carry(inventory, inventory)
        wanted = candidate(inventory, **choices)  # type: ignore[arg-type]
        return float(Throughput(carry, DEVICE, context).evaluate(wanted)["tokens_per_second"])

    assert speed(top_k={1: 1, 2: 1}) > speed(top_k={1: 1}) > speed()
    assert speed(types="Q4_K") > speed(types="Q8_0") > speed(types="BF16")
    assert speed(context=0) > speed(context=512) > speed(context=4096)
    assert speed(types={"token_embd.weight": "BF16"}) == pytest.approx(speed(), rel=1e-4)
    assert speed(types={"output.weight": "BF16"}) < 0.9 * speed()


def test_the_footprint_is_the_files_size_and_what_else_needs_memory(
    tiny: Checkpoint, tiny_model: CandidateModel, tmp_path: Path
) -> None:
    wanted = provide(tiny_model, candidate(tiny.inventory, {1: (0, 1, 2), 2: (3, 4, 5)}, types="Q4_K"))
    size = export_gguf(tiny_model, wanted, tmp_path / "a.gguf")
    found = Footprint(Carry(tiny.inventory, tiny.inventory), BUDGET).evaluate(wanted)
    assert found == {"target_bytes": size, "model_bytes": size, "device_memory_bytes": size + 1230}


def test_a_larger_target_is_sized_under_the_carried_plan(tiny: Checkpoint) -> None:
    target = open_inventory("deepseek-v3")
    footprint = Footprint(Carry(tiny.inventory, target), BUDGET)
    whole, half = (
        footprint.evaluate(candidate(tiny.inventory, dict.fromkeys((1, 2), kept), types="Q8_0"))
        for kept in (tuple(range(8)), (0, 1, 2, 3))
    )
    assert whole["target_bytes"] == target.file_bytes(target.uniform_plan("Q8_0"))
    assert half["target_bytes"] == target.file_bytes(target.uniform_plan("Q8_0", kept=target.experts // 2))
    assert 0.5 < half["target_bytes"] / whole["target_bytes"] < 0.55
    assert whole["model_bytes"] == tiny.inventory.file_bytes(candidate(tiny.inventory).plan)
