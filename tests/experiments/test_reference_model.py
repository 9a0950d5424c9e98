"""The reference model is a DeepSeek-V3 and its corpus keeps held-out text apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from compression.families import describe
from experiments.reference_model.corpus import SPLITS, _pieces, split_of
from experiments.reference_model.network import Moe, Network, Shape, parameter_count
from experiments.reference_model.optimizer import Optimizer, orthogonalize
from experiments.reference_model.tokenizer import END_OF_TEXT, pack
from experiments.reference_model.train import Batches, rebalance, write_checkpoint
from spaces.inventory import read_config
from tests.conftest import REFERENCE

SMALL = Shape(
    vocabulary=96, hidden=64, layers=3, dense_width=96, experts=6, top_k=2, expert_width=32, heads=2,
    q_rank=48, kv_rank=32, nope=16, rope=8, value=24, context=64,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def network(shape: Shape = SMALL, *, seed: int = 0) -> Network:
    """Random, its weights exact in bf16, its norms and biases not the initial ones."""
    torch.manual_seed(seed)
    net = Network(shape)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if "norm" in name:
            value.data.add_(0.1 * torch.randn_like(value))
        if name.endswith("mlp.bias"):
            value.data.normal_(0, 0.2)
        elif not name.endswith("load"):
            value.data = value.data.bfloat16().float()
    net.head.weight.data.mul_(8)
    return net


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, SMALL.vocabulary, shape))


@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, top_k=3, dense_layers=2, scale=1.0, theta=500.0)])
def test_logits_are_those_of_transformers(shape: Shape, tmp_path: Path) -> None:
    net = network(shape)
    write_checkpoint(net, tmp_path / "model")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(3, 40)
    with torch.inference_mode():
        expected = model.eval()(ids, use_cache=False).logits
        found = net.hidden(ids) @ net.head.weight.T
    assert expected.std() > 0.5
    assert (found - expected).abs().max() <= 1e-4


def test_a_checkpoint_is_bf16_with_exact_biases(tmp_path: Path) -> None:
    net = network()
    write_checkpoint(net, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight.dtype == torch.bfloat16
    moe = net.blocks[1].mlp
    assert isinstance(moe, Moe)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, moe.bias)


@pytest.mark.parametrize("shape", [SMALL, Shape()])
def test_its_config_describes_its_weights(shape: Shape) -> None:
    inventory = describe(shape.config(), "reference")
    with torch.device("meta"):
        biases = sum(m.bias.numel() for m in Network(shape).modules() if isinstance(m, Moe))
    assert inventory.parameters() == parameter_count(shape) + biases
    assert inventory.moe_layers == tuple(range(1, shape.layers))


def test_the_shipped_config_is_that_of_the_code() -> None:
    assert read_config(REFERENCE / "checkpoint") == Shape().config()


def test_loss_is_cross_entropy_with_its_gradients() -> None:
    net, ids = network(), tokens(2, 21)
    found = net.loss(ids)
    found.backward()
    gradients = {n: p.grad for n, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    logits = net.hidden(ids[:, :-1]) @ net.head.weight.T
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in net.named_parameters():
        gradient = gradients[name]
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.allclose(gradient, parameter.grad, rtol=1e-3, atol=1e-6), name


def test_a_scaled_loss_has_scaled_gradients() -> None:
    net, ids = network(), tokens(2, 9)
    net.loss(ids).backward()
    whole = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    (net.loss(ids) / 4).backward()
    for name, parameter in net.named_parameters():
        if name in whole:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad * 4, whole[name], rtol=1e-4, atol=1e-6), name


def test_loads_count_tokens_and_rebalancing_answers_them() -> None:
    net = network()
    moes = [m for m in net.modules() if isinstance(m, Moe)]
    net.hidden(tokens(2, 30))
    assert [m.load.sum().item() for m in moes] == [60 * SMALL.top_k] * 2
    before = moes[0].bias.clone()
    moes[0].load.copy_(torch.tensor([1.0, 10, 10, 10, 10, 59]))  # the fair share is 100/6
    rebalance(net, 0.5)
    assert (moes[0].bias - before).tolist() == pytest.approx([0.5, 0, 0, 0, 0, -0.5], abs=1e-6)
    assert not any(m.load.any() for m in moes)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32), (5, 48, 24), (5, 24, 48)])
def test_orthogonalize_gives_nearly_orthogonal_rows(shape: tuple[int, ...]) -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float() * 100
    found = orthogonalize(matrix).float()
    assert found.shape == matrix.shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert values.mean() == pytest.approx(0.95, abs=0.15)
    if len(shape) == 3:
        for one, all_ in zip(matrix, found, strict=True):
            assert (orthogonalize(one).float() - all_).abs().max() < 0.02


def test_orthogonalize_keeps_the_singular_vectors() -> None:
    matrix = torch.from_numpy(np.random.default_rng(1).standard_normal((32, 96))).float()
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    aligned = torch.diagonal(u.T @ orthogonalize(matrix).float() @ vh.T)
    assert aligned.min() > 0.3


def trained(net: Network, optimizer: Optimizer, steps: int, *, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = net.loss(tokens(4, 17, seed=step % 2))
        loss.backward()
        optimizer.step(1.0)
        losses.append(loss.item())
    return losses


def rates(net: Network) -> Optimizer:
    return Optimizer(net, muon_rate=0.02, adam_rate=4e-3, decay=0.05)


def test_training_lowers_the_loss_and_clears_gradients() -> None:
    net = network()
    losses = trained(net, rates(net), 8)
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in net.parameters())


def test_small_steps_add_up_under_bf16_weights() -> None:
    net = network()
    optimizer = Optimizer(net, muon_rate=1e-6, adam_rate=1e-6, decay=0.0)
    for parameter in net.parameters():
        parameter.data = parameter.data.bfloat16()
    name = "blocks.0.mlp.gate.weight"
    before, master = net.get_parameter(name).detach().clone(), optimizer.master[name].clone()
    trained(net, optimizer, 1)
    # One step is too small for bf16 and is kept in the master weights.
    assert torch.equal(net.get_parameter(name), before)
    moved = (optimizer.master[name] - master).abs()
    assert 0 < moved.max() < 1e-5


def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    straight = network()
    expected = trained(straight, rates(straight), 4)
    first = network()
    optimizer = rates(first)
    trained(first, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = network(seed=9)
    second.load_state_dict({n: b for n, b in first.named_buffers() if n.endswith("bias")}, strict=False)
    resumed = rates(second)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert trained(second, resumed, 2, first=2) == pytest.approx(expected[2:], rel=1e-4)
    assert resumed.steps == 4


def test_ranks_share_the_work_evenly_and_own_every_weight_once() -> None:
    net = network()
    owners = [Optimizer(net, muon_rate=1, adam_rate=1, decay=0, rank=r, ranks=3).owner for r in range(3)]
    assert owners[0] == owners[1] == owners[2]
    assert set(owners[0]) == {n for n, _ in net.named_parameters()}
    sizes = {r: sum(p.numel() for n, p in net.named_parameters() if owners[0][n] == r) for r in range(3)}
    assert max(sizes.values()) < 1.2 * min(sizes.values())


STREAM = np.arange(1003, dtype=np.uint16)


def test_batches_are_windows_of_the_stream_and_their_targets() -> None:
    batches = Batches(STREAM, 10)
    rows = batches(0, 7)
    assert rows.shape == (7, 11)
    assert rows.dtype == torch.int64
    assert (rows.diff(dim=1) == 1).all()


def test_a_batch_depends_on_its_index_alone() -> None:
    expected = {i: Batches(STREAM, 10)(i, 1)[0].tolist() for i in (0, 5, 120, 250, 98)}
    batches = Batches(STREAM, 10)
    for i in (250, 0, 98, 120, 5, 250):
        assert batches(i, 1)[0].tolist() == expected[i]
    assert batches(118, 4)[2].tolist() == expected[120]
    assert Batches(STREAM, 10, seed=1)(0, 20).tolist() != batches(0, 20).tolist()


def test_an_epoch_sees_every_window_once_and_each_epoch_anew() -> None:
    batches = Batches(STREAM, 10)
    epochs = [batches(e * batches.windows, batches.windows)[:, 0].tolist() for e in range(3)]
    for starts in epochs:
        assert len(set(starts)) == batches.windows
        assert len({s % 10 for s in starts}) == 1
        assert max(starts) + 10 < len(STREAM)
    assert len({tuple(e) for e in epochs}) == 3
    # Nearly all of the stream is seen: at most a window is left at either end.
    assert batches.windows * 10 >= len(STREAM) - 30


HELD_OUT = {
    "search": "49",
    "selection": "32",
    "report": "120",
    "calibration": "7",
    "tasks": "19",
    "train": "0",
}


@pytest.mark.parametrize(("split", "text"), HELD_OUT.items())
def test_the_held_out_rule_does_not_change(split: str, text: str) -> None:
    assert split_of(text) == split
    assert split_of(f"  {text}\n") == split


def test_a_twelfth_is_held_out_evenly() -> None:
    found = [split_of(f"document {i}") for i in range(6400)]
    counts = {name: found.count(name) for name in (*SPLITS, "train")}
    assert counts["train"] == pytest.approx(5900, abs=120)
    assert all(60 < counts[name] < 140 for name in SPLITS)


@pytest.mark.parametrize("name", ["search", "selection", "report", "calibration"])
def test_shipped_texts_are_of_the_split_they_are_named_after(name: str) -> None:
    lines = (REFERENCE / "texts" / f"{name}.jsonl").read_text("utf-8").split("\n")
    documents = [json.loads(line)["text"] for line in lines if line]
    assert len(documents) > 50
    assert {split_of(text) for text in documents} == {name}


def test_pieces_repeat_no_paragraph_and_drop_what_is_short() -> None:
    seen: set[bytes] = set()
    paragraphs = [f"paragraph {i} " * 30 for i in range(40)]
    pieces = list(_pieces([*paragraphs, paragraphs[3]], seen))
    assert [p for piece in pieces for p in piece.split("\n")] == paragraphs
    assert all(4000 < len(p) < 4600 for p in pieces[:-1])
    assert list(_pieces(paragraphs, seen)) == []
    assert list(_pieces(["too short"], seen)) == []


def test_the_corpus_is_packed_with_an_end_after_every_document(tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(REFERENCE / "checkpoint")
    texts = [f"Document {i}, of héron and 日本." for i in range(600)]
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"source": "a", "text": t}) + "\n" for t in texts), "utf-8"
    )
    count = pack(tokenizer, tmp_path, tmp_path / "train.npy")
    stream = np.load(tmp_path / "train.npy")
    assert stream.dtype == np.uint16
    assert len(stream) == count
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    ends = np.flatnonzero(stream == end)
    assert len(ends) == len(texts)
    first = tokenizer.decode(stream[: ends[0]].tolist())
    last = tokenizer.decode(stream[ends[-2] + 1 : ends[-1]].tolist())
    assert (first, last) == (texts[0], texts[-1])
