"""Slopes measured at incumbents, kept on disk so that a study goes on with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from compression.files import write_text

Slopes = Mapping[tuple[str, str], tuple[float, float]]
"""(tensor, type) -> (first, second) as in `evaluators.slopes.Slope`."""


class SlopeBook:
    """Slopes by candidate key.

    Args:
        folder: Where they are written; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._known: dict[str, Slopes] = {}

    def get(self, key: str) -> Slopes | None:
        """Slopes at a candidate; None where none were measured."""
        if key not in self._known and self.folder is not None:
            file = self.folder / f"{key}.json"
            if file.exists():
                rows = json.loads(file.read_text("utf-8"))
                self._known[key] = {(name, kind): (first, second) for name, kind, first, second in rows}
        return self._known.get(key)

    def put(self, key: str, slopes: Slopes) -> None:
        """Notes slopes at a candidate."""
        self._known[key] = slopes
        if self.folder is not None:
            rows = [[*option, *slope] for option, slope in slopes.items()]
            write_text(self.folder / f"{key}.json", json.dumps(rows))
