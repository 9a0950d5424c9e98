"""Weights are read as transformers reads them, from every form that publishers ship."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.checkpoint import load_model, open_checkpoint
from compression.families.parts import Part
from compression.safetensors_file import Entry, read
from compression.weights import FolderWeights
from experiments import zoo
from spaces.errors import UserError

Tensors = dict[str, torch.Tensor]
WINDOWS = np.random.default_rng(2).integers(1, 8192, (1, 24))


def rewritten(folder: Path, edit: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """Changes a checkpoint's tensors, and entries of its config (None: away with it)."""
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    file = folder / "config.json"
    fields = {**json.loads(file.read_text()), **config}
    gone = {k for k, v in config.items() if v is None}
    file.write_text(json.dumps({k: v for k, v in fields.items() if k not in gone}))
    return folder


def every(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint as GGUF lays them out."""
    checkpoint = open_checkpoint(folder)
    return {p.name: checkpoint.weights.read(p) for p in checkpoint.family.parts}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


# Block-scaled float8, as DeepSeek-V3 ships it.


def to_float8(tensors: Tensors, block: tuple[int, int] = (128, 128)) -> Tensors:
    """Linear layers, experts among them, in F8_E4M3 with a scale for every block, the last ones cut short."""
    out = {}
    for name, value in tensors.items():
        if value.ndim != 2 or any(kept in name for kept in ("embed_tokens", "lm_head", "mlp.gate.")):
            out[name] = value.bfloat16()
            continue
        blocks = [-(-n // b) for n, b in zip(value.shape, block, strict=True)]
        scales = torch.empty(blocks)
        packed = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
        for i in range(blocks[0]):
            for j in range(blocks[1]):
                piece = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                scales[i, j] = value[piece].abs().max() / 448
                packed[piece] = (value[piece] / scales[i, j]).to(torch.float8_e4m3fn)
        out[name], out[f"{name}_scale_inv"] = packed, scales
    return out


def from_float8(tensors: Tensors, block: tuple[int, int] = (128, 128)) -> Tensors:
    """What those stand for, in float32."""
    out = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        out[name] = value.float()
        if value.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale_inv"]
            for axis in (0, 1):
                scale = scale.repeat_interleave(block[axis], axis).narrow(axis, 0, value.shape[axis])
            out[name] *= scale
    return out


FLOAT8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    """Sides of 320, 96 and 64: no multiples of 128."""
    model = zoo.make("deepseek_v3", hidden_size=320, moe_intermediate_size=96)
    return zoo.save(model, tmp_path / "deepseek")


@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_block_scaled_float8_is_dequantized(deepseek: Path, tmp_path: Path, block: tuple[int, int]) -> None:
    about = {**FLOAT8, "weight_block_size": list(block)}
    found = every(rewritten(deepseek, lambda t: to_float8(t, block), quantization_config=about))
    expected = rewritten(deepseek, lambda t: from_float8(t, block), quantization_config=None)
    assert same(found, every(expected))


def drop_scale(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.endswith("o_proj.weight_scale_inv")}


def cut_scale(tensors: Tensors) -> Tensors:
    return {k: v[:1] if k.endswith("o_proj.weight_scale_inv") else v for k, v in tensors.items()}


def whole_scale(tensors: Tensors) -> Tensors:
    return {k: v.to(torch.int32) if k.endswith("o_proj.weight_scale_inv") else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [(drop_scale, "is missing"), (cut_scale, "shape"), (whole_scale, "I32")],
    ids=["none", "wrong shape", "wrong kind"],
)
def test_scales_that_do_not_fit_are_refused(
    deepseek: Path, edit: Callable[[Tensors], Tensors], reason: str
) -> None:
    rewritten(deepseek, lambda t: edit(to_float8(t)), quantization_config=FLOAT8)
    with pytest.raises(UserError, match=rf"o_proj.weight.*{reason}"):
        open_checkpoint(deepseek)


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [128, None]])
def test_a_block_size_that_is_none_is_refused(deepseek: Path, block: object) -> None:
    rewritten(deepseek, to_float8, quantization_config={**FLOAT8, "weight_block_size": block})
    with pytest.raises(UserError, match="weight_block_size"):
        open_checkpoint(deepseek)


def test_every_float8_code_means_what_torch_takes_it_for(tmp_path: Path) -> None:
    codes = np.arange(256, dtype=np.uint8)
    (tmp_path / "codes").write_bytes(codes.tobytes())
    found = read(Entry(tmp_path / "codes", "F8_E4M3", (256,), 0))
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    signed = np.isfinite(expected)
    assert np.array_equal(np.signbit(found[signed]), np.signbit(expected[signed]))


def test_the_layer_for_further_tokens_is_left_out(deepseek: Path) -> None:
    before = every(deepseek)
    extra = {
        "model.layers.3.eh_proj.weight": torch.ones(320, 640),
        "model.layers.3.input_layernorm.weight": torch.full((320,), torch.nan),
        "model.layers.3.mlp.experts.0.gate_proj.weight": torch.ones(96, 320),
    }
    assert same(before, every(rewritten(deepseek, lambda t: t | extra, num_nextn_predict_layers=1)))


def test_a_config_saved_by_transformers_is_still_scored_by_sigmoid(deepseek: Path) -> None:
    rewritten(deepseek, lambda t: t, scoring_func=None)
    checkpoint = open_checkpoint(deepseek)
    assert checkpoint.inventory.metadata["deepseek2.expert_gating_func"].value == 2
    assert checkpoint.family.refusals() == []


# gpt-oss: MXFP4 as published, and unpacked.


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    return zoo.save(zoo.make("gpt_oss"), tmp_path / "gpt_oss")


def to_mxfp4(tensors: Tensors) -> Tensors:
    """Random blocks and scales in place of the experts' matrices (experts, inputs, outputs)."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, value in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out[name] = value.bfloat16()
            continue
        experts, inputs, outputs = value.shape
        shape = (experts, outputs, inputs // 32)
        out[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        out[f"{name}_scales"] = torch.randint(120, 126, shape, generator=generator, dtype=torch.uint8)
    return out


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.layers.*.self_attn"]}


def test_mxfp4_gives_the_model_that_transformers_makes_of_it(gpt_oss: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    rewritten(gpt_oss, to_mxfp4, quantization_config=MXFP4)
    expected = AutoModelForCausalLM.from_pretrained(
        gpt_oss, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    found = load_model(open_checkpoint(gpt_oss))
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    assert np.array_equal(zoo.logits(found, WINDOWS), zoo.logits(expected, WINDOWS))


def test_one_expert_of_mxfp4_is_its_slice(gpt_oss: Path) -> None:
    checkpoint = open_checkpoint(rewritten(gpt_oss, to_mxfp4, quantization_config=MXFP4))
    for part in checkpoint.family.parts:
        if part.stacked:
            whole = checkpoint.weights.read(part)
            assert np.array_equal(checkpoint.weights.read(part, 5), whole[5])


def wrong_blocks(tensors: Tensors) -> Tensors:
    return {k: v[:, :-2] if "down_proj_" in k and not k.endswith("bias") else v for k, v in tensors.items()}


def no_scales(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.endswith("down_proj_scales")}


@pytest.mark.parametrize("edit", [wrong_blocks, no_scales])
def test_mxfp4_that_does_not_fit_is_refused(gpt_oss: Path, edit: Callable[[Tensors], Tensors]) -> None:
    rewritten(gpt_oss, lambda t: edit(to_mxfp4(t)), quantization_config=MXFP4)
    with pytest.raises(UserError, match="down_proj"):
        open_checkpoint(gpt_oss)


def test_gpt_oss_in_bfloat16_is_read(gpt_oss: Path) -> None:
    expected = every(rewritten(gpt_oss, lambda t: {k: v.bfloat16().float() for k, v in t.items()}))
    assert same(every(rewritten(gpt_oss, lambda t: {k: v.bfloat16() for k, v in t.items()})), expected)


# How tensors are gathered.


def fuse(tensors: Tensors) -> Tensors:
    """Experts stacked, gate above up, as the model holds them."""
    out = {k: v for k, v in tensors.items() if ".experts." not in k}
    for layer in range(4):
        path = f"model.layers.{layer}.mlp.experts"
        if f"{path}.0.gate_proj.weight" in tensors:
            matrices = [
                [tensors[f"{path}.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")] for e in range(8)
            ]
            out[f"{path}.gate_up_proj"] = torch.stack([torch.cat(m[:2]) for m in matrices])
            out[f"{path}.down_proj"] = torch.stack([m[2] for m in matrices])
    return out


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "qwen3_moe", "qwen3_next"])
def test_stacked_experts_are_those_of_single_ones(name: str, tmp_path: Path) -> None:
    folder = zoo.save(zoo.make(name), tmp_path / name)
    single = every(folder)
    rewritten(folder, fuse)
    assert "model.layers.1.mlp.experts.down_proj" in load_file(folder / "model.safetensors")
    assert same(every(folder), single)


def test_a_missing_expert_is_named(deepseek: Path) -> None:
    gone = "model.layers.1.mlp.experts.7.up_proj.weight"
    rewritten(deepseek, lambda t: {k: v for k, v in t.items() if k != gone})
    with pytest.raises(UserError, match=gone):
        open_checkpoint(deepseek)


@pytest.mark.parametrize("held", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_are_found_under_either_name(held: str, tmp_path: Path) -> None:
    model = zoo.make("qwen3_moe", tie_word_embeddings=True)
    folder = zoo.save(model, tmp_path / "tied")

    def rename(tensors: Tensors) -> Tensors:
        names = ("model.embed_tokens.weight", "lm_head.weight")
        matrix = next(tensors[n] for n in names if n in tensors)
        return {k: v for k, v in tensors.items() if k not in names} | {held: matrix}

    checkpoint = open_checkpoint(rewritten(folder, rename))
    assert "output.weight" not in checkpoint.inventory.by_name
    assert np.array_equal(zoo.logits(load_model(checkpoint), WINDOWS), zoo.logits(model, WINDOWS))


def test_shards_with_an_index_are_the_same_model(tmp_path: Path) -> None:
    model = zoo.make("gpt_oss")
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    zoo.save(model, whole)
    zoo.save(model, shards, max_shard_size="4MB")
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    assert same(every(shards), every(whole))


@pytest.mark.parametrize("name", sorted(zoo.FAMILIES))
def test_an_expert_is_a_slice_and_layouts_take_arrays_like_tensors(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(zoo.save(zoo.make(name), tmp_path / name))
    model = load_model(checkpoint)
    assert isinstance(checkpoint.weights, FolderWeights)
    for part in checkpoint.family.parts:
        values = checkpoint.weights.parameter(part)
        assert np.array_equal(values, laid(part, model).reshape(values.shape))
        if part.stacked:
            assert np.array_equal(checkpoint.weights.parameter(part, 3), values[3])


def laid(part: Part, model: Any) -> np.ndarray:
    """A parameter of the transformers model in GGUF's order."""
    owner, _, leaf = part.path.rpartition(".")
    views = part.views(getattr(model.get_submodule(owner), leaf).data)
    return torch.cat([v.flatten() for v in views]).numpy()
