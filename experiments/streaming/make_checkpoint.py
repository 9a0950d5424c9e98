"""A checkpoint larger than memory: `python -m experiments.streaming.make_checkpoint DIR --size 30GB`.

Random bfloat16 weights of a Qwen3-MoE in the publisher's layout: one matrix per expert, shards of at
most 4 GB, an index. The tokenizer is the reference model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from compression.families import family
from compression.families.base import Family
from compression.files import write_text
from compression.safetensors_writer import Item, write
from search.commands import run_command
from search.options import Parser
from spaces.budget import format_size, parse_size
from spaces.errors import UserError

REFERENCE = Path(__file__).resolve().parents[1] / "reference_model/checkpoint"
_SHARD = 4 * 10**9
_POOL = 2**24 + 2**13  # random numbers that all tensors are cut from

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 8192,
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip


def _names(of_family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor on disk: stacked experts one by one."""
    for part in of_family.parts:
        if part.stacked:
            for e in range(part.tensor.shape[0]):
                yield part.each[0].format(e), part.tensor.shape[1:]
        else:
            yield part.path, part.tensor.shape


def _items(of_family: Family, pool: np.ndarray, rng: np.random.Generator) -> Iterator[Item]:
    for name, shape in _names(of_family):
        scale = np.float32(1.0 if len(shape) == 1 else shape[-1] ** -0.5)

        def pieces(shape: tuple[int, ...] = shape, scale: np.float32 = scale) -> Iterator[np.ndarray]:
            if len(shape) == 1:
                values = np.ones(shape, np.float32)
            else:
                start = int(rng.integers(2**13))
                values = np.resize(pool[start:], shape) * scale
            yield (values.view(np.uint32) >> 16).astype(np.uint16)

        yield Item(name, "BF16", shape, pieces)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="30GB", help="bytes of weights, reached by the number of layers")
    args = parser.parse_args()
    wanted = parse_size(args.size, "--size")
    if args.folder.exists():
        raise UserError(f"{args.folder}: exists; choose another folder")
    layers = 1
    while True:
        of_family = family({**CONFIG, "num_hidden_layers": layers}, args.folder.name)
        if 2 * of_family.inventory().parameters() >= wanted:
            break
        layers += 1
    args.folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shards: list[list[Item]] = [[]]
    for item in _items(of_family, rng.standard_normal(_POOL, np.float32), rng):
        if sum(i.size for i in shards[-1]) + item.size > _SHARD:
            shards.append([])
        shards[-1].append(item)
    where: dict[str, str] = {}
    for number, items in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (args.folder / name).open("wb") as stream:
            write(stream, items)
        where |= {item.name: name for item in items}
        print(f"{name}: {format_size(sum(i.size for i in items))}", flush=True)
    total = sum(i.size for items in shards for i in items)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_text(args.folder / "model.safetensors.index.json", json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / name, args.folder / name)
    write_text(args.folder / "config.json", json.dumps({**CONFIG, "num_hidden_layers": layers}, indent=1))
    print(f"{args.folder}: {layers} layers, {format_size(total)}")


if __name__ == "__main__":
    run_command(main)
