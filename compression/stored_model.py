"""A model on disk: its checkpoint, and the bank of its quantized variants. All that writing a file needs."""

from __future__ import annotations

import numpy as np

from compression.checkpoint import Checkpoint
from compression.overrides import Overrides
from compression.variant_bank import VariantBank
from spaces.inventory import Inventory, Tensor


class StoredModel:
    """Where the bytes of any candidate come from.

    Args:
        checkpoint: The uncompressed model.
        inventory: Its tensors, with the tokenizer where files are to be written.
        bank: Quantized variants of its tensors.

    Attributes:
        overrides: Repairs of the candidate that is to be written; None for none.
    """

    def __init__(self, checkpoint: Checkpoint, inventory: Inventory, bank: VariantBank) -> None:
        self.checkpoint, self.inventory, self.bank = checkpoint, inventory, bank
        self.family, self.weights = checkpoint.family, checkpoint.weights
        self.overrides: Overrides | None = None

    def blocks(self, tensor: Tensor, type_name: str) -> np.ndarray:
        """(..., row bytes) uint8 of a quantized tensor, repaired where it is."""
        if self.overrides is not None and tensor.name in self.overrides.blocks:
            return self.overrides.blocks[tensor.name]
        return self.bank.blocks(tensor, type_name)

    def plain(self, name: str) -> np.ndarray:
        """A tensor that is never quantized (norms, router, selection bias), float32, of all experts."""
        if self.overrides is not None and name in self.overrides.plain:
            return self.overrides.plain[name]
        return self.weights.read(self.family.by_name[name])

    def parameter(self, name: str) -> np.ndarray:
        """As `plain`, but the values that transformers' parameter holds, in GGUF's order."""
        part = self.family.by_name[name]
        if self.overrides is not None and name in self.overrides.plain:
            return part.decode(self.overrides.plain[name])
        return self.weights.parameter(part)
