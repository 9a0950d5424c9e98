"""What the measuring commands do with their figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compression.files import write_text


def figures(rows: Mapping[str, Any], file: Path | None) -> None:
    """Prints a line for every row, and writes them all to `file` if there is one."""
    for name, row in rows.items():
        print(name, row, flush=True)
    if file is not None:
        write_text(file, json.dumps(rows, indent=1) + "\n")
