"""Every tensor in every GGUF type, quantized once.

A variant is a file `<key>.q`: a header with the SHA-256 of the blocks and a
checksum of its own, then the blocks. The key is a hash of all that decides them
(checkpoint, tensor, type, imatrix, quantizer version, error feedback), so a
variant is never stale, and a search that was killed finds what it had finished.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from compression import ggml
from compression.error_feedback import damage, quantize_with_feedback
from compression.files import atomic, naming
from spaces.errors import UserError
from spaces.inventory import Tensor
from spaces.quant_types import IGNORES_IMATRIX, quant_type

_MAGIC = b"MFBANK2\0"
_HEADER = struct.Struct("<8s32sQd8s")  # magic, SHA-256 of the blocks, their bytes, relative error, checksum
HEADER_BYTES = _HEADER.size
"""Of a variant's file, before its blocks."""

_CHECK = 8  # bytes of the checksum
_FEEDBACK = " feedback 1"  # another number for another way of doing it
_ROWS = 2**22  # weights quantized at once: bounds memory, and lets errors be summed on the way

Read = Callable[[int | None], np.ndarray]
"""Float32 weights of a tensor: of one expert for a number, of the whole for None."""


@dataclass
class _Variant:
    """A variant that is being written."""

    type_name: str
    key: str
    stream: IO[bytes]
    digest: Any = field(default_factory=hashlib.sha256)
    size: int = 0
    error: float = 0.0

    def append(self, weights: np.ndarray, imatrix: np.ndarray | None, hessian: np.ndarray | None) -> None:
        weight_by = imatrix
        if self.type_name in IGNORES_IMATRIX:
            weight_by = None
        elif weight_by is None:
            # Without an input to weigh columns by (embeddings), all columns count alike.
            weight_by = np.ones(weights.shape[-1], np.float32)
        if hessian is None:
            blocks = ggml.quantize(weights, self.type_name, weight_by)
        else:
            blocks = quantize_with_feedback(weights, self.type_name, weight_by, hessian)
        difference = weights - ggml.dequantize(blocks, self.type_name)
        self.error += _energy(difference, imatrix, hessian)
        payload = blocks.data
        self.digest.update(payload)
        self.stream.write(payload)
        self.size += blocks.nbytes


class Remote(Protocol):
    """The bank that a folder on another machine is a part of."""

    def fetch(self, path: Path) -> None:
        """Brings a variant to `path` if it is not there.

        Raises:
            UserError: There is none, or it is damaged.
        """

    def send(self, path: Path) -> None:
        """Takes a variant that was made; it need not stay at `path`."""


