"""GGUF files run by llama.cpp in a child process, because ggml aborts the process on bad ones.

The child is `evaluators.llama_child`. Nothing of llama.cpp is loaded here.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compression.child import run_module
from compression.files import locked_folder, naming
from evaluators.generations import Sampling
from evaluators.shared_prefix import Item
from spaces.errors import UserError

_PART = 2**28  # bytes of logits in one file
_FULL = f"[Errno {errno.ENOSPC}]"
_SLOWEST = 10e6  # bytes a disk reads in a second, at least
EXPORT_AGAIN = "export it again; if it is whole, this llama.cpp does not take its architecture or metadata"


@dataclass(frozen=True)
class FileProbe:
    """What a file that loads and generates was seen to do.

    Attributes:
        generated: Greedy continuation of the prompt, with an F32 KV cache.
        model_bytes: Size of the tensors, without metadata and padding.
        vocabulary: Token ids.
        prompt_tokens_per_second: With llama.cpp's default settings; None where not measured.
        generated_tokens_per_second: Likewise, one token at a time.
    """

    generated: tuple[int, ...]
    model_bytes: int
    vocabulary: int
    prompt_tokens_per_second: float | None
    generated_tokens_per_second: float | None


def file_logits(
    path: Path, windows: np.ndarray, out: Path, *, threads: int = 1, timeout: float = 600
) -> np.memmap:
    """Logits of a GGUF file, each window from an empty F32 KV cache, without weight repacking.

    Args:
        path: GGUF file.
        windows: (n, length) token ids.
        out: Where the (n, length, vocabulary) float32 logits go (.npy), whole or not at all.
        threads: CPU threads.
        timeout: Seconds the child may take.

    Returns:
        `out`, mapped read-only.

    Raises:
        UserError: The file or the windows are bad, or the child fails or takes too long.
    """
    if windows.ndim != 2 or not windows.size or not np.issubdtype(windows.dtype, np.integer):
        raise UserError(f"{path}: windows must be (n, length) token ids, got {windows.dtype} {windows.shape}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that the finished file only needs to be renamed.
    with naming(out), locked_folder(out) as folder:
        np.save(folder / "windows.npy", windows)
        _run_child(folder, path, {"job": "logits", "threads": threads}, timeout)
        os.replace(folder / "logits.npy", out)
    logits: np.memmap = np.load(out, mmap_mode="r")
    return logits


def logits_in_parts(
    path: Path, windows: np.ndarray, scratch: Path, *, threads: int = 1, timeout: float = 600
) -> Iterator[tuple[slice, np.ndarray]]:
    """As `file_logits`, some windows at a time, so that no file holds more than 256 MiB or one window.

    Args:
        path: GGUF file.
        windows: (n, length) token ids.
        scratch: Folder for the file, which is gone afterwards.
        threads: CPU threads.
        timeout: Seconds the child may take for each part.

    Yields:
        (which windows, their logits), the latter valid until the next part.
    """
    probe = probe_file(path, windows[0, :1].tolist(), generate=1, threads=threads, timeout=timeout)
    step = max(1, _PART // (4 * windows.shape[1] * probe.vocabulary))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for start in range(0, len(windows), step):
            part = slice(start, min(start + step, len(windows)))
            out = Path(folder) / "logits.npy"
            yield part, file_logits(path, windows[part], out, threads=threads, timeout=timeout)


def file_generations(
    path: Path,
    prompts: np.ndarray,
    count: int,
    *,
    sampling: Sampling | None = None,
    end: int | None = None,
    threads: int = 1,
    timeout: float = 600,
) -> np.ndarray:
    """Long texts that a GGUF file writes, each from an empty F32 KV cache.

    Args:
        path: GGUF file.
        prompts: (n, prompt) token ids to continue.
        count: Tokens to generate, at most.
        sampling: How tokens are drawn, with a seed for each prompt; None takes the most likely one.
        end: Token that ends a text; None: nothing does.
        threads: CPU threads.
        timeout: Seconds the child may take.

    Returns:
        (n, count) int32 token ids, -1 from the end token on.

    Raises:
        UserError: The file or the prompts are bad, or the child fails or takes too long.
    """
    if prompts.ndim != 2 or not prompts.size or not np.issubdtype(prompts.dtype, np.integer):
        raise UserError(f"{path}: prompts must be (n, length) token ids, got {prompts.dtype} {prompts.shape}")
    if sampling is not None and len(sampling.seeds) != len(prompts):
        raise UserError(f"{path}: {len(prompts)} prompts need as many seeds, got {len(sampling.seeds)}")
    how = None if sampling is None else asdict(sampling)
    request = {"job": "generations", "count": count, "sampling": how, "end": end, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "prompts.npy", prompts)
        _run_child(Path(folder), path, request, timeout)
        generated: np.ndarray = np.load(Path(folder) / "generated.npy")
    return generated


def file_loglikelihoods(
    path: Path, items: Sequence[Item], *, threads: int = 1, timeout: float = 600
) -> list[list[tuple[float, bool]]]:
    """What a GGUF file makes of continuations, each context computed once, with an F32 KV cache.

    Args:
        path: GGUF file.
        items: Contexts with continuations, of any length.
        threads: CPU threads.
        timeout: Seconds the child may take.

    Returns:
        Per item and continuation: its log-likelihood (nats), and whether it is what the file would write.

    Raises:
        UserError: The file or the tokens are bad, or the child fails or takes too long.
    """
    if not items:
        return []
    plain = [[item.context, item.continuations] for item in items]
    request = {"job": "loglikelihoods", "items": plain, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        values = _run_child(Path(folder), path, request, timeout)
    return [[(float(score), bool(likeliest)) for score, likeliest in row] for row in values["scores"]]


def file_answers(
    path: Path,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    end: int | None = None,
    threads: int = 1,
    timeout: float = 600,
) -> list[list[int]]:
    """The most likely continuations of prompts of any length, up to `count` tokens or before `end`.

    Raises what `file_generations` does.
    """
    if not prompts:
        return []
    request = {"job": "answers", "prompts": [list(p) for p in prompts], "count": count, "end": end}
    with tempfile.TemporaryDirectory() as folder:
        values = _run_child(Path(folder), path, {**request, "threads": threads}, timeout)
    return list(values["answers"])


def probe_file(
    path: Path,
    prompt: Sequence[int],
    *,
    generate: int = 32,
    speed: tuple[int, int] | None = None,
    threads: int = 1,
    timeout: float = 600,
) -> FileProbe:
    """Proves that a GGUF file loads and generates.

    Args:
        path: GGUF file.
        prompt: Token ids to continue.
        generate: Tokens to generate.
        speed: (prompt, generated) token counts to measure the speed on.
        threads: CPU threads.
        timeout: Seconds the child may take.

    Raises:
        UserError: The file or the prompt is bad, or the child fails or takes too long.
    """
    request = {"job": "probe", "prompt": [int(t) for t in prompt], "generate": generate, "speed": speed}
    with tempfile.TemporaryDirectory() as folder:
        values = _run_child(Path(folder), path, {**request, "threads": threads}, timeout)
    return FileProbe(**{**values, "generated": tuple(values["generated"])})


def _run_child(folder: Path, path: Path, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """What the child answers to a request written into `folder`; its failures become UserErrors."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path, or export the file first")
    file = folder.resolve() / "request.json"
    file.write_text(json.dumps({**request, "path": str(path.resolve())}), "utf-8")
    try:
        # A slow disk is no reason to give up: reading the file is not what the caller gave time for.
        timeout += path.stat().st_size / _SLOWEST
        code, stderr = run_module("evaluators.llama_child", str(file), timeout)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{path}: llama.cpp was not done after {timeout:g} s; allow more time or ask for fewer tokens"
        ) from error
    if code and _FULL in stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if code:
        raise UserError(f"{path}: {_death(code, stderr)}")
    result = json.loads((folder / "result.json").read_text("utf-8"))
    if "error" in result:
        raise UserError(f"{path}: {result['error']}")
    values: dict[str, Any] = result["values"]
    return values


def _death(code: int, stderr: str) -> str:
    """Why a child ended without a result, and what to do about it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = f" ({lines[-1]})" if lines else ""
    if code > 0:
        return f"the llama.cpp process failed{last}; check that moefit's dependencies are installed"
    name = signal.Signals(-code).name
    if -code == getattr(signal, "SIGKILL", None):
        return (
            f"llama.cpp was killed ({name}), as is usual when memory runs out; use a smaller file or window"
        )
    return f"llama.cpp died of {name}{last}; {EXPORT_AGAIN}"
