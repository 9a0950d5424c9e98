"""What the reference model's weights hold: `python -m experiments.reference_model.measure`.

Held-out perplexity, how the experts share each source's tokens, and the damage
of the two crudest compressions. Writes `measure.json` beside the checkpoint's
folder; the model card's figures are these.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from compression.calibrate import calibrate
from compression.candidate_model import CandidateModel
from compression.checkpoint import load_tokenizer, open_checkpoint
from compression.expert_pruning import CRITERIA, rankings
from compression.families.parts import Part
from compression.variant_bank import VariantBank
from evaluators.divergence import base_states, measure
from evaluators.texts import TextSet, make_windows, read_documents

HERE = Path(__file__).resolve().parent
_TOKENS = 24576


def routed_mass(model: CandidateModel, text: TextSet) -> dict[str, list[float]]:
    """Source to the share of routed tokens that the busiest quarter of each layer's experts takes."""
    import torch

    layers = model.inventory.moe_layers
    counts: dict[int, np.ndarray] = {}
    handles = []
    for layer in layers:

        def count(m: Any, args: Any, out: Any, layer: int = layer) -> None:
            found = np.bincount(out[2].flatten().numpy(), minlength=model.inventory.experts)
            counts[layer] = counts.get(layer, 0) + found

        handles.append(model.shell.router(layer).module.register_forward_hook(count))
    shares: dict[str, list[float]] = {}
    for source in sorted(set(text.sources)):
        counts.clear()
        rows = text.windows[np.array([s == source for s in text.sources])]
        with torch.inference_mode():
            model.hidden(torch.from_numpy(rows.astype(np.int64)))
        shares[source] = []
        for layer in layers:
            ordered = np.sort(counts[layer])[::-1]
            shares[source].append(float(ordered[: len(ordered) // 4].sum() / ordered.sum()))
    for handle in handles:
        handle.remove()
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--out", type=Path, default=HERE / "measure.json")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.checkpoint)
    inventory, tokenizer = checkpoint.inventory, load_tokenizer(checkpoint.path)

    def text(name: str) -> TextSet:
        documents = read_documents(HERE / "texts" / f"{name}.jsonl", "text")
        return make_windows(name, documents, tokenizer, _TOKENS)

    report, calibration_text = text("report"), text("calibration")
    with tempfile.TemporaryDirectory() as folder:
        candidate = CandidateModel(checkpoint, inventory, VariantBank(Path(folder)))
        shares = routed_mass(candidate, report)
        calibration = calibrate(candidate, calibration_text.windows, calibration_text.digest)
        base_states(candidate, report, Path(folder) / "base.npy")
        states = np.load(Path(folder) / "base.npy")
        base = measure(candidate, report, states)
        damage: dict[str, float] = {}
        for tensor in (t for t in inventory.quantizable if t.per_expert):
            part, imatrix = checkpoint.family.by_name[tensor.name], calibration.imatrix[tensor.name]

            def read(expert: int | None, part: Part = part) -> np.ndarray:
                return checkpoint.weights.read(part, expert)

            ((_, key, _),) = candidate.bank.add(tensor, ["IQ1_S"], read, imatrix, checkpoint.fingerprint)
            candidate.bank.register(tensor.name, "IQ1_S", key)
            candidate.set_type(tensor.name, "IQ1_S")
        damage["experts at IQ1_S"] = measure(candidate, report, states).mean_kl
        candidate.reset()
        orders = rankings(calibration, inventory.moe_layers)
        for criterion in CRITERIA:
            for layer in inventory.moe_layers:
                kept = orders[criterion][layer][: inventory.experts // 2]
                candidate.restrict(layer, tuple(sorted(kept)))
            damage[f"half the experts by {criterion}"] = measure(candidate, report, states).mean_kl
        candidate.reset()
    result = {
        "report_perplexity": base.perplexity,
        "report_bits_per_byte": float(base.nll.mean()) / math.log(2) / report.bytes_per_token,
        "report_tokens": int(report.windows.size),
        "kl_nats": damage,
        "top_quarter_share_by_source_and_layer": shares,
        "unseen_experts": calibration.unseen(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
