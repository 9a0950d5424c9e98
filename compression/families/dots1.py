"""dots.llm1: normed queries and keys, sigmoid router with a selection bias, shared experts."""

from __future__ import annotations

from compression.families.attention import GroupedQuery
from compression.families.experts import Sigmoid


class Dots1(Sigmoid, GroupedQuery):
    model_type = "dots1"
    architecture = "dots1"
    ties = False
    normed = True
    own_keys = True