class VariantBank:
    """Quantized variants in a folder, shared by all workers of a node.

    Args:
        folder: Where they lie.
        keep: Whether variants stay mapped once used; without, memory is given back as they are dropped.
        remote: Where missing variants come from and new ones go; None: the folder holds all.
    """

    def __init__(self, folder: Path, keep: bool = True, remote: Remote | None = None) -> None:
        self.folder, self.keep, self.remote = folder, keep, remote
        self._checked: set[str] = set()
        self._keys: dict[tuple[str, str], str] = {}
        self._open: dict[tuple[str, str], np.ndarray] = {}

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.q"

    def add(
        self,
        tensor: Tensor,
        types: Sequence[str],
        read: Read,
        imatrix: np.ndarray | None,
        origin: str,
        hessian: np.ndarray | None = None,
    ) -> list[tuple[str, str, float]]:
        """Quantizes a tensor to types the bank lacks, one expert after the other.

        Args:
            tensor: Name and shape.
            types: GGUF types.
            read: Gives the weights.
            imatrix: (row,) mean squared input, (experts, row) for stacked experts, or None.
            origin: Fingerprint of the checkpoint the weights belong to.
            hessian: (row, row) mean of x^T x on the imatrix's inputs, (experts, row, row) for stacked
                experts: quantizes with error feedback, to variants of their own. None: plainly.

        Returns:
            (type, key, error) of each type. The error is sum(h * (w - q)^2) / sum(h * w^2), h the imatrix;
            with a Hessian it is sum((w - q) H (w - q)^T) / sum(w H w^T).

        Raises:
            UserError: The weights cannot be read, or ggml cannot take them.
        """
        keys = {t: variant_key(tensor, t, imatrix, origin, hessian is not None) for t in types}
        done = {t: error for t in types if (error := self._finished(keys[t])) is not None}
        missing = [t for t in keys if t not in done]  # each once, however often it was asked for
        if missing:
            done |= self._quantize(tensor, missing, keys, read, imatrix, hessian)
        if self.remote is not None:
            for key in {*keys.values()}:
                self.remote.send(self.path(key))
        return [(t, keys[t], done[t]) for t in types]

    def holds(self, key: str) -> bool:
        """Whether a variant lies there in full; its checksum is verified when it is used."""
        return self._finished(key) is not None

    def _finished(self, key: str) -> float | None:
        """The error of a variant that is there, else None."""
        path = self.path(key)
        if not path.exists():
            return None
        with naming(path), path.open("rb") as stream:
            about = _read_header(stream)
            left = stream.seek(0, os.SEEK_END) - _HEADER.size
        if about is None:
            return None
        _, size, error = about
        return error if size == left else None

    def _quantize(
        self,
        tensor: Tensor,
        types: Sequence[str],
        keys: dict[str, str],
        read: Read,
        imatrix: np.ndarray | None,
        hessian: np.ndarray | None,
    ) -> dict[str, float]:
        stacked = tensor.per_expert
        energy = 0.0
        with ExitStack() as files:
            variants = [_Variant(t, keys[t], files.enter_context(atomic(self.path(keys[t])))) for t in types]
            for variant in variants:
                variant.stream.write(b"\0" * _HEADER.size)
            for e in range(tensor.shape[0]) if stacked else (None,):
                weights = read(e).reshape(-1, tensor.row)
                by = imatrix if imatrix is None or e is None else imatrix[e]
                full = hessian if hessian is None or e is None else hessian[e]
                step = max(1, _ROWS // tensor.row)
                for start in range(0, len(weights), step):
                    rows = weights[start : start + step]
                    energy += _energy(rows, by, full)
                    for variant in variants:
                        try:
                            variant.append(rows, by, full)
                        except ValueError as error:
                            raise UserError(
                                f"tensor {tensor.name}: cannot be quantized to {variant.type_name}: {error}"
                            ) from error
            errors = {}
            for variant in variants:
                errors[variant.type_name] = variant.error / max(energy, 1e-30)
                variant.stream.seek(0)
                variant.stream.write(
                    _header(variant.digest.digest(), variant.size, errors[variant.type_name])
                )
        return errors

    def register(self, tensor: str, type_name: str, key: str) -> None:
        """Makes a variant reachable by name."""
        self._keys[tensor, type_name] = key

    def blocks(self, tensor: Tensor, type_name: str) -> np.ndarray:
        """(..., row bytes) uint8 of a variant, memory-mapped and checked on first use.

        A damaged file is removed, so that the next run makes it anew.

        Raises:
            UserError: The variant's file is missing or its checksum does not hold.
        """
        name = (tensor.name, type_name)
        if name in self._open:
            return self._open[name]
        key = self._keys[name]
        path = self.path(key)
        if self.remote is not None and not path.exists():
            self.remote.fetch(path)
        try:
            size = path.stat().st_size - _HEADER.size
            # Read before it is mapped, as a process ends without a word where a mapped file cannot be.
            whole = size == tensor.bytes(type_name) and (key in self._checked or _holds(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); run the search again") from error
        if not whole:
            with suppress(OSError):  # the disk may be read-only
                path.unlink()
            raise UserError(
                f"{path}: damaged ({tensor.name} as {type_name}), and removed; run the search again, which "
                "makes it anew"
            )
        self._checked.add(key)
        shape = (*tensor.shape[:-1], quant_type(type_name).row_bytes(tensor.row))
        blocks = np.memmap(path, np.uint8, "r", _HEADER.size, shape)
        if self.keep:
            self._open[name] = blocks
        return blocks


def sound(path: Path) -> bool:
    """Whether a file is a whole variant whose checksum holds."""
    try:
        return _holds(path)
    except OSError:
        return False


def _holds(path: Path) -> bool:
    """As `sound`; raises OSError where the file cannot be read."""
    with path.open("rb") as stream:
        about = _read_header(stream)
        if about is None:
            return False
        digest, size, _ = about
        found = hashlib.file_digest(stream, "sha256").digest()
        return stream.tell() == _HEADER.size + size and found == digest


def _header(digest: bytes, size: int, error: float) -> bytes:
    bare = _HEADER.pack(_MAGIC, digest, size, error, b"")[:-_CHECK]
    return bare + hashlib.sha256(bare).digest()[:_CHECK]


def _read_header(stream: IO[bytes]) -> tuple[bytes, int, float] | None:
    """(SHA-256 of the blocks, their bytes, relative error); None where it is none, or damaged."""
    head = stream.read(_HEADER.size)
    if len(head) != _HEADER.size:
        return None
    _, digest, size, error, _ = _HEADER.unpack(head)
    return (digest, size, error) if head == _header(digest, size, error) else None


def variant_key(
    tensor: Tensor, type_name: str, imatrix: np.ndarray | None, origin: str, feedback: bool = False
) -> str:
    """Name of a variant: a hash of all that decides its bytes and its error (the imatrix weighs it).

    The Hessian of error feedback is named by the imatrix, its diagonal.
    """
    about = f"{origin} {tensor.name} {tensor.shape} {type_name} {ggml.version()}{_FEEDBACK * feedback}"
    digest = hashlib.sha256(about.encode())
    if imatrix is not None:
        digest.update(np.ascontiguousarray(imatrix, np.float32).data)
    return digest.hexdigest()[:40]


def _energy(x: np.ndarray, imatrix: np.ndarray | None, hessian: np.ndarray | None = None) -> float:
    """Sum of squares, columns weighed by the imatrix; of x H x^T with a Hessian."""
    if hessian is not None:
        return float(damage(x, hessian).sum())
    columns = np.einsum("ij,ij->j", x, x, dtype=np.float64)
    return float(columns.sum() if imatrix is None else columns @ imatrix.astype(np.float64))
