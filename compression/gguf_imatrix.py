"""Importance matrices as `llama-imatrix` writes them: mean squared inputs per column of a weight.

Format: llama.cpp's tools/imatrix (`save_imatrix`) and common/imatrix-loader (`common_imatrix_load`): a GGUF
file with general.type = imatrix and, per weight NAME, NAME.in_sum2 (matrices, row), sums of squares, and
NAME.counts (matrices, 1), the tokens summed; F32 both. Only experts have several matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from compression.gguf_file import GgufFile
from spaces.errors import UserError

_SUMS, _COUNTS = ".in_sum2", ".counts"


class Imatrix(Mapping[str, np.ndarray]):
    """Weight name to (matrices, row) float32 mean squares; read from the file when asked for."""

    def __init__(self, path: Path) -> None:
        """Opens a file.

        Raises:
            UserError: No GGUF file, or none of this kind.
        """
        try:
            self.file = GgufFile.open(path)
        except UserError as error:
            if "not a GGUF file" not in str(error):
                raise
            raise UserError(
                f"{path}: not an imatrix in GGUF format; convert an old one with "
                "llama-imatrix --in-file OLD.dat -o NEW.gguf"
            ) from error
        kind = self.file.metadata.get("general.type")
        if kind is None or kind.value != "imatrix":
            raise UserError(f"{path}: not an imatrix (general.type); give a file that llama-imatrix wrote")
        names = self.file.tensors
        self._names = tuple(n.removesuffix(_SUMS) for n in names if n.endswith(_SUMS))
        for name in self._names:
            if name + _COUNTS not in names:
                raise UserError(f"{path}: {name + _COUNTS!r} is missing; make the imatrix again")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> np.ndarray:
        """The mean squares of a weight; an expert that saw no token has ones, as in `llama-quantize`.

        Raises:
            KeyError: The file has none of this weight.
            UserError: They are not what the format says.
        """
        if name not in self._names:
            raise KeyError(name)
        for part in (_SUMS, _COUNTS):
            if self.file.tensor(name + part).type_name != "F32":
                raise UserError(f"{self.file.path}: {name + part!r} must be F32; make the imatrix again")
        sums, counts = self.file.float32(name + _SUMS), self.file.float32(name + _COUNTS).reshape(-1, 1)
        if sums.size % counts.size:
            raise UserError(f"{self.file.path}: {name!r} has {sums.size} sums for {counts.size} counts")
        if not (np.isfinite(sums).all() and np.isfinite(counts).all() and (sums >= 0).all()):
            raise UserError(
                f"{self.file.path}: {name!r} holds negative or non-finite numbers; make the imatrix again"
            )
        sums = sums.reshape(counts.size, -1)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)
