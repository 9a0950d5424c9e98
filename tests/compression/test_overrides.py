"""Repairs go to a file and back, into the model and out again, and into every kind of export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from compression import ggml, load
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint, open_checkpoint
from compression.checkpoint_export import export_checkpoint
from compression.gguf_export import export_gguf
from compression.guards import check_file
from compression.overrides import Overrides
from compression.stored_model import StoredModel
from compression.variant_bank import VariantBank
from evaluators.texts import TextSet
from experiments import zoo
from spaces.candidate import Candidate
from tests.compression.support import candidate, logits, mixed_types, provide, refused

PRUNED = {1: (0, 2, 3, 6, 7), 2: (1, 2, 4, 5, 7)}
BLOCKS = (
    "token_embd.weight", "output.weight", "blk.0.ffn_down.weight", "blk.0.attn_k_b.weight",
    "blk.1.ffn_gate_exps.weight", "blk.2.ffn_down_exps.weight",
)  # fmt: skip
ROUTER, BIAS = "blk.1.ffn_gate_inp.weight", "blk.2.exp_probs_b.bias"
PLAIN = ("output_norm.weight", "blk.0.attn_norm.weight", ROUTER, BIAS)


def repairs(
    model: StoredModel, wanted: Candidate, blocks: tuple[str, ...], plain: tuple[str, ...]
) -> Overrides:
    """Blocks in the reverse order of rows, and other numbers of the same sign."""
    types, factors = dict(wanted.types), np.random.default_rng(0)
    return Overrides(
        wanted.key,
        {
            n: np.ascontiguousarray(model.bank.blocks(model.inventory.by_name[n], types[n])[..., ::-1, :])
            for n in blocks
        },
        {
            n: (x * factors.uniform(0.6, 1.6, x.shape)).astype(np.float32)
            for n in plain
            for x in [model.plain(n)]
        },
    )


@pytest.fixture
def wanted(tiny_model: CandidateModel) -> Candidate:
    """Portable, pruned, with many types."""
    types = mixed_types(tiny_model.inventory)
    return provide(tiny_model, candidate(tiny_model.inventory, PRUNED, None, types))


@pytest.fixture
def overrides(tiny_model: CandidateModel, wanted: Candidate) -> Overrides:
    found = repairs(tiny_model, wanted, BLOCKS, PLAIN)
    # A bias only chooses: it has to be another by more.
    return replace(found, plain={**found.plain, BIAS: -4 * found.plain[BIAS]})


@pytest.fixture
def windows(tiny_texts: dict[str, TextSet]) -> np.ndarray:
    return tiny_texts["search"].windows[:3, :32]


@pytest.fixture
def file(overrides: Overrides, tmp_path: Path) -> Path:
    overrides.save(tmp_path / "new" / "x.safetensors")
    return tmp_path / "new" / "x.safetensors"


@pytest.fixture
def stored(tiny: Checkpoint, tiny_model: CandidateModel, overrides: Overrides) -> StoredModel:
    out = StoredModel(tiny, tiny.inventory, tiny_model.bank)
    out.overrides = overrides
    return out


def test_what_is_saved_is_loaded(
    tiny: Checkpoint, wanted: Candidate, overrides: Overrides, file: Path
) -> None:
    found = Overrides.load(file, tiny.inventory, wanted)
    assert found.candidate == wanted.key
    for kind, dtype in (("blocks", np.uint8), ("plain", np.float32)):
        one, other = getattr(found, kind), getattr(overrides, kind)
        assert set(one) == set(other)
        for name, value in other.items():
            assert one[name].dtype == dtype
            assert np.array_equal(one[name], value), name


def test_nothing_repaired_is_saved_and_loaded_too(
    tiny: Checkpoint, wanted: Candidate, tmp_path: Path
) -> None:
    Overrides(wanted.key).save(tmp_path / "x")
    found = Overrides.load(tmp_path / "x", tiny.inventory, wanted)
    assert (found.candidate, dict(found.blocks), dict(found.plain)) == (wanted.key, {}, {})


def test_repairs_of_another_candidate_are_refused(tiny: Checkpoint, wanted: Candidate, file: Path) -> None:
    other = candidate(tiny.inventory, PRUNED, {1: 1}, dict(wanted.types))
    refused(lambda: Overrides.load(file, tiny.inventory, other), file, "another candidate")


def test_missing_or_short_files_are_refused(tiny: Checkpoint, wanted: Candidate, file: Path) -> None:
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(lambda: Overrides.load(file, tiny.inventory, wanted), file)
    file.write_bytes(b"\xff" * len(whole))
    refused(lambda: Overrides.load(file, tiny.inventory, wanted), file)
    file.unlink()
    refused(lambda: Overrides.load(file, tiny.inventory, wanted), file)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_a_flipped_bit_is_found(tiny: Checkpoint, wanted: Candidate, file: Path, place: float) -> None:
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + int(place * (len(raw) - start))] ^= 4
    file.write_bytes(bytes(raw))
    refused(lambda: Overrides.load(file, tiny.inventory, wanted), file, "not those that were written")


Parts = dict[str, np.ndarray]
WRONG: dict[str, Callable[[Parts, Parts], tuple[Parts, Parts]]] = {
    "blk.9.ffn_down.weight": lambda b, p: ({"blk.9.ffn_down.weight": b["output.weight"]}, {}),
    "output.weight": lambda b, p: ({"output.weight": b["output.weight"][:-1]}, {}),
    "token_embd.weight": lambda b, p: ({}, {"token_embd.weight": b["token_embd.weight"].view(np.float32)}),
    "blk.1.ffn_gate_exps.weight": lambda b, p: (
        {"blk.1.ffn_gate_exps.weight": b["blk.1.ffn_gate_exps.weight"].reshape(-1)}, {}
    ),
    ROUTER: lambda b, p: ({}, {ROUTER: p[ROUTER][:5]}),
    BIAS: lambda b, p: ({BIAS: p[BIAS].view(np.uint8)}, {}),
    "output_norm.weight": lambda b, p: ({}, {"output_norm.weight": p["output_norm.weight"][None]}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_tensors_of_another_kind_size_or_shape_are_refused(
    tiny: Checkpoint, wanted: Candidate, overrides: Overrides, tmp_path: Path, name: str
) -> None:
    blocks, plain = WRONG[name](dict(overrides.blocks), dict(overrides.plain))
    Overrides(wanted.key, blocks, plain).save(tmp_path / "x")
    refused(lambda: Overrides.load(tmp_path / "x", tiny.inventory, wanted), tmp_path / "x", name)


def test_the_model_holds_the_repaired_numbers(
    tiny_model: CandidateModel, wanted: Candidate, overrides: Overrides
) -> None:
    types = dict(wanted.types)
    tiny_model.apply(wanted)
    tiny_model.use(overrides)
    try:
        body = tiny_model.model.model
        output = ggml.dequantize(overrides.blocks["output.weight"], types["output.weight"])
        assert np.array_equal(tiny_model.model.lm_head.weight.numpy(), output)
        gate = "blk.1.ffn_gate_exps.weight"
        experts = body.layers[1].mlp.experts.gate_up_proj.numpy()[:, :256]
        assert np.array_equal(experts, ggml.dequantize(overrides.blocks[gate], types[gate]))
        assert np.array_equal(body.norm.weight.numpy(), overrides.plain["output_norm.weight"])
        router = overrides.plain[ROUTER][list(PRUNED[1])]
        assert np.array_equal(body.layers[1].mlp.gate.weight.numpy(), router)
        bias = body.layers[2].mlp.gate.e_score_correction_bias.numpy()
        assert np.array_equal(bias, overrides.plain[BIAS][list(PRUNED[2])])
    finally:
        tiny_model.use(None)


@pytest.mark.parametrize("name", [*BLOCKS, *PLAIN])
def test_each_repair_counts_and_is_taken_back_to_the_last_bit(
    tiny_model: CandidateModel, wanted: Candidate, overrides: Overrides, windows: np.ndarray, name: str
) -> None:
    windows = windows[:1]
    tiny_model.apply(wanted)
    before = logits(tiny_model, windows)
    one = replace(
        overrides,
        blocks={n: x for n, x in overrides.blocks.items() if n == name},
        plain={n: x for n, x in overrides.plain.items() if n == name},
    )
    tiny_model.use(one)
    repaired = logits(tiny_model, windows)
    tiny_model.use(None)
    assert np.abs(repaired - before).max() > 1e-3
    assert np.array_equal(logits(tiny_model, windows), before)


@pytest.mark.parametrize("cache", [0, 2**28])
def test_nothing_stays_of_repairs_that_were_taken_back(
    tiny: Checkpoint,
    tiny_model: CandidateModel,
    wanted: Candidate,
    overrides: Overrides,
    windows: np.ndarray,
    cache: int,
) -> None:
    model = CandidateModel(tiny, tiny.inventory, tiny_model.bank, cache=cache)
    other = provide(tiny_model, candidate(tiny.inventory, {1: (1, 4), 2: (0, 2, 5)}))
    expected = []
    for setting in (wanted, other):
        tiny_model.apply(setting)
        expected.append(logits(tiny_model, windows))
    tiny_model.reset()
    for _ in range(2):
        model.apply(wanted)
        model.use(overrides)
        model.use(repairs(model, wanted, BLOCKS[:1], PLAIN[:1]))  # takes the others back
        model.use(None)
        assert np.array_equal(logits(model, windows), expected[0])
        model.apply(other)
        assert np.array_equal(logits(model, windows), expected[1])
    model.reset()
    assert np.array_equal(logits(model, windows), logits(tiny_model, windows))


def test_the_folder_gives_the_repaired_models_logits(
    tiny_model: CandidateModel,
    wanted: Candidate,
    stored: StoredModel,
    overrides: Overrides,
    windows: np.ndarray,
    tmp_path: Path,
) -> None:
    export_checkpoint(stored, wanted, stored.checkpoint, tmp_path / "out")
    tiny_model.apply(wanted)
    plain = logits(tiny_model, windows)
    tiny_model.use(overrides)
    repaired = logits(tiny_model, windows)
    streamed = CandidateModel(stored.checkpoint, stored.inventory, stored.bank, stream=True)
    streamed.apply(wanted)
    streamed.use(overrides)
    tokens = torch.from_numpy(windows.astype(np.int64))
    with torch.inference_mode():
        assert torch.equal(streamed.hidden(tokens), tiny_model.hidden(tokens))
    assert np.array_equal(logits(streamed, windows), repaired)
    streamed.use(None)
    tiny_model.use(None)
    assert np.array_equal(logits(streamed, windows), plain)
    assert np.abs(logits(load(tmp_path / "out"), windows) - repaired).max() <= 1e-5
    assert np.abs(repaired - plain).max() > 1e-2


def test_both_exports_hold_the_repaired_bytes_and_are_of_the_predicted_size(
    wanted: Candidate, stored: StoredModel, overrides: Overrides, tmp_path: Path
) -> None:
    path, inventory, types = tmp_path / "x.gguf", stored.inventory, dict(wanted.types)
    assert export_gguf(stored, wanted, path) == path.stat().st_size == inventory.file_bytes(wanted.plan)
    assert export_checkpoint(stored, wanted, stored.checkpoint, tmp_path / "out") > 0
    of_folder = load_file(tmp_path / "out" / "moefit.safetensors")
    of_file = {t.name: np.asarray(t.data) for t in gguf.GGUFReader(path).tensors}
    for info in inventory.infos(wanted.plan):
        tensor = inventory.by_name[info.name]
        whole = {**overrides.blocks, **overrides.plain}.get(tensor.name)
        if whole is None and tensor.quantizable:
            whole = stored.bank.blocks(tensor, types[tensor.name])
        elif whole is None:
            whole = stored.weights.read(stored.family.by_name[tensor.name])
        kept = tensor.per_expert and tensor.layer is not None
        expected = (whole[list(PRUNED[tensor.layer])] if kept else whole).tobytes()  # type: ignore[index]
        assert of_file[tensor.name].tobytes() == expected, tensor.name
        assert of_folder[tensor.name].tobytes() == expected, tensor.name
        assert len(expected) == info.size
    check_file(path, stored, wanted)
    stored.overrides = None
    refused(lambda: check_file(path, stored, wanted), path, "other bytes")


@pytest.mark.parametrize("name", ["qwen3_next", "gpt_oss"])
def test_repairs_are_in_ggufs_numbers_whatever_the_parameters_hold(name: str, tmp_path: Path) -> None:
    """Norms stored around zero, decays stored as logarithms, biases of stacked experts."""
    checkpoint = open_checkpoint(zoo.save(zoo.make(name), tmp_path / name))
    inventory = checkpoint.inventory
    model = CandidateModel(checkpoint, inventory, VariantBank(tmp_path / "bank"))
    kept = {layer: tuple(experts) for layer, experts in zoo.uneven(checkpoint.family).items()}
    chosen = provide(model, candidate(inventory, kept))
    plain = tuple(t.name for t in inventory.tensors if not t.quantizable)
    windows = np.random.default_rng(0).integers(1, 8192, (2, 24))
    model.apply(chosen)
    before = logits(model, windows)
    overrides = repairs(model, chosen, (), plain)
    model.use(overrides)
    repaired = logits(model, windows)
    export_checkpoint(model, chosen, checkpoint, tmp_path / "out")
    model.use(None)
    assert np.array_equal(logits(model, windows), before)
    assert np.abs(logits(load(tmp_path / "out"), windows) - repaired).max() <= 1e-4
    assert np.abs(repaired - before).max() > 1e-2
