"""What is done to weights: calibration, expert pruning, quantization, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(path: str | Path) -> Any:
    """The transformers model of a compressed checkpoint folder; see `compression.checkpoint_export.load`."""
    from compression.checkpoint_export import load as load_folder

    return load_folder(path)
