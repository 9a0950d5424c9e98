"""What a repair changed of one candidate: other values in the same bytes.

A candidate says which type every tensor takes; a repair may give some tensors other
blocks of that type, and the tensors that are never quantized other numbers. Scores
and files are made of the same overrides, so a repaired candidate is still scored as
it ships.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compression.files import atomic
from compression.safetensors_file import read, read_header, read_raw
from compression.safetensors_writer import Item, write
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.inventory import Inventory
from spaces.quant_types import quant_type


@dataclass(frozen=True)
class Overrides:
    """Repairs of a candidate.

    Attributes:
        candidate: Key of the candidate they belong to.
        blocks: Tensor -> (..., row bytes) uint8 in the candidate's type, of all experts.
        plain: Tensor that is never quantized -> float32 in GGUF's order, of all experts.
    """

    candidate: str
    blocks: Mapping[str, np.ndarray] = field(default_factory=dict)
    plain: Mapping[str, np.ndarray] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        items = [Item(n, "U8", x.shape, lambda x=x: [x]) for n, x in self.blocks.items()]  # type: ignore[misc]
        items += [Item(n, "F32", x.shape, lambda x=x: [x]) for n, x in self.plain.items()]  # type: ignore[misc]
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as stream:
            marks = {"format": "moefit repairs", "candidate": self.candidate, "digest": self.digest}
            write(stream, items, marks)

    @property
    def digest(self) -> str:
        """SHA-256 over names and values."""
        out = hashlib.sha256()
        for name, values in sorted({**self.blocks, **self.plain}.items()):
            out.update(name.encode())
            out.update(np.ascontiguousarray(values).tobytes())
        return out.hexdigest()

    @classmethod
    def load(cls, path: Path, inventory: Inventory, candidate: Candidate) -> Overrides:
        """Reads what `save` wrote.

        Raises:
            UserError: The file is damaged, or not of this candidate.
        """
        raw, entries = read_header(path)
        if f'"candidate": "{candidate.key}"'.encode() not in raw:
            raise UserError(f"{path}: repairs of another candidate; delete it and run the search again")
        types = dict(candidate.types)
        blocks, plain = {}, {}
        for name, entry in entries.items():
            tensor = inventory.by_name.get(name)
            if tensor is None:
                raise UserError(f"{path}: {name} is no tensor of {inventory.name}; delete the file")
            kind, shape = "F32", tensor.shape
            if tensor.quantizable:
                kind, shape = "U8", (*shape[:-1], quant_type(types[name]).row_bytes(tensor.row))
            if (entry.kind, entry.shape) != (kind, shape):
                raise UserError(f"{path}: {name} is not {kind} of {shape}; delete it and search again")
            if tensor.quantizable:
                blocks[name] = read_raw(entry).reshape(entry.shape)
            else:
                plain[name] = read(entry)
        found = cls(candidate.key, blocks, plain)
        if found.digest.encode() not in raw:
            raise UserError(f"{path}: its values are not those that were written; delete it and search again")
        return found
