"""Memory and speed of a model that is streamed: `python -m experiments.streaming.measure DIR OUT`.

Calibration, quantization to two types and export of a pruned candidate, one process each, with the
largest resident size of each process and the MB of checkpoint it went through per second. OUT keeps
the bank; a second call goes on where the first ended.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from compression.checkpoint import load_tokenizer, open_checkpoint
from compression.files import write_text
from evaluators.texts import WINDOW, make_windows, read_documents
from search.cache_files import bank_index, save_bank_index, save_text
from search.commands import run_command
from search.machine_memory import peak_resident
from search.options import SHIPPED_TEXTS, Parser, at_least, weight_types
from search.worker import Setup, Worker
from spaces.budget import format_size
from spaces.candidate import Candidate, MoeLayer
from spaces.space import Space, pick


def _calibrate(setup: Setup) -> int:
    Worker(setup).calibrate()
    return peak_resident()


def _quantize(setup: Setup, tensors: list[str]) -> tuple[list[tuple[str, str, str, float]], int]:
    worker = Worker(setup)
    return [row for name in tensors for row in worker.quantize(name, setup.types)], peak_resident()


def _export(setup: Setup, path: str) -> tuple[int, int, int]:
    """(bytes written, bytes predicted, peak) of a candidate with three quarters of the experts."""
    worker = Worker(setup)
    inventory = worker.inventory
    worker.register([(n, t, key) for (n, t), (key, _) in bank_index(worker.cache).items()])
    space: Space = worker.space
    kept = space.kept_options[-(len(space.kept_options) // 4) - 1]
    layers = tuple(
        MoeLayer(i, pick(space.rankings["reap"][i], kept, inventory.groups), inventory.top_k)
        for i in inventory.moe_layers
    )
    # Both types in every layer, so that export gathers from all over the bank.
    types = tuple(
        (t.name, space.ladder(t)[i % len(space.ladder(t))]) for i, t in enumerate(inventory.quantizable)
    )
    candidate = Candidate(layers, types)
    candidate.validate(inventory)
    from compression.gguf_export import export_gguf
    from compression.stored_model import StoredModel

    size = export_gguf(StoredModel(worker.checkpoint, inventory, worker.bank), candidate, Path(path))
    return size, inventory.file_bytes(candidate.plan), peak_resident()


def _apart(job: Callable[..., Any], *args: Any) -> Any:
    """Runs a job in a process of its own, so that its peak is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *args).result()


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--types", default="Q3_K,Q6_K")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that quantize")
    args = parser.parse_args()
    at_least("--tokens", args.tokens, WINDOW)
    at_least("--workers", args.workers, 1)
    types = weight_types(args.types)
    checkpoint = open_checkpoint(args.model)
    inventory = checkpoint.inventory
    args.out.mkdir(parents=True, exist_ok=True)
    setup = Setup(
        str(checkpoint.path), inventory.name, str(args.out), stream=True, types=types,
        threads=args.workers,
    )  # fmt: skip
    whole = 2 * inventory.parameters()
    layer = 2 * max(
        sum(t.parameters for t in inventory.tensors if t.layer == i) for i in inventory.moe_layers
    )
    result: dict[str, Any] = {
        "checkpoint_bytes": whole, "layers": inventory.layers, "layer_bytes": layer, "stages": {},
    }  # fmt: skip
    file = args.out / "measure.json"
    if file.exists():
        result = json.loads(file.read_text("utf-8"))

    def stage(name: str, work: Callable[[], dict[str, Any]]) -> None:
        if name in result["stages"]:
            return
        started = time.monotonic()
        row = work()
        seconds = time.monotonic() - started
        row |= {"seconds": round(seconds, 1), "checkpoint_mb_per_second": round(whole / 1e6 / seconds, 1)}
        result["stages"][name] = row
        write_text(file, json.dumps(result, indent=1) + "\n")
        peak = row["peak_bytes"]
        print(
            f"{name:<14} {seconds:7.0f} s  peak {format_size(peak)} = {peak / layer:.2f} layers  {row}",
            flush=True,
        )

    def calibrate() -> dict[str, Any]:
        documents = read_documents(SHIPPED_TEXTS / "calibration.jsonl", "text")
        text = make_windows("calibration", documents, load_tokenizer(checkpoint.path), args.tokens)
        save_text(text, args.out)
        return {"peak_bytes": _apart(_calibrate, setup), "tokens": int(text.windows.size)}

    def quantize() -> dict[str, Any]:
        index = bank_index(args.out)
        tensors = [
            t.name for t in sorted(inventory.quantizable, key=lambda t: -t.parameters)
            if (t.name, setup.types[0]) not in index
        ]  # fmt: skip
        peak, batches = 0, [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        single = Setup(**{**vars(setup), "threads": 1})
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            for rows, used in pool.map(_quantize, [single] * len(batches), batches):
                index |= {(tensor, t): (key, error) for tensor, t, key, error in rows}
                save_bank_index(args.out, index)
                peak = max(peak, used)
        size = sum(p.stat().st_size for p in (args.out / "bank").rglob("*.q"))
        return {"peak_bytes": peak, "workers": args.workers, "types": list(setup.types), "bank_bytes": size}

    def export() -> dict[str, Any]:
        size, predicted, peak = _apart(_export, setup, str(args.out / "model.gguf"))
        return {"peak_bytes": peak, "bytes": size, "bytes_off": size - predicted}

    stage("calibration", calibrate)
    stage("quantization", quantize)
    stage("export", export)


if __name__ == "__main__":
    run_command(main)
