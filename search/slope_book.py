"""Slopes measured at incumbents, kept on disk so that a study goes on with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from compression import sealed
from compression.sealed import UnsoundError
from search.cache_files import material
from search.console import console

Slopes = Mapping[tuple[str, str], tuple[float, float]]
"""(tensor, type) -> (first, second) as in `evaluators.slopes.Slope`."""


class SlopeBook:
    """Slopes by candidate key.

    Args:
        folder: Where they are written, in the study's cache; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._known: dict[str, Slopes] = {}

    def get(self, key: str) -> Slopes | None:
        """Slopes at a candidate; None where none were measured, or what was kept of them may not be used."""
        if key not in self._known and self.folder is not None:
            file = self.folder / f"{key}.json"
            if file.exists():
                try:
                    rows = json.loads(sealed.read(file, material(self.folder.parent, "search")))
                except UnsoundError as error:
                    console.print(f"note: {error.path}: {error.reason}: measured anew", soft_wrap=True)
                    sealed.remove(file)
                    return None
                self._known[key] = {(name, kind): (first, second) for name, kind, first, second in rows}
        return self._known.get(key)

    def keys(self) -> set[str]:
        """Candidates that slopes were measured at, by this driver or by another one of its folder."""
        kept = () if self.folder is None else self.folder.glob("*.json")
        return {*self._known, *(file.stem for file in kept)}

    def put(self, key: str, slopes: Slopes) -> None:
        """Notes slopes at a candidate."""
        self._known[key] = slopes
        if self.folder is not None:
            rows = [[*option, *slope] for option, slope in slopes.items()]
            made_of = material(self.folder.parent, "search")
            sealed.write(self.folder / f"{key}.json", json.dumps(rows), made_of)
