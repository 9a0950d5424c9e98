"""What one core does in a second, as `experiments.scale_rates` measured it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import log

import numpy as np


@dataclass(frozen=True)
class Rates:
    """Rates of one core, one thread.

    Attributes:
        cpu: The processor they were measured on.
        types: GGUF type to CPU seconds per weight: `quantize` (into the bank), `dequantize` (into a model).
        filling: Kind of a checkpoint's numbers to CPU seconds per weight of reading them into a model.
        blocks: Weights of one expert's matrix to [tokens for each expert, FLOP a second] of a decoder block.
        logit: CPU seconds per logit of comparing a candidate with the base model, matrices not counted.
        hash: Bytes a second of SHA-256.
        trial: CPU seconds of the driver for one trial: asking, telling, tracking.
        shares: Of a study's trials, those that reach each rung.
        slopes: Jobs of slopes for every trial.
        gradient: CPU seconds per weight of what every type would change, for each window and draw.
        spread: Standard deviation of the logarithm of a job's time over what its work says.
        task_tokens: Tokens of forward pass for one lm-eval item.
        repair: CPU seconds per weight of quantizing with error feedback.
    """

    cpu: str
    types: Mapping[str, Mapping[str, float]]
    filling: Mapping[str, float]
    blocks: Mapping[str, Sequence[Sequence[float]]]
    logit: float
    hash: float
    trial: float
    shares: tuple[float, ...]
    slopes: float
    gradient: float
    spread: float
    task_tokens: float
    repair: float

    @classmethod
    def of(cls, found: Mapping[str, object]) -> Rates:
        """From the content of rates.json."""
        names = cls.__dataclass_fields__
        return cls(**{n: v for n, v in found.items() if n in names})  # type: ignore[arg-type]

    def flops(self, matrix: int, rows: float) -> float:
        """FLOP a second of a decoder block: between what was measured, linear in the logarithms.

        Small matrices and few tokens spend their time on calls and on reading weights.

        Args:
            matrix: Weights of one expert's matrix.
            rows: Tokens that each expert gets at once.
        """
        sizes = sorted(map(int, self.blocks))
        at = [np.interp(log(rows), *_logs(self.blocks[str(size)])) for size in sizes]
        return float(np.exp(np.interp(log(matrix), [log(s) for s in sizes], at)))


def _logs(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [log(x) for x, _ in points], [log(y) for _, y in points]


@cache
def measured() -> Rates:
    """The rates that are shipped."""
    text = resources.files("search.scale").joinpath("rates.json").read_text("utf-8")
    return Rates.of(json.loads(text))
