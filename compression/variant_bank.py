"""Every tensor in every GGUF type, quantized once.

A variant is a file `<key>.q`: a header with the SHA-256 of the blocks, then the
blocks. The key is a hash of all that decides them (weights, type, imatrix,
quantizer version), so a variant is never stale, and a search that was killed
finds what it had finished.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

from compression import ggml
from compression.calibration import Calibration
from compression.files import atomic
from spaces.errors import UserError
from spaces.inventory import Tensor
from spaces.quant_types import IGNORES_IMATRIX, quant_type

_MAGIC = b"MFBANK1\0"
_HEADER = struct.Struct("<8s32sQd8x")  # magic, SHA-256 of the blocks, their bytes, relative error


class VariantBank:
    """Quantized variants in a folder, shared by all workers of a node."""

    def __init__(self, folder: Path, calibration: Calibration) -> None:
        self.folder = folder
        self.calibration = calibration
        self._keys: dict[tuple[str, str], str] = {}
        self._open: dict[tuple[str, str], np.ndarray] = {}

    def _imatrix(self, tensor: Tensor, type_name: str) -> np.ndarray | None:
        return None if type_name in IGNORES_IMATRIX else self.calibration.imatrix.get(tensor.name)

    def key(self, tensor: Tensor, type_name: str, weights: np.ndarray) -> str:
        """Name of a variant: a hash of all that decides its bytes."""
        digest = hashlib.sha256(f"{tensor.name} {tensor.shape} {type_name} {ggml.version()}".encode())
        digest.update(np.ascontiguousarray(weights, np.float32).data)
        imatrix = self._imatrix(tensor, type_name)
        if imatrix is not None:
            digest.update(np.ascontiguousarray(imatrix, np.float32).data)
        return digest.hexdigest()[:40]

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.q"

    def add(self, tensor: Tensor, type_name: str, weights: np.ndarray) -> tuple[str, float]:
        """Quantizes a tensor unless the bank has it; returns its key and relative squared error.

        The error is sum(h * (w - q)^2) / sum(h * w^2) with h the imatrix.

        Raises:
            UserError: The weights are not finite.
        """
        key = self.key(tensor, type_name, weights)
        path = self.path(key)
        if path.exists():
            with path.open("rb") as stream:
                head = stream.read(_HEADER.size)
            if len(head) == _HEADER.size and head[:8] == _MAGIC:
                return key, float(_HEADER.unpack(head)[3])
        imatrix = self._imatrix(tensor, type_name)
        try:
            if tensor.per_expert:
                rows = [None] * len(weights) if imatrix is None else list(imatrix)
                parts = [ggml.quantize(w, type_name, h) for w, h in zip(weights, rows, strict=True)]
                blocks = np.stack(parts)
            else:
                # Without an input to weigh columns by (embeddings), all columns count alike.
                flat = imatrix if imatrix is not None else np.ones(tensor.row, np.float32)
                blocks = ggml.quantize(weights, type_name, None if type_name in IGNORES_IMATRIX else flat)
        except ValueError as error:
            raise UserError(f"tensor {tensor.name}: cannot be quantized to {type_name}: {error}") from error
        error_ratio = _relative_error(weights, ggml.dequantize(blocks, type_name), imatrix)
        with atomic(path) as stream:
            payload = blocks.tobytes()
            digest = hashlib.sha256(payload).digest()
            stream.write(_HEADER.pack(_MAGIC, digest, len(payload), error_ratio))
            stream.write(payload)
        return key, error_ratio

    def register(self, tensor: str, type_name: str, key: str) -> None:
        """Makes a variant reachable by name."""
        self._keys[tensor, type_name] = key

    def blocks(self, tensor: Tensor, type_name: str) -> np.ndarray:
        """(..., row bytes) uint8 of a variant, memory-mapped and checked on first use.

        Raises:
            UserError: The variant's file is missing or its checksum does not hold.
        """
        name = (tensor.name, type_name)
        if name not in self._open:
            path = self.path(self._keys[name])
            try:
                raw = np.memmap(path, np.uint8, "r")
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); run the search again") from error
            magic, digest, size, _ = (
                _HEADER.unpack(raw[: _HEADER.size].tobytes())
                if len(raw) >= _HEADER.size
                else (b"", b"", 0, 0.0)
            )
            payload = raw[_HEADER.size :]
            if magic != _MAGIC or len(payload) != size or hashlib.sha256(payload.data).digest() != digest:
                raise UserError(
                    f"{path}: damaged ({tensor.name} as {type_name}); delete it and run the search again"
                )
            row_bytes = quant_type(type_name).row_bytes(tensor.row)
            self._open[name] = payload.reshape(*tensor.shape[:-1], row_bytes)
        return self._open[name]


def _relative_error(weights: np.ndarray, approximation: np.ndarray, imatrix: np.ndarray | None) -> float:
    scale = 1.0 if imatrix is None else imatrix[..., None, :] if imatrix.ndim == 2 else imatrix
    error = float((scale * (weights - approximation).astype(np.float64) ** 2).sum())
    return error / max(float((scale * weights.astype(np.float64) ** 2).sum()), 1e-30)
