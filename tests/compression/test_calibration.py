"""Statistics are recomputed from what hooks of the test's own see."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.calibrate import calibrate
from compression.calibration import STATISTICS, Calibration
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint
from compression.variant_bank import VariantBank
from evaluators.texts import TextSet
from tests.compression.support import logits, refused

LAYERS, EXPERTS, TOP_K = (1, 2), 8, 2
UNREACHABLE = 5


def fresh(checkpoint: Checkpoint, stream: bool = False) -> CandidateModel:
    """A model nobody shares, which never asks for a quantized tensor."""
    return CandidateModel(checkpoint, checkpoint.inventory, VariantBank(Path("unused")), stream)


@pytest.fixture(scope="module")
def run(tiny: Checkpoint, tiny_texts: dict[str, TextSet]) -> SimpleNamespace:
    """A calibration on 10 windows, and the model's own inputs and outputs on them.

    Expert 5 of layer 1 cannot be chosen. Ten windows are more than a batch and no multiple of it.
    """
    compressed = fresh(tiny)
    model, windows = compressed.model, tiny_texts["calibration"].windows[:10]
    bias = compressed.shell.router(1).full["e_score_correction_bias"]
    bias[UNREACHABLE] = -100.0
    compressed.reset()
    before = logits(model, windows[:2])
    seen: list[int] = []
    result = calibrate(compressed, windows, "a name", seen.append)
    after = logits(model, windows[:2])

    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Any]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def keep(_: Any, args: Any, out: Any) -> None:
            inputs.setdefault(name, []).append(args[0])
            outputs.setdefault(name, []).append(out)

        module.register_forward_hook(keep)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.endswith("mlp.gate") or name.endswith("mlp"):
            watch(name, module)
    for window in windows:
        logits(model, window[None])
    flat = {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double() for n, xs in inputs.items()}
    return SimpleNamespace(
        model=model, windows=windows, result=result, before=before, after=after, seen=seen, inputs=flat,
        outputs=outputs, inventory=tiny.inventory,
    )  # fmt: skip


def mean_square(x: Tensor) -> np.ndarray:
    return np.asarray(x.square().mean(0))


def expert_pass(run: SimpleNamespace, layer: int, expert: int) -> SimpleNamespace:
    """What one expert is given and makes, in float64, by the definition of the architecture."""
    name = f"model.layers.{layer}.mlp"
    scores, gates, chosen = (torch.cat([o[i] for o in run.outputs[f"{name}.gate"]]) for i in range(3))
    token, slot = torch.where(chosen == expert)
    x = run.inputs[f"{name}.gate"][token]
    block = run.model.get_submodule(name).experts
    gate, up = block.gate_up_proj[expert].double().chunk(2)
    inner = F.silu(x @ gate.T) * (x @ up.T)
    y = inner @ block.down_proj[expert].double().T
    return SimpleNamespace(
        x=x,
        inner=inner,
        y=y,
        gate=gates[token, slot].double(),
        score=scores[token, expert].double().sigmoid(),
    )


def test_every_token_is_counted_for_each_of_its_experts(run: SimpleNamespace) -> None:
    tokens = run.result.routing["tokens"]
    assert tokens.shape == (len(LAYERS), EXPERTS)
    assert (tokens.sum(1) == run.windows.size * TOP_K).all()
    assert run.result.tokens == run.windows.size
    for position, layer in enumerate(LAYERS):
        chosen = torch.cat([o[2] for o in run.outputs[f"model.layers.{layer}.mlp.gate"]])
        assert tokens[position].tolist() == chosen.flatten().bincount(minlength=EXPERTS).tolist()


@pytest.mark.parametrize(("layer", "expert"), [(1, 0), (1, 7), (2, 3)])
def test_statistics_of_an_expert_are_those_of_its_definition(
    run: SimpleNamespace, layer: int, expert: int
) -> None:
    own = expert_pass(run, layer, expert)
    expected = {
        "tokens": len(own.x),
        "score": own.score.mean(),
        "mass": own.gate.sum(),
        "reap": (own.gate * own.y.norm(dim=-1)).mean(),
        "peak": own.y.abs().max(),
    }
    assert set(run.result.routing) == set(STATISTICS) == set(expected)
    assert len(own.x) > 10
    for name, value in expected.items():
        found = run.result.routing[name][LAYERS.index(layer), expert]
        assert found == pytest.approx(float(value), rel=1e-5), name


def test_gates_of_a_token_sum_to_the_routing_scale(run: SimpleNamespace) -> None:
    scale = run.model.config.routed_scaling_factor
    assert run.result.routing["mass"].sum(1) == pytest.approx(run.windows.size * scale, rel=1e-5)


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("output.weight", "lm_head"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj"),
        ("blk.1.attn_q_a.weight", "model.layers.1.self_attn.q_a_proj"),
        ("blk.1.attn_q_b.weight", "model.layers.1.self_attn.q_b_proj"),
        ("blk.1.attn_kv_a_mqa.weight", "model.layers.1.self_attn.kv_a_proj_with_mqa"),
        ("blk.1.attn_v_b.weight", "model.layers.1.self_attn.kv_b_proj"),
        ("blk.2.attn_output.weight", "model.layers.2.self_attn.o_proj"),
        ("blk.2.ffn_up_shexp.weight", "model.layers.2.mlp.shared_experts.up_proj"),
        ("blk.2.ffn_down_shexp.weight", "model.layers.2.mlp.shared_experts.down_proj"),
    ],
)
def test_imatrix_is_the_mean_squared_input(run: SimpleNamespace, tensor: str, module: str) -> None:
    np.testing.assert_allclose(run.result.imatrix[tensor], mean_square(run.inputs[module]), rtol=1e-5)


def test_imatrix_of_the_key_half_is_that_of_the_unrotated_query(run: SimpleNamespace) -> None:
    shape = run.model.config
    query = torch.cat([o.flatten(0, -2) for o in run.outputs["model.layers.1.self_attn.q_b_proj"]]).double()
    per_head = query.view(-1, shape.num_attention_heads, shape.qk_nope_head_dim + shape.qk_rope_head_dim)
    expected = mean_square(per_head[..., : shape.qk_nope_head_dim].flatten(0, 1))
    np.testing.assert_allclose(run.result.imatrix["blk.1.attn_k_b.weight"], expected, rtol=1e-5)


@pytest.mark.parametrize(("layer", "expert"), [(1, 0), (2, 6)])
def test_imatrix_of_stacked_experts_is_each_experts_own(
    run: SimpleNamespace, layer: int, expert: int
) -> None:
    own = expert_pass(run, layer, expert)
    for role, values in (("gate", own.x), ("up", own.x), ("down", own.inner)):
        found = run.result.imatrix[f"blk.{layer}.ffn_{role}_exps.weight"]
        assert found.shape == (EXPERTS, values.shape[-1])
        np.testing.assert_allclose(found[expert], mean_square(values), rtol=1e-4)


def test_an_expert_no_token_reached_takes_the_layers_mean(run: SimpleNamespace) -> None:
    assert run.result.unseen() == [(0, UNREACHABLE)]
    everyone = [expert_pass(run, 1, e) for e in range(EXPERTS)]
    found = run.result.imatrix["blk.1.ffn_down_exps.weight"][UNREACHABLE]
    np.testing.assert_allclose(found, mean_square(torch.cat([e.inner for e in everyone])), rtol=1e-4)
    for name in STATISTICS:
        assert run.result.routing[name][0, UNREACHABLE] == 0


def test_every_tensor_with_an_input_has_an_imatrix(run: SimpleNamespace) -> None:
    expected = {
        t.name: (EXPERTS, t.row) if t.per_expert else (t.row,)
        for t in run.inventory.quantizable
        if t.name != "token_embd.weight"
    }
    assert {name: value.shape for name, value in run.result.imatrix.items()} == expected
    for value in run.result.imatrix.values():
        assert value.dtype == np.float32
        assert (value >= 0).all()
        assert value.max() > 0


def test_calibration_leaves_the_model_as_it_was(run: SimpleNamespace) -> None:
    assert np.array_equal(run.before, run.after)
    assert not [m for m in run.model.modules() if "forward" in vars(m)]


def hooks(model: CandidateModel) -> dict[str, tuple[int, int]]:
    """How many hooks watch each module, of those that any watch."""
    found = {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.model.named_modules()}
    return {name: counts for name, counts in found.items() if any(counts)}


@pytest.mark.parametrize("failing", ["self_attn.o_proj", "mlp.gate", "mlp.shared_experts.down_proj"])
@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
def test_a_pass_that_fails_leaves_no_hooks(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, failing: str, stream: bool
) -> None:
    def broken(*args: Any) -> None:
        raise MemoryError(failing)

    compressed, windows = fresh(tiny, stream), np.arange(16)[None]
    before = hooks(compressed)
    with monkeypatch.context() as patch:
        module = compressed.model.model.layers[1].get_submodule(failing)
        patch.setattr(module, "forward", broken)
        with pytest.raises(MemoryError, match=failing):
            calibrate(compressed, windows, "text")
    assert hooks(compressed) == before
    assert not [m for m in compressed.model.modules() if "forward" in vars(m)]
    again = calibrate(compressed, windows, "text")
    expected = calibrate(fresh(tiny), windows, "text")
    assert all(np.array_equal(again.routing[name], expected.routing[name]) for name in STATISTICS)


def test_progress_counts_tokens_up_to_the_last(run: SimpleNamespace) -> None:
    assert run.seen == sorted(set(run.seen))
    assert run.seen[-1] == run.windows.size


def test_a_calibration_is_read_back_as_it_was_written(run: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "new" / "calibration.npz"
    run.result.save(path)
    again = Calibration.load(path)
    assert (again.tokens, again.text) == (run.windows.size, "a name")
    for name in ("imatrix", "routing"):
        before, after = getattr(run.result, name), getattr(again, name)
        assert list(before) == list(after)
        for key, value in before.items():
            assert after[key].dtype == value.dtype
            assert np.array_equal(after[key], value)
    assert [p.name for p in path.parent.iterdir()] == ["calibration.npz"]


def flipped(raw: bytes) -> bytes:
    changed = bytearray(raw)
    changed[len(raw) // 2] ^= 0xFF
    return bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [lambda raw: b"", lambda raw: raw[:-200], lambda raw: raw[:1000], flipped, lambda raw: b"x" * 500],
    ids=["empty", "cut", "start", "flipped", "garbage"],
)
def test_a_damaged_file_is_refused(run: SimpleNamespace, tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "calibration.npz"
    run.result.save(path)
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: Calibration.load(path), path, "calibrate again")


@pytest.mark.parametrize("about", [{}, [], {"tokens": 5}])
def test_a_file_without_its_description_is_refused(tmp_path: Path, about: Any) -> None:
    path = tmp_path / "calibration.npz"
    np.savez(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    refused(lambda: Calibration.load(path), path)
