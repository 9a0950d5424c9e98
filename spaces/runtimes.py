"""What a runtime can run: whether layers may differ in expert count and top-k.

Stock llama.cpp reads one scalar `expert_count`, and outside nemotron_h its graph
uses layer 0's top-k for every layer; tests check both against the installed
library, so that the day it changes shows here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """Attributes: `ragged`: per-layer expert counts and top-k run correctly; `note`: why or how."""

    ragged: bool
    note: str


RUNTIMES: dict[str, Runtime] = {
    "any": Runtime(True, "portable candidates as GGUF, ragged ones as a quantized checkpoint"),
    "llama.cpp": Runtime(False, "one expert count and one top-k for all layers"),
    "transformers": Runtime(True, "per-layer counts and top-k through compression.load"),
}
