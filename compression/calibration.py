"""What a pass over calibration text measured: how experts are used and what every weight multiplies.

Per expert of a layer: tokens routed to it, its mean router score when
selected, the sum of its gates (router mass), the mean over its tokens of
gate * ||output|| (REAP, arXiv 2510.13999) and the largest output it made
(super experts, arXiv 2507.23279). Per column of a quantizable tensor: the mean
squared input, which is what llama.cpp calls the importance matrix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compression.files import atomic
from spaces.errors import UserError

STATISTICS = ("tokens", "score", "mass", "reap", "peak")


@dataclass(frozen=True)
class Calibration:
    """What a pass measured.

    Attributes:
        imatrix: GGUF tensor name to mean squared input: (row,), or (experts, row) for stacked experts.
        routing: Statistic name to (MoE layers, experts) float64.
        tokens: Tokens of the pass.
        text: Hash of the token ids, so that a stale calibration is noticed.
    """

    imatrix: dict[str, np.ndarray]
    routing: dict[str, np.ndarray]
    tokens: int
    text: str

    def unseen(self) -> list[tuple[int, int]]:
        """(position of the MoE layer, expert) of experts no token reached."""
        return [(int(i), int(e)) for i, e in np.argwhere(self.routing["tokens"] == 0)]

    def save(self, path: Path) -> None:
        """Writes the arrays as one .npz file."""
        arrays = {f"imatrix/{k}": v for k, v in self.imatrix.items()}
        arrays |= {f"routing/{k}": v for k, v in self.routing.items()}
        about = json.dumps({"tokens": self.tokens, "text": self.text}).encode()
        with atomic(path) as stream:
            np.savez(stream, about=np.frombuffer(about, np.uint8), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads what `save` wrote; a damaged file is a `UserError`."""
        try:
            with np.load(path, allow_pickle=False) as data:
                about = json.loads(data["about"].tobytes())
                imatrix = {k[8:]: data[k] for k in data.files if k.startswith("imatrix/")}
                routing = {k[8:]: data[k] for k in data.files if k.startswith("routing/")}
            return cls(imatrix, routing, int(about["tokens"]), str(about["text"]))
        except Exception as error:  # np.load raises many kinds on a damaged archive
            raise UserError(f"{path}: damaged calibration file; delete it to calibrate again") from error
