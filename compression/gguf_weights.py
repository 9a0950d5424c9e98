"""A GGUF file as a family's weights."""

from __future__ import annotations

import numpy as np

from compression.families.base import Family
from compression.families.parts import Part
from compression.gguf_file import GgufFile
from compression.weights import Weights
from spaces.errors import UserError

WHOLE_TYPES = ("F32", "F16", "BF16", "Q8_0", "MXFP4")
"""Types a model may be given in: lossless, nearly so, and the one gpt-oss is published in."""


class GgufWeights(Weights):
    """The tensors of a GGUF file, in the shapes that `family` expects.

    Raises:
        UserError: A tensor is missing, of another shape, or already compressed.
    """

    def __init__(self, file: GgufFile, family: Family) -> None:
        self.file, self.family = file, family
        for part in family.parts:
            stored = file.tensor(part.name)
            if stored.shape != part.tensor.shape:
                raise UserError(
                    f"{stored.file}: tensor {part.name} has shape {stored.shape}, the metadata leads to "
                    f"{part.tensor.shape}; is the file damaged?"
                )
            if stored.type_name not in WHOLE_TYPES:
                raise UserError(
                    f"{stored.file}: tensor {part.name} is {stored.type_name}, compressed already; give the "
                    f"model in {', '.join(WHOLE_TYPES)} (search.export --candidate takes any GGUF)"
                )

    def read(self, part: Part, expert: int | None = None) -> np.ndarray:
        values = np.ascontiguousarray(self.file.float32(part.name, expert))
        shape = part.tensor.shape if expert is None else part.tensor.shape[1:]
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.file.path}: tensor {part.name} holds NaN or infinite values; download it again"
            )
        return values.reshape(shape)
