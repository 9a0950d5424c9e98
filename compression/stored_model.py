"""A model on disk: its checkpoint, and the bank of its quantized variants. All that writing a file needs."""

from __future__ import annotations

import numpy as np

from compression.checkpoint import Checkpoint
from compression.variant_bank import VariantBank
from spaces.inventory import Inventory


class StoredModel:
    """Where the bytes of any candidate come from.

    Args:
        checkpoint: The uncompressed model.
        inventory: Its tensors, with the tokenizer where files are to be written.
        bank: Quantized variants of its tensors.
    """

    def __init__(self, checkpoint: Checkpoint, inventory: Inventory, bank: VariantBank) -> None:
        self.checkpoint, self.inventory, self.bank = checkpoint, inventory, bank
        self.family, self.weights = checkpoint.family, checkpoint.weights

    def plain(self, name: str) -> np.ndarray:
        """A tensor that is never quantized (norms, router, selection bias), float32, of all experts."""
        return self.weights.read(self.family.by_name[name])

    def parameter(self, name: str) -> np.ndarray:
        """As `plain`, but the values that transformers' parameter holds, in GGUF's order."""
        return self.weights.parameter(self.family.by_name[name])
