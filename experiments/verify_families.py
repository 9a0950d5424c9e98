"""Proof for every model family: `python -m experiments.verify_families [--markdown FILE]`.

A tiny random model of each family is saved by transformers, once under the publisher's names (mostly a
matrix per expert) and once under its own (stacked experts) where they differ, and goes the whole way:
calibrate, prune unevenly, set top-k, quantize, export, load, generate. Columns:

* float: max |logit difference| of the F32 GGUF in llama.cpp against transformers (F32 KV cache)
* pruned: the same of the pruned F32 GGUF against the candidate in memory
* KL, ppl: of the quantized GGUF in llama.cpp against the evaluator's candidate (llama.cpp rounds
  activations inside its products, so this is not zero), nats and relative difference
* ragged: max |logit difference| of `compression.load` of a ragged checkpoint against the candidate
* GGUF in: the same of the F32 GGUF read as a model against the checkpoint (not 0 where GGUF holds a
  function of a parameter, as qwen3_next's -exp(A_log))
* bytes off: written sizes against predicted ones, all files together
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compression import load
from compression.calibrate import calibrate
from compression.calibration import Calibration
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from compression.checkpoint_export import export_checkpoint
from compression.files import write_text
from compression.gguf_export import export_gguf, with_tokenizer
from compression.guards import check_file
from compression.safetensors_file import read_header
from compression.variant_bank import VariantBank
from evaluators.llama_cpp import file_logits, probe_file
from evaluators.texts import make_windows, read_documents
from experiments import zoo
from search.commands import run_command
from search.options import SHIPPED_TEXTS, Parser
from spaces.candidate import Candidate, MoeLayer
from spaces.errors import unknown
from spaces.inventory import Inventory

_LENGTH = 64
_LAYOUTS: dict[str, dict[str, Any]] = {"published": {}, "stacked": {"save_original_format": False}}
_TYPES = ("Q4_K", "IQ3_S", "Q6_K", "IQ2_XS", "Q8_0", "IQ4_XS", "Q5_K", "Q3_K")
LIMITS = {
    "float": 1e-3,
    "pruned": 1e-3,
    "kl": 5e-3,
    "perplexity": 5e-3,
    "ragged": 0.0,
    "gguf_in": 1e-4,
    "bytes_off": 0,
}
"""What each figure may be at most."""


def _candidate(inventory: Inventory, types: Mapping[str, str], ragged: bool) -> Candidate:
    """Other experts in every layer; a ragged one keeps other numbers of them and other top-k too."""
    layers, groups = [], inventory.groups
    size = inventory.experts // groups
    for n, layer in enumerate(inventory.moe_layers):
        each = size - 1 - (n % 2 if ragged and size > 3 else 0)
        rng = np.random.default_rng(layer)
        experts = [g * size + int(e) for g in range(groups) for e in rng.permutation(size)[:each]]
        top_k = max(1, inventory.top_k - (n % 2 if ragged else 1))
        layers.append(MoeLayer(layer, tuple(sorted(experts)), top_k))
    candidate = Candidate(tuple(layers), tuple((t.name, types[t.name]) for t in inventory.quantizable))
    candidate.validate(inventory)
    return candidate


def _mixed(inventory: Inventory) -> dict[str, str]:
    """Neighbouring tensors in different types, as their rows take them."""
    plans = [dict(inventory.uniform_plan(t).types) for t in _TYPES]
    return {t.name: plans[i % len(plans)][t.name] for i, t in enumerate(inventory.quantizable)}


def _apply(model: CandidateModel, candidate: Candidate, calibration: Calibration) -> Candidate:
    """Quantizes what the candidate needs and makes the model it."""
    for name, type_name in candidate.types:
        part = model.family.by_name[name]
        rows = model.bank.add(
            part.tensor, [type_name], lambda e, part=part: model.weights.read(part, e),  # type: ignore[misc]
            calibration.imatrix.get(name), model.checkpoint.fingerprint,
        )  # fmt: skip
        model.bank.register(name, type_name, rows[0][1])
    model.apply(candidate)
    return candidate


def _nll(log_q: np.ndarray, windows: np.ndarray) -> float:
    return float(-np.take_along_axis(log_q[:, :-1], windows[:, 1:, None].astype(np.int64), -1).mean())


def prove(checkpoint: Checkpoint, plain: Any, windows: np.ndarray, folder: Path) -> dict[str, Any]:
    """The figures of one checkpoint.

    Args:
        checkpoint: The model on disk.
        plain: The transformers model that it was saved from.
        windows: (n, length) token ids: half of them to calibrate on, half to compare on.
        folder: Where files go.
    """
    from dataclasses import replace

    checkpoint = replace(checkpoint, inventory=with_tokenizer(checkpoint))
    inventory = checkpoint.inventory
    seen, windows = windows[::2], windows[1::2]
    model = CandidateModel(checkpoint, inventory, VariantBank(folder / "bank"))
    reference = zoo.logits(plain, windows)
    out: dict[str, Any] = {"loader": float(np.abs(zoo.logits(model.model, windows) - reference).max())}
    calibration = calibrate(model, seen, "windows")
    off = 0

    def written(candidate: Candidate, name: str) -> np.ndarray:
        nonlocal off
        path = folder / f"{name}.gguf"
        off += abs(export_gguf(model, candidate, path) - inventory.file_bytes(candidate.plan))
        off += abs(path.stat().st_size - inventory.file_bytes(candidate.plan))
        check_file(path, model, candidate)
        return np.asarray(file_logits(path, windows, folder / f"{name}.npy"))

    whole = _apply(model, Candidate.uniform(inventory, "F32"), calibration)
    out["float"] = float(np.abs(written(whole, "float") - reference).max())
    again = load_model(open_checkpoint(folder / "float.gguf"))
    out["gguf_in"] = float(np.abs(zoo.logits(again, windows) - reference).max())

    pruned = _apply(
        model, _candidate(inventory, dict(inventory.uniform_plan("F32").types), False), calibration
    )
    out["pruned"] = float(np.abs(written(pruned, "pruned") - zoo.logits(model.model, windows)).max())

    quantized = _apply(model, _candidate(inventory, _mixed(inventory), False), calibration)
    own = zoo.log_softmax(zoo.logits(model.model, windows))
    theirs = zoo.log_softmax(written(quantized, "quantized"))
    out["kl"] = float((np.exp(own) * (own - theirs)).sum(-1).mean())
    out["perplexity"] = float(np.exp(_nll(theirs, windows) - _nll(own, windows)) - 1)
    probe = probe_file(folder / "quantized.gguf", windows[0][:16].tolist(), generate=8)
    out["generated"] = len(probe.generated)

    ragged = _apply(model, _candidate(inventory, _mixed(inventory), True), calibration)
    export_checkpoint(model, ragged, checkpoint, folder / "ragged")
    loaded = load(folder / "ragged")
    out["ragged"] = float(np.abs(zoo.logits(loaded, windows) - zoo.logits(model.model, windows)).max())
    import torch

    prompt = torch.from_numpy(windows[:1, :16].astype(np.int64))
    out["ragged_generated"] = int(loaded.generate(prompt, max_new_tokens=8, do_sample=False).shape[1]) - 16
    return out | {"bytes_off": off}


def _verdict(row: Mapping[str, Any]) -> bool:
    fine = all(abs(row[name]) <= limit for name, limit in LIMITS.items())
    return fine and row["loader"] == 0 and row["generated"] == 8 and row["ragged_generated"] > 0


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| family, layout on disk | float | pruned | KL | ppl | ragged | GGUF in | bytes off | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        lines.append(
            f"| {name} | {r['float']:.1e} | {r['pruned']:.1e} | {r['kl']:.1e} | {r['perplexity']:+.2%} | "
            f"{r['ragged']:g} | {r['gguf_in']:g} | {r['bytes_off']} | {'met' if r['met'] else 'MISSED'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", default=",".join(sorted(zoo.FAMILIES)))
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    args = parser.parse_args()
    families = args.families.split(",")
    for name in families:
        if name not in zoo.FAMILIES:
            raise unknown("--families", name, zoo.FAMILIES)
    rows: dict[str, dict[str, Any]] = {}
    for name in families:
        plain, names = zoo.make(name), set()
        for layout, settings in _LAYOUTS.items():
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                zoo.save(plain, folder / "model", **settings)
                found = frozenset(read_header(folder / "model" / "model.safetensors")[1])
                if found in names:
                    continue  # the family has one layout
                names.add(found)
                checkpoint = open_checkpoint(folder / "model")
                documents = read_documents(SHIPPED_TEXTS / "report.jsonl", "text")
                text = make_windows("report", documents, load_tokenizer(folder / "model"), 2048)
                windows = text.windows.reshape(-1, _LENGTH)[:32]
                row = prove(checkpoint, plain, windows, folder)
            row["met"] = _verdict(row)
            rows[f"{name}, {layout}"] = row
            print(f"{name}, {layout}: {json.dumps(row)}", flush=True)
    if args.out:
        write_text(args.out, json.dumps(rows, indent=1) + "\n")
    if args.markdown:
        write_text(args.markdown, table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_command(main)
