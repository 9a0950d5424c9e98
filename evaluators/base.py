"""What every evaluator gives: named scores of a candidate at a fidelity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from spaces.candidate import Candidate


class Evaluator(Protocol):
    """One measure of a candidate."""

    def evaluate(self, candidate: Candidate, fidelity: int) -> Mapping[str, Any]:
        """Scores by name.

        Args:
            candidate: A valid candidate of the evaluator's model.
            fidelity: Tokens the measure may spend; measures without tokens ignore it.
        """


@dataclass(frozen=True)
class Scores:
    """All that is known of a candidate; the fields are those of result.json.

    Attributes:
        kl: KL(base || candidate), mean over tokens, nats.
        kl_se: Its standard error, over windows.
        perplexity: Of the candidate on the same text.
        bits_per_byte: Cross-entropy in bits per UTF-8 byte.
        top1: Share of tokens whose most likely next token is the base model's.
        tokens: Tokens these were measured on.
        target_bytes: File size of the target under the carried plan.
        model_bytes: File size of the model that was searched.
        device_memory_bytes: Target weights, KV cache, compute buffer and reserve.
        tokens_per_second: Predicted decoding rate of the target on the device.
        tasks: Task name to accuracy or other main metric.
    """

    kl: float
    kl_se: float
    perplexity: float
    bits_per_byte: float
    top1: float
    tokens: int
    target_bytes: int = 0
    model_bytes: int = 0
    device_memory_bytes: int = 0
    tokens_per_second: float = 0.0
    tasks: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
