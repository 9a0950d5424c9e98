"""What several tests do to a small model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compression.calibration import Calibration
from compression.candidate_model import CandidateModel
from spaces.candidate import Candidate, MoeLayer
from spaces.errors import UserError
from spaces.inventory import Inventory

EVERY = tuple(range(8))
LONG = ("Q4_K", "Q6_K", "IQ4_XS", "Q8_0", "Q5_K")  # for rows of 256
SHORT = ("Q8_0", "Q5_0", "BF16", "IQ4_NL")


def candidate(
    inventory: Inventory,
    experts: Mapping[int, tuple[int, ...]] | None = None,
    top_k: Mapping[int, int] | None = None,
    types: str | Mapping[str, str] = "Q8_0",
) -> Candidate:
    """A valid candidate; what is not given is as in the model, and Q8_0."""
    layers = tuple(
        MoeLayer(i, (experts or {}).get(i, EVERY), (top_k or {}).get(i, inventory.top_k))
        for i in inventory.moe_layers
    )
    uniform = inventory.uniform_plan(types if isinstance(types, str) else "Q8_0").types
    chosen = {} if isinstance(types, str) else types
    out = Candidate(layers, tuple((name, chosen.get(name, default)) for name, default in uniform))
    out.validate(inventory)
    return out


def mixed_types(inventory: Inventory) -> dict[str, str]:
    """Neighbouring tensors in different types."""
    return {
        t.name: LONG[i % len(LONG)] if t.row % 256 == 0 else SHORT[i % len(SHORT)]
        for i, t in enumerate(inventory.quantizable)
    }


def reader(model: CandidateModel, name: str) -> Callable[[int | None], np.ndarray]:
    """What gives the bank a tensor's weights."""
    return lambda expert: model.weights.read(model.family.by_name[name], expert)


def provide(model: CandidateModel, wanted: Candidate, calibration: Calibration | None = None) -> Candidate:
    """Puts all that a candidate needs into the bank; without a calibration, types must do without imatrix."""
    for name, type_name in wanted.types:
        tensor = model.inventory.by_name[name]
        imatrix = None if calibration is None else calibration.imatrix.get(name)
        ((_, key, _),) = model.bank.add(tensor, [type_name], reader(model, name), imatrix, "tiny")
        model.bank.register(name, type_name, key)
    return wanted


def logits(model: Any, windows: np.ndarray) -> np.ndarray:
    """(n, length, vocabulary) logits of a transformers model, or of what a candidate model is."""
    plain = model.model if isinstance(model, CandidateModel) else model
    with torch.inference_mode():
        out: np.ndarray = plain(torch.from_numpy(windows.astype(np.int64)), use_cache=False).logits.numpy()
    return out


def log_softmax(x: np.ndarray) -> np.ndarray:
    """In float64, without torch."""
    y = np.asarray(x, np.float64)
    y = y - y.max(-1, keepdims=True)
    return np.asarray(y - np.log(np.exp(y).sum(-1, keepdims=True)))


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    """Mean KL(p || q) over positions, nats."""
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def perplexity(x: np.ndarray, windows: np.ndarray) -> float:
    rows = log_softmax(x[:, :-1])
    return float(np.exp(-np.take_along_axis(rows, windows[:, 1:, None].astype(np.int64), -1).mean()))


def refused(call: Callable[[], object], *parts: str | Path) -> str:
    """The message of the one-line UserError that `call` must end in; it holds all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message
