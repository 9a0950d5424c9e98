"""What a plan takes: file bytes and device memory, exact by arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spaces.budget import Budget
from spaces.candidate import Candidate
from spaces.carry import Carry


class Footprint:
    """Bytes of the searched model and of the target a candidate is carried to."""

    def __init__(self, carry: Carry, budget: Budget) -> None:
        self.carry, self.budget = carry, budget

    def evaluate(self, candidate: Candidate, fidelity: int = 0) -> Mapping[str, Any]:
        target = self.carry.target.file_bytes(self.carry.plan(candidate.plan))
        return {
            "target_bytes": target,
            "model_bytes": self.carry.source.file_bytes(candidate.plan),
            "device_memory_bytes": target + self.budget.overhead,
        }
