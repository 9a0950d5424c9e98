"""The child process of `evaluators.llama_cpp`: `python -m evaluators.llama_child FOLDER/request.json`.

It writes FOLDER/result.json with either `values` or `error`, and for the job
`logits` reads FOLDER/windows.npy and writes FOLDER/logits.npy, for the job
`generations` reads FOLDER/prompts.npy and writes FOLDER/generated.npy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from compression.gguf_file import GgufFile
from compression.llama_symbols import LlamaError
from evaluators.generations import drawer
from evaluators.llama_cpp import EXPORT_AGAIN
from evaluators.llama_runtime import LlamaModel, most_likely
from evaluators.shared_prefix import Item, Pack, pack, unique_rows
from spaces.errors import UserError


def _logits(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    windows = np.load(folder / "windows.npy")
    count, length = windows.shape
    # Written in order instead of through a map: a full disk is then an error, not a signal.
    with (
        LlamaModel(Path(request["path"]), context=length, threads=request["threads"]) as model,
        (folder / "logits.npy").open("wb") as stream,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, length, model.vocabulary)}
        np.lib.format.write_array_header_1_0(stream, header)
        for window in windows:
            stream.write(model.logits(window).data)
    return {}


def _probe(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    path, threads, speed = Path(request["path"]), request["threads"], request["speed"]
    context = len(request["prompt"]) + request["generate"]
    with LlamaModel(path, context=max(context, 1), threads=threads) as model:
        generated = model.generate(request["prompt"], request["generate"])
        values = {"generated": generated, "model_bytes": model.bytes, "vocabulary": model.vocabulary}
    rates: tuple[float | None, float | None] = (None, None)
    if speed:
        with LlamaModel(path, context=max(sum(speed), 1), threads=threads, exact=False) as model:
            rates = model.speed(*speed)
    return {**values, "prompt_tokens_per_second": rates[0], "generated_tokens_per_second": rates[1]}


def _generations(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    prompts, count, sampling = np.load(folder / "prompts.npy"), request["count"], request["sampling"]
    generated = np.full((len(prompts), count), -1, np.int32)
    context = prompts.shape[1] + count
    with LlamaModel(Path(request["path"]), context=context, threads=request["threads"]) as model:
        for i, prompt in enumerate(prompts):
            choose: Callable[[np.ndarray], int] = most_likely
            if sampling is not None:
                choose = drawer(sampling["seeds"][i], sampling["temperature"], sampling["top_p"])
            tokens = model.generate(prompt, count, choose, request["end"])
            generated[i, : len(tokens)] = tokens
    np.save(folder / "generated.npy", generated)
    return {}


def _loglikelihoods(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    items = [Item(tuple(context), tuple(map(tuple, after))) for context, after in request["items"]]
    packs = pack(items)
    length, branches = max(len(p.tokens) for p in packs), max(len(p.scores) for p in packs)
    found: dict[tuple[int, int], tuple[float, bool]] = {}
    with LlamaModel(
        Path(request["path"]), context=length, threads=request["threads"], sequences=branches
    ) as model:
        for p in packs:
            found |= p.sums(*_log_probs(model, p))
    return {"scores": [[found[i, b] for b in range(len(t.continuations))] for i, t in enumerate(items)]}


def _log_probs(model: LlamaModel, p: Pack) -> tuple[np.ndarray, np.ndarray]:
    """(m,) log-probability of everything a pack scores, and whether it is the most likely token."""
    names: dict[int, list[int]] = {}
    for sequence, (item, _) in enumerate(p.scores):
        names.setdefault(item, []).append(sequence)
    own = list(names.values())
    sequences = [own[i] if b < 0 else [own[i][b]] for i, b in zip(p.items, p.branches, strict=True)]
    rows, index, targets = unique_rows([p], len(p.tokens))
    if targets.max() >= model.vocabulary:
        raise ValueError(f"token id {targets.max()} is not in 0..{model.vocabulary - 1}")
    logits = model.packed_logits(p.tokens, p.positions, sequences, rows)
    largest = logits.max(-1)
    log_z = largest + np.log(np.exp(logits - largest[:, None]).sum(-1, dtype=np.float64))
    return logits[index, targets] - log_z[index], logits.argmax(-1)[index] == targets


def _answers(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    prompts, count = request["prompts"], request["count"]
    context = max(map(len, prompts)) + count
    with LlamaModel(Path(request["path"]), context=context, threads=request["threads"]) as model:
        return {"answers": [model.generate(p, count, end=request["end"]) for p in prompts]}


_JOBS = {
    "logits": _logits, "probe": _probe, "generations": _generations, "loglikelihoods": _loglikelihoods,
    "answers": _answers,
}  # fmt: skip


def _child(file: Path) -> None:
    """Answers the request in `file`; errors that Python sees are part of the answer."""
    request = json.loads(file.read_text("utf-8"))
    result: dict[str, Any]
    path = Path(request["path"])
    try:
        GgufFile.open(path)  # llama.cpp ends the process on some headers and believes others
        result = {"values": _JOBS[request["job"]](file.parent, request)}
    except UserError as error:
        result = {"error": str(error).removeprefix(f"{path}: ")}
    except LlamaError as error:
        result = {"error": f"llama.cpp refuses it: {error}; {EXPORT_AGAIN}"}
    except (OSError, MemoryError) as error:
        result = {"error": f"{error!r}; free memory or disk space, or ask for fewer tokens"}
    except (ValueError, RuntimeError) as error:
        result = {"error": str(error)}
    (file.parent / "result.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
