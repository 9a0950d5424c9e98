"""What one core of this machine does in a second of every kind of a search's work.

    python -m experiments.scale_rates DIR --trace experiments/results/scale_trace.json \\
        --json experiments/results/scale_rates.json --rates search/scale/rates.json

Seconds are CPU seconds of one thread, so that other programs disturb little; disks are timed by the clock.
DIR takes a checkpoint of some 200 MB and a file of 512 MB, both removed again. `--trace` is what
`experiments.scale_trace` wrote; the rates that only a whole run shows are taken from it. Figures that
the JSON file holds are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from compression import ggml
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint, open_checkpoint
from compression.families import family
from compression.files import write_text
from compression.variant_bank import VariantBank
from evaluators.divergence import Reference
from experiments.decode_speed import cpu
from experiments.scale_trace import of_trace
from experiments.slow_suite import commit
from experiments.streaming.make_checkpoint import CONFIG
from search.commands import run_command
from search.options import REFERENCE_MODEL
from spaces.inventory import Tensor
from spaces.quant_types import LADDER, SHORT_LADDER, fitting

_WIDE = CONFIG | {
    "num_hidden_layers": 1, "num_experts": 16, "num_experts_per_tok": 2, "vocab_size": 4096,
}  # fmt: skip
_LENGTHS = (2, 8, 64, 256)  # of 8 windows: 2 to 256 tokens for each of 16 experts of which 2 are active
_ROW, _ROWS = 2048, 256
_FILE = 2**29


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """CPU seconds of some work, the least of some times; once before they count."""
    work()
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def write_checkpoint(folder: Path, kind: str) -> None:
    """A checkpoint of `_WIDE`, random, with a matrix per expert, in BF16 or in float8 blocks of 128 x 128."""
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for part in family(_WIDE, folder.name).parts:
        shape = part.tensor.shape[1:] if part.stacked else part.tensor.shape
        names = [part.each[0].format(e) for e in range(part.tensor.shape[0])] if part.stacked else [part.path]
        for name in names:
            values = torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
            router = name.endswith("mlp.gate.weight")
            if kind == "F8_E4M3" and len(shape) > 1 and ".layers." in name and not router:
                tensors[name] = values.to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = torch.ones([-(-n // 128) for n in shape])
            else:
                tensors[name] = values.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    write_text(folder / "config.json", json.dumps(_WIDE))


def types() -> dict[str, dict[str, float]]:
    """CPU seconds per weight: of a bank's variant (quantized, compared, hashed), and of taking it back."""
    import torch

    rng = np.random.default_rng(0)
    weights = rng.standard_normal((_ROWS, _ROW)).astype(np.float32) / 30
    imatrix = rng.gamma(1, 1, _ROW).astype(np.float32)
    tensor, out = Tensor("t.weight", weights.shape, "t", 0), {}
    room = torch.empty(weights.shape)
    short = [fitting(name, row) for name in LADDER for row in (32, 1)]  # what --types falls back to
    for name in dict.fromkeys([*LADDER, *SHORT_LADDER, *short]):
        ggml.quantize(weights[:1], name, imatrix)  # tables that a process makes once
        with tempfile.TemporaryDirectory() as folder:
            begun = time.process_time()
            VariantBank(Path(folder)).add(tensor, [name], lambda e: weights, imatrix, "")
            made = time.process_time() - begun
        blocks = ggml.quantize(weights, name, imatrix)

        def back(blocks: np.ndarray = blocks, name: str = name) -> None:
            room.copy_(torch.from_numpy(ggml.dequantize(blocks, name)))

        out[name] = {"quantize": made / weights.size, "dequantize": seconds(back) / weights.size}
    return out


def blocks(model: CandidateModel) -> list[list[float]]:
    """[tokens for each expert, FLOP of one CPU second] of a decoder block with routed experts, by length.

    FLOP are two for every weight that a token meets.
    """
    import torch

    inventory = model.inventory
    layer = inventory.moe_layers[0]
    active = sum(
        t.parameters * (inventory.top_k / t.shape[0] if t.per_expert else 1)
        for t in inventory.tensors
        if t.layer == layer
    )
    out = []
    with torch.inference_mode(), model.held(layer):
        for length in _LENGTHS:
            tokens = torch.randint(1, inventory.vocabulary, (8, length))
            states = model.embed(tokens)
            states = states + torch.randn_like(states) * states.std()

            def work(states: torch.Tensor = states) -> None:
                model.run(states, layer, layer + 1)

            taken = seconds(work)
            rows = tokens.numel() * inventory.top_k / inventory.experts
            out.append([rows, 2 * active * tokens.numel() / taken])
    return out


