"""Trains the reference model: `python -m experiments.reference_model.train DATA CHECKPOINT`.

Resumes from `DATA/state.pt`, or without it from the checkpoint's weights with a
new optimizer. The learning rate is constant, then falls linearly to zero over
the last `--decay-tokens` of `--tokens`: stop a run, raise `--tokens`, and it
goes on. Uses a GPU if there is one.

Balancing is only as strong as stability needs: an expert's selection bias moves
(by `--bias-rate`, as in DeepSeek-V3) only while its load is outside
[1/4, 5/2] of the fair share, so experts may specialise by source.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from experiments.reference_model.network import Moe, Network, Shape, parameter_count
from experiments.reference_model.optimizer import Optimizer


class Batches:
    """Windows of the token stream in a new random order every epoch, a function of `index` alone."""

    def __init__(self, stream: np.ndarray, length: int, seed: int = 0) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.windows = (len(stream) - 1) // length - 1
        self._epoch, self._order, self._shift = -1, np.empty(0, np.int64), 0

    def __call__(self, index: int, count: int) -> torch.Tensor:
        """Token ids (count, length + 1) of windows `index` to `index + count`."""
        rows = []
        for i in range(index, index + count):
            epoch, position = divmod(i, self.windows)
            if epoch != self._epoch:
                rng = np.random.default_rng((self.seed, epoch))
                self._epoch, self._order = epoch, rng.permutation(self.windows)
                self._shift = int(rng.integers(self.length))
            start = int(self._order[position]) * self.length + self._shift
            rows.append(self.stream[start : start + self.length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def rebalance(network: Network, rate: float, ranks: int = 1) -> None:
    """Moves the selection bias of experts whose load left [1/4, 5/2] of the fair share."""
    for moe in (m for m in network.modules() if isinstance(m, Moe)):
        if ranks > 1:
            dist.all_reduce(moe.load)
        share = moe.load / moe.load.mean()
        moe.bias += rate * ((share < 0.25).float() - (share > 2.5).float())
        moe.load.zero_()


def write_checkpoint(network: Network, folder: Path) -> None:
    """bf16 safetensors and config.json; the selection bias stays float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.cpu() if name.endswith("correction_bias") else tensor.bfloat16().cpu()
        for name, tensor in network.to_checkpoint().items()
    }
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(network.shape.config(), indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.npy")
    parser.add_argument("checkpoint", type=Path, help="folder for config.json and model.safetensors")
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--decay-tokens", type=float, default=6e6)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--bias-rate", type=float, default=2e-3)
    parser.add_argument("--ranks", type=int, default=1 if torch.cuda.is_available() else os.cpu_count())
    parser.add_argument("--save-tokens", type=int, default=1_000_000)
    return parser.parse_args()


def build(args: argparse.Namespace, rank: int, device: torch.device) -> tuple[Network, Optimizer]:
    """The network with bf16 weights, and the optimizer with masters taken before rounding."""
    network = Network(Shape())
    weights = args.checkpoint / "model.safetensors"
    if weights.exists():
        network.from_checkpoint(load_file(weights))
    network.to(device)
    optimizer = Optimizer(
        network,
        muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
        decay=args.weight_decay,
        rank=rank,
        ranks=args.ranks,
    )
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    return network, optimizer


def run(rank: int, args: argparse.Namespace) -> None:
    """Trains on `args.ranks` processes of one thread each: faster than threads on a CPU."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.ranks > 1:
        dist.init_process_group("gloo", init_method=args.rendezvous, rank=rank, world_size=args.ranks)
    network, optimizer = build(args, rank, device)
    state_path, seen = args.data / "state.pt", 0
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        network.load_state_dict(state["biases"], strict=False)
        seen = state["seen"]
    batches = Batches(np.load(args.data / "train.npy", mmap_mode="r"), args.length)
    if rank == 0:
        print(f"{parameter_count(network.shape):,} parameters, {seen:,} tokens seen,", end=" ")
        print(f"{batches.windows * args.length:,} tokens an epoch", flush=True)

    def save() -> None:
        state = {"optimizer": optimizer.state_dict(), "seen": seen}
        if rank == 0:
            state["biases"] = {k: v for k, v in network.state_dict().items() if k.endswith(".bias")}
            torch.save(state, state_path.with_suffix(".part"))
            os.replace(state_path.with_suffix(".part"), state_path)
            write_checkpoint(network, args.checkpoint)

    started = time.time()
    begun, recent, saves = seen, 0.0, seen // args.save_tokens
    parts, rows = args.batch_tokens // args.micro_tokens // args.ranks, args.micro_tokens // args.length
    while seen < args.tokens:
        scale = min(1.0, (seen + args.batch_tokens) / 1e6, (args.tokens - seen) / args.decay_tokens)
        step_loss = torch.zeros((), device=device)
        for part in range(parts):
            index = seen // args.length + (part * args.ranks + rank) * rows
            loss = network.loss(batches(index, rows).to(device)) / parts
            loss.backward()
            step_loss += loss.detach()
        optimizer.step(scale)
        rebalance(network, args.bias_rate, args.ranks)
        seen += args.batch_tokens
        recent = step_loss.item() if not recent else 0.95 * recent + 0.05 * step_loss.item()
        if rank == 0 and optimizer.steps % 20 == 0:
            rate = (seen - begun) / (time.time() - started)
            print(f"{seen / 1e6:8.2f}M tokens  loss {recent:.3f}  {rate:,.0f} tokens/s", flush=True)
        # Counted in tokens, not on a clock, so that all ranks save at the same step.
        if seen // args.save_tokens > saves:
            saves = seen // args.save_tokens
            save()
    save()


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as meeting:
        args.rendezvous = f"file://{meeting}/rendezvous"
        if args.ranks == 1:
            run(0, args)
        else:
            torch.multiprocessing.spawn(run, (args,), args.ranks)


if __name__ == "__main__":
    main()
