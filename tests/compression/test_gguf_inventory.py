"""What a GGUF file's header says of the model, and the imatrix files that go with one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from compression.gguf_file import GgufFile
from compression.gguf_imatrix import Imatrix
from compression.gguf_inventory import describe_gguf
from spaces.errors import UserError
from spaces.gguf_layout import TensorInfo, Value, header
from spaces.gguf_reader import read_header
from spaces.inventory import Inventory
from tests.compression import tiny_gguf
from tests.compression.support import refused

EXPERTS = 8
NUMBERS = {
    "expert_count": EXPERTS, "expert_used_count": 2, "block_count": 3, "embedding_length": 64,
    "attention.head_count": 4, "context_length": 128,
}  # fmt: skip
SHAPES = {
    "token_embd.weight": (50, 64),
    "blk.0.ffn_up.weight": (128, 64),
    "blk.1.attn_norm.weight": (64,),
    "blk.1.attn_q.weight": (64, 64),
    "blk.1.ffn_gate_inp.weight": (EXPERTS, 64),
    "blk.1.ffn_gate_inp.scale": (64,),
    "blk.1.exp_probs_b.bias": (EXPERTS,),
    "blk.1.ffn_gate_up_exps.weight": (EXPERTS, 64, 64),
    "blk.1.ffn_down_exps.weight": (EXPERTS, 64, 32),
    "blk.1.ffn_down_exps.bias": (EXPERTS, 64),
    "blk.1.ffn_down_exps.scale": (EXPERTS,),
    "blk.1.ffn_norm_exps.weight": (64,),
    "blk.1.ffn_up_shexp.weight": (32, 64),
    "blk.1.ffn_gate_inp_shexp.weight": (64,),
    "blk.1.ssm_conv1d.weight": (64, 4),
    "blk.1.time_mix_w1.weight": (64, 4),
    "blk.1.indexer.attn_k.weight": (1, 1, 64),
}
PER_EXPERT = {
    "ffn_gate_inp.weight", "exp_probs_b.bias", "ffn_gate_up_exps.weight", "ffn_down_exps.weight",
    "ffn_down_exps.bias", "ffn_down_exps.scale",
}  # fmt: skip
QUANTIZABLE = {
    "token_embd.weight", "blk.0.ffn_up.weight", "blk.1.attn_q.weight", "blk.1.ffn_gate_up_exps.weight",
    "blk.1.ffn_down_exps.weight", "blk.1.ffn_up_shexp.weight",
}  # fmt: skip


def describe(
    folder: Path,
    numbers: Mapping[str, object] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    more: Mapping[str, Value] | None = None,
    architecture: str = "any",
) -> Inventory:
    """The inventory of a file of zeros; a hyperparameter that is None is left out."""
    metadata = {"general.architecture": Value("str", architecture), **(more or {})}
    for key, value in {**NUMBERS, **(numbers or {})}.items():
        if value is not None:
            first = value[0] if isinstance(value, tuple) else value
            kind = "str" if isinstance(first, str) else "u32"
            metadata[f"{architecture}.{key}"] = Value(kind, value)  # type: ignore[arg-type]
    infos = [
        TensorInfo(n, s, 0, 4 * int(np.prod(s))) for n, s in (SHAPES if shapes is None else shapes).items()
    ]
    path = folder / "model.gguf"
    path.write_bytes(header(metadata, infos) + bytes(sum(-(-t.size // 32) * 32 for t in infos)))
    return describe_gguf(GgufFile.open(path))


def test_roles_experts_and_what_may_be_quantized(tmp_path: Path) -> None:
    inventory = describe(tmp_path)
    assert [t.name for t in inventory.tensors] == list(SHAPES)
    assert {t.name.split(".", 2)[2] for t in inventory.tensors if t.per_expert} == PER_EXPERT
    assert {t.name for t in inventory.quantizable} == QUANTIZABLE
    roles = {t.name: (t.role, t.layer) for t in inventory.tensors}
    assert roles["token_embd.weight"] == ("token_embd", None)
    assert roles["blk.1.ffn_down_exps.scale"] == ("ffn_down_exps", 1)
    assert roles["blk.1.indexer.attn_k.weight"] == ("indexer.attn_k", 1)
    assert (inventory.layers, inventory.moe_layers) == (3, (1,))
    assert (inventory.experts, inventory.top_k, inventory.groups) == (EXPERTS, 2, 1)
    assert (inventory.vocabulary, inventory.hidden, inventory.heads, inventory.context) == (50, 64, 4, 128)
    assert inventory.kv_values == 3 * 4 * (16 + 16)
    assert (inventory.expert_count_key, inventory.expert_used_key) == (
        "any.expert_count",
        "any.expert_used_count",
    )


def test_metadata_is_kept_but_for_what_would_be_wrong(tmp_path: Path) -> None:
    kept = {
        "general.name": Value("str", "A \x1b[31mmodel\n"),
        "odd": Value("array", (Value("u8", (1,)), Value("str", ("\udcff",)))),
        "any.feed_forward_length": Value("u32", 64),
    }
    dropped = {"general.alignment": Value("u32", 32), "general.file_type": Value("u32", 1)}
    inventory = describe(tmp_path, more={**kept, **dropped})
    expected = {"general.architecture": Value("str", "any"), **kept}
    expected |= {f"any.{k}": Value("u32", v) for k, v in NUMBERS.items()}
    # The experts are 32 wide, which loaders that find no width would take from 64 and top-2.
    added = {"general.quantization_version": 2, "any.expert_feed_forward_length": 32}
    assert inventory.metadata == expected | {k: Value("u32", v) for k, v in added.items()}
    assert list(inventory.metadata) == [*expected, *added]
    assert inventory.name == "A [31mmodel"


def test_the_kv_cache_of_latent_and_hybrid_attention(tmp_path: Path) -> None:
    hybrid = {"attention.head_count_kv": (0, 2, 0), "attention.key_length": 32, "attention.value_length": 16}
    assert describe(tmp_path, hybrid).kv_values == 2 * (32 + 16)
    source = GgufFile.open(tiny_gguf.write(tmp_path / "latent.gguf", "deepseek2"))
    assert describe_gguf(source).kv_values == 3 * (64 + 32)


def test_a_top_k_per_layer_must_be_one(tmp_path: Path) -> None:
    assert describe(tmp_path, {"expert_used_count": (0, 4, 0)}).top_k == 4
    shapes = {**SHAPES, "blk.2.ffn_down_exps.weight": (EXPERTS, 64, 32)}
    refused(lambda: describe(tmp_path, {"expert_used_count": (0, 4, 2)}, shapes), "differs by layer")
    refused(lambda: describe(tmp_path, {"expert_used_count": (0, 4)}, shapes), "differs by layer")


@pytest.mark.parametrize(
    ("numbers", "shapes", "rule"),
    [
        ({"expert_count": None}, {}, "not a Mixture-of-Experts model"),
        ({"expert_count": 1}, {}, "not a Mixture-of-Experts model"),
        ({"expert_count": (8, 8, 8)}, {}, "expert_count must be a whole number"),
        ({"expert_count": "8"}, {}, "expert_count must be a whole number"),
        ({"expert_used_count": None}, {}, "expert_used_count must be a whole number, but is missing"),
        ({"expert_used_count": 9}, {}, "must be within 1..8"),
        ({"expert_group_count": 3}, {}, "do not divide into 3 groups"),
        ({"block_count": 2**32 - 1}, {}, "block_count is 4294967295"),
        ({"context_length": None}, {}, "context_length"),
        ({"attention.head_count_kv": ("a", "b")}, {}, "head_count_kv"),
        ({}, {"blk.1.ffn_up_exps.weight": (6, 64, 64)}, "must have the 8 experts"),
        ({}, {"blk.1.exp_probs_b.bias": (6,)}, "must have the 8 experts"),
        ({}, {"blk.1.ffn_up.3.weight": (64, 64)}, "one expert's tensor"),
    ],
)
def test_a_model_that_cannot_be_described_is_refused(
    numbers: dict[str, object], shapes: dict[str, tuple[int, ...]], rule: str, tmp_path: Path
) -> None:
    refused(lambda: describe(tmp_path, numbers, {**SHAPES, **shapes}), tmp_path / "model.gguf", rule)


def test_a_packed_row_of_experts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    infos = [TensorInfo("blk.0.exp_probs_b.bias", (32,), 8, 34)]
    metadata = {"general.architecture": Value("str", "any"), "any.expert_count": Value("u32", 32)}
    path.write_bytes(header(metadata, infos) + bytes(64))
    refused(lambda: describe_gguf(GgufFile.open(path)), path, "'blk.0.exp_probs_b.bias'", "Q8_0")


def test_damaged_hyperparameters_are_user_errors(tmp_path: Path) -> None:
    describe(tmp_path, {"attention.head_count_kv": (4, 4, 4), "expert_group_count": 2})
    path, generator = tmp_path / "model.gguf", random.Random(0)
    content = path.read_bytes()
    end, described = read_header(path).data_start, 0
    for _ in range(1500):
        changed = bytearray(content)
        at = generator.randrange(24, end)
        changed[at] = generator.choice([0, 1, 255, generator.randrange(256)])
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            inventory = describe_gguf(GgufFile.open(path))
            inventory.file_bytes(inventory.uniform_plan("Q8_0", kept=2))
            described += 1
    assert 100 < described < 1500


def test_a_model_without_stacks_is_refused(tmp_path: Path) -> None:
    refused(lambda: describe(tmp_path, shapes={"token_embd.weight": (5, 32)}), "no stacked experts")


def write_imatrix(path: Path, sums: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray]) -> Path:
    """As llama-imatrix writes it."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, value in sums.items():
        writer.add_tensor(f"{name}.in_sum2", value.astype(np.float32))
    for name, value in counts.items():
        writer.add_tensor(f"{name}.counts", value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_imatrix_holds_means(tmp_path: Path) -> None:
    sums = {"a.weight": np.array([4.0, 0.0, 8.0]), "b.weight": np.array([[2.0, 4.0], [6.0, 0.0], [0.0, 0.0]])}
    counts = {"a.weight": np.array([4.0]), "b.weight": np.array([[2.0], [3.0], [0.0]])}
    imatrix = Imatrix(write_imatrix(tmp_path / "imatrix.gguf", sums, counts))
    assert list(imatrix) == ["a.weight", "b.weight"]
    assert "c.weight" not in imatrix
    np.testing.assert_array_equal(imatrix["a.weight"], [[1, 0, 2]])
    # The last expert saw no token: nothing is known of it, so nothing is weighted.
    np.testing.assert_array_equal(imatrix["b.weight"], [[1, 2], [2, 0], [1, 1]])
    with pytest.raises(KeyError):
        imatrix["c.weight"]


def test_a_bad_imatrix_is_refused(tmp_path: Path) -> None:
    path, one = tmp_path / "imatrix.gguf", np.ones((1, 1))
    path.write_bytes(b"\3\0\0\0legacy" + bytes(50))
    refused(lambda: Imatrix(path), path, "not an imatrix in GGUF format", "llama-imatrix")
    model = tiny_gguf.write(tmp_path / "model.gguf", "olmoe")
    refused(lambda: Imatrix(model), model, "not an imatrix")
    refused(lambda: Imatrix(write_imatrix(path, {"a": np.ones(3)}, {})), path, "'a.counts' is missing")
    for sums in (np.array([1.0, -1.0]), np.array([1.0, np.inf]), np.array([1.0, np.nan])):
        bad = Imatrix(write_imatrix(path, {"a": sums}, {"a": one}))
        refused(lambda bad=bad: bad["a"], path, "'a' holds negative or non-finite")
    uneven = Imatrix(write_imatrix(path, {"a": np.ones(3)}, {"a": np.ones((2, 1))}))
    refused(lambda: uneven["a"], path, "3 sums for 2 counts")
