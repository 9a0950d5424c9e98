"""The child process of `evaluators.llama_cpp`: `python -m evaluators.llama_child FOLDER/request.json`.

It writes FOLDER/result.json with either `values` or `error`, and for the job
`logits` reads FOLDER/windows.npy and writes FOLDER/logits.npy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from compression.llama_symbols import LlamaError
from evaluators.llama_cpp import EXPORT_AGAIN
from evaluators.llama_runtime import LlamaModel


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


def _child(file: Path) -> None:
    """Answers the request in `file`; errors that Python sees are part of the answer."""
    request = json.loads(file.read_text("utf-8"))
    result: dict[str, Any]
    try:
        result = {"values": {"logits": _logits, "probe": _probe}[request["job"]](file.parent, request)}
    except LlamaError as error:
        result = {"error": f"llama.cpp refuses it: {error}; {EXPORT_AGAIN}"}
    except (OSError, MemoryError) as error:
        result = {"error": f"{error!r}; free memory or disk space, or ask for fewer tokens"}
    except (ValueError, RuntimeError) as error:
        result = {"error": str(error)}
    (file.parent / "result.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
