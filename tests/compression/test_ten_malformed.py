"""Ten ways a downloaded checkpoint is wrong or odd: each is supported, or one clear line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.checkpoint import load_model, open_checkpoint
from compression.gguf_export import with_tokenizer
from evaluators.llama_cpp import file_logits
from experiments import zoo
from spaces.errors import UserError

WINDOWS = np.random.default_rng(0).integers(1, 8192, (2, 32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return zoo.save(zoo.make("mixtral"), tmp_path / "model", max_shard_size="4MB")


def whole_way(folder: Path) -> Any:
    """Everything of a checkpoint that a search reads before its first stage, and all weights."""
    checkpoint = open_checkpoint(folder)
    replace(checkpoint, inventory=with_tokenizer(checkpoint))
    return load_model(checkpoint)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def missing_shard(folder: Path) -> str:
    shards(folder)[1].unlink()
    return shards(folder)[0].name.replace("00001-of", "00002-of")


def wrong_index(folder: Path) -> str:
    def swap(where: dict[str, str]) -> None:
        name = next(n for n, file in where.items() if file == shards(folder)[0].name)
        where[name] = shards(folder)[1].name

    edit_index(folder, swap)
    return "model.safetensors.index.json"


def truncated(folder: Path) -> str:
    file = shards(folder)[1]
    os.truncate(file, file.stat().st_size - 1000)
    return file.name


def not_a_number(folder: Path) -> str:
    file = shards(folder)[1]
    tensors = load_file(file)
    name, tensor = next((n, t) for n, t in tensors.items() if t.ndim == 2)
    tensor[3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def mismatched(folder: Path) -> str:
    edit_config(folder, hidden_size=512)
    return "config.json"


def no_experts(folder: Path) -> str:
    edit_config(folder, num_local_experts=0)
    return "experts"


def no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer"


def links_in_a_loop(folder: Path) -> str:
    file = shards(folder)[0]
    file.unlink()
    (folder / "other").symlink_to(file)
    file.symlink_to(folder / "other")
    return file.name


@pytest.mark.parametrize(
    "spoil",
    [
        missing_shard, wrong_index, truncated, not_a_number, mismatched, no_experts, no_tokenizer,
        links_in_a_loop,
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(spoil: Callable[[Path], str], folder: Path) -> None:
    assert len(shards(folder)) > 1
    whole_way(folder)
    named = spoil(folder)
    with pytest.raises(UserError) as caught:
        whole_way(folder)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_links_to_itself_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError) as caught:
        whole_way(tmp_path / "loop")
    assert "loop" in str(caught.value)


def test_float8_in_blocks_is_read(tmp_path: Path) -> None:
    """bfloat16 beside float8 with a scale for each 128 x 128 block, as DeepSeek-V3 is shipped."""
    model = zoo.make("deepseek_v3")
    folder = zoo.save(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name in [n for n in tensors if ".experts." in n]:
        blocks = torch.nn.functional.pad(tensors[name], [0, -tensors[name].shape[1] % 128, 0, 0])
        scale = blocks.reshape(blocks.shape[0] // 128, 128, -1, 128).abs().amax((1, 3)) / 448
        grown = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        tensors[name + "_scale_inv"] = scale
        tensors[name] = (tensors[name] / grown).to(torch.float8_e4m3fn)
        plain[name] = tensors[name].float() * grown
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    about = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    edit_config(folder, quantization_config=about)
    found = zoo.logits(whole_way(folder), WINDOWS)
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    assert np.array_equal(found, zoo.logits(whole_way(folder), WINDOWS))
    assert not np.array_equal(found, zoo.logits(model, WINDOWS))


def test_tied_embeddings_are_read_and_written(tmp_path: Path) -> None:
    model = zoo.make("mixtral", tie_word_embeddings=True)
    checkpoint = open_checkpoint(zoo.save(model, tmp_path / "model"))
    assert "output.weight" not in checkpoint.family.by_name
    expected = zoo.logits(model, WINDOWS)
    assert np.array_equal(zoo.logits(load_model(checkpoint), WINDOWS), expected)
    found = file_logits(zoo.write_float(checkpoint, tmp_path / "a.gguf"), WINDOWS, tmp_path / "logits.npy")
    assert np.abs(found - expected).max() <= 1e-3
