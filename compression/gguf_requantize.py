"""GGUF to GGUF: a candidate's experts, top-k and types, from a file of any MoE architecture.

The file's own metadata and names are kept, so no code knows the model. Tensors go through memory
a few rows at a time, as models are larger than it.
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from compression.files import atomic, remove_parts
from compression.ggml import dequantize, quantize
from compression.gguf_candidate import check_candidate
from compression.gguf_file import GgufFile
from compression.gguf_inventory import describe_gguf
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.gguf_layout import ALIGNMENT, header
from spaces.inventory import Tensor

_CHUNK = 2**20
"""Weights that are quantized at once: 4 MiB as float32."""


def requantize(
    source: GgufFile,
    candidate: Candidate,
    out: Path,
    imatrix: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[int], None] = lambda size: None,
    *,
    name: str = "candidate",
    threads: int = 1,
) -> int:
    """Writes `candidate` of `source` to `out`; returns the file's size, which is the predicted one.

    Tensors that have the wanted type already are copied byte for byte.

    Args:
        source: The model, unpruned.
        candidate: Valid for `describe_gguf(source)`.
        out: A .gguf file; written to a temporary name first.
        imatrix: Weight name to (matrices, row) mean squared inputs: one matrix, or one per expert of
            the source.
        progress: Called with the bytes written so far.
        name: What messages call the candidate.
        threads: Threads that quantize; at most so many chunks are in memory, twice over.

    Raises:
        UserError: The candidate is not of this model or no llama.cpp could run it, weights or imatrix
            are not finite, or the disk is too small.
    """
    inventory = describe_gguf(source)
    check_candidate(inventory, candidate, imatrix, name)
    size = inventory.file_bytes(candidate.plan)
    remove_parts(out.parent, out.name)
    _check_place(source, out, size)
    infos = inventory.infos(candidate.plan)
    experts, types = {m.layer: m.experts for m in candidate.layers}, dict(candidate.types)
    with atomic(out) as stream, ThreadPoolExecutor(threads) as pool:
        stream.write(header(inventory.plan_metadata(candidate.plan), infos))
        for info, tensor in zip(infos, inventory.tensors, strict=True):
            started = stream.tell()
            kept = experts.get(-1 if tensor.layer is None else tensor.layer) if tensor.per_expert else None
            wanted = types.get(tensor.name, tensor.fixed_type)
            jobs = _jobs(source, tensor, kept, wanted, imatrix)
            for blocks in _in_order(pool, jobs, threads):
                stream.write(blocks.data)
                progress(stream.tell())
            if stream.tell() - started != info.size:
                raise RuntimeError(f"{info.name}: {stream.tell() - started} bytes where {info.size} are said")
            stream.write(b"\0" * (-info.size % ALIGNMENT))
        if stream.tell() != size:
            raise RuntimeError(f"{out}: {stream.tell()} bytes where {size} were predicted")
        progress(size)
    return size


def _check_place(source: GgufFile, out: Path, size: int) -> None:
    """Refuses to replace the source, and to start what would fill the disk hours later."""
    if any(out.exists() and out.samefile(file) for file in source.files):
        raise UserError(f"{out}: is the model itself; write to another file")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; give the name of a .gguf file")
    folder = next(p for p in (*out.absolute().parents, Path("/")) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{out}: needs {size:,} bytes, but {folder} has {free:,} free; choose another disk")


def _in_order(
    pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], np.ndarray]], threads: int
) -> Iterator[np.ndarray]:
    """The jobs' results in their order, never more of them waiting than the threads need."""
    waiting: deque[Future[np.ndarray]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) >= 2 * threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _jobs(
    source: GgufFile,
    tensor: Tensor,
    kept: Sequence[int] | None,
    wanted: str,
    imatrix: Mapping[str, np.ndarray] | None,
) -> Iterator[Callable[[], np.ndarray]]:
    """What makes a tensor's blocks, some rows of one matrix at a time."""
    squares = None
    if wanted != tensor.fixed_type and imatrix is not None and tensor.name in imatrix:
        squares = imatrix[tensor.name].reshape(-1, tensor.row)
    stacked = tensor.per_expert or len(tensor.shape) == 3
    rows = math.prod(tensor.shape[1:-1]) if stacked else math.prod(tensor.shape[:-1])
    step = max(1, _CHUNK // tensor.row)
    for index in (range(tensor.shape[0]) if kept is None else kept) if stacked else (None,):
        weight = None if squares is None else squares[index if index is not None and len(squares) > 1 else 0]
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield partial(_blocks, source, tensor, index, part, wanted, weight)


def _blocks(
    source: GgufFile, tensor: Tensor, index: int | None, part: slice, wanted: str, squares: np.ndarray | None
) -> np.ndarray:
    """Some rows of a tensor, or of one of its slices on the first axis, in type `wanted`."""
    stored = source.tensors[tensor.name]
    size = stored.size if index is None else stored.size // tensor.shape[0]
    width = min(size, stored.row_bytes)  # of one axis, an expert is part of a row
    begin = (index or 0) * size + part.start * width
    rows = source.part(tensor.name, begin, (part.stop - part.start) * width).reshape(-1, width)
    if wanted == tensor.fixed_type:
        return rows
    try:
        return quantize(dequantize(rows, tensor.fixed_type), wanted, squares)
    except ValueError as error:
        where = tensor.name if index is None else f"{tensor.name}, slice {index}"
        raise UserError(f"{source.path}: {where}: {error}; choose {tensor.fixed_type} to copy it") from error