def filling(checkpoint: Checkpoint, model: CandidateModel) -> float:
    """CPU seconds per weight of reading a layer of the checkpoint into the model."""
    layer = checkpoint.inventory.moe_layers[0]
    weights = sum(t.parameters for t in checkpoint.inventory.tensors if t.layer == layer)

    def hold() -> None:
        with model.held(layer):
            pass

    return seconds(hold, 3) / weights


def measuring() -> float:
    """CPU seconds per logit of comparing a candidate with the base model, without the output matrix."""
    import torch

    base, other = torch.randn(4, 64, 32768), torch.randn(4, 64, 32768)
    windows = torch.randint(32768, (4, 64))
    with torch.inference_mode():
        return seconds(lambda: Reference(base, windows).compare(other)) / base.numel()


def products() -> dict[str, float]:
    """FLOP a second of a large float32 product: of one thread's CPU time, and of two threads by the clock."""
    import torch

    x, w = torch.randn(2048, 4096), torch.randn(4096, 2048)
    flop = 2 * x.numel() * w.shape[1]
    one = flop / seconds(lambda: x @ w)
    torch.set_num_threads(2)
    two = 0.0
    for _ in range(5):
        begun = time.perf_counter()
        torch.mm(x, w)
        two = max(two, flop / (time.perf_counter() - begun))
    torch.set_num_threads(1)
    return {"one_thread": one, "two_threads_by_the_clock": two}


def disk(folder: Path) -> dict[str, float]:
    """Bytes a second: a file written to the disk and read from there, by the clock."""
    data = np.random.default_rng(0).bytes(_FILE // 8)
    path = folder / "disk"
    begun = time.perf_counter()
    with path.open("wb") as stream:
        for _ in range(8):
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    written = time.perf_counter() - begun
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        while stream.read(2**24):
            pass
        read = time.perf_counter() - begun
    path.unlink()
    return {"write": _FILE / written, "read": _FILE / read}


def hashing() -> float:
    """Bytes of one CPU second of SHA-256."""
    data = bytes(_FILE // 8)
    return len(data) / seconds(lambda: hashlib.sha256(data).digest(), 3)


def run(folder: Path) -> dict[str, Any]:
    """All of it, but what a trace shows."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {"types": types(), "filling": {}, "blocks": {}}
    for kind in ("BF16", "F8_E4M3"):
        with tempfile.TemporaryDirectory(dir=folder) as where:
            write_checkpoint(Path(where) / "wide", kind)
            checkpoint = open_checkpoint(Path(where) / "wide")
            bank = VariantBank(Path(where) / "bank")
            model = CandidateModel(checkpoint, checkpoint.inventory, bank, stream=True)
            found["filling"][kind] = filling(checkpoint, model)
            if kind == "BF16":
                found["blocks"][str(_matrix(checkpoint))] = blocks(model)
    checkpoint = open_checkpoint(REFERENCE_MODEL)
    model = CandidateModel(checkpoint, checkpoint.inventory, VariantBank(folder / "bank"))
    found["blocks"][str(_matrix(checkpoint))] = blocks(model)
    return found | {"logit": measuring(), "products": products(), "disk": disk(folder), "hash": hashing()}


def _matrix(checkpoint: Checkpoint) -> int:
    """Weights of one expert's matrix."""
    tensor = next(t for t in checkpoint.inventory.tensors if t.per_expert and t.quantizable)
    return tensor.parameters // tensor.shape[0]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--json", type=Path, required=True, help="file for all figures; kept where it is there"
    )
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--rates", type=Path, help="file for what estimates use: search/scale/rates.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.json.exists():
        found = json.loads(args.json.read_text("utf-8"))
    else:
        about = {"cpu": cpu(), "date": datetime.now(UTC).date().isoformat(), "commit": commit()}
        found = about | _rounded(run(args.folder))
        write_text(args.json, json.dumps(found, indent=1) + "\n")
    if args.trace:
        found |= _rounded(of_trace(json.loads(args.trace.read_text("utf-8"))))
    for file in filter(None, (args.json, args.rates)):
        write_text(file, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
