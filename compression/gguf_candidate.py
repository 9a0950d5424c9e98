"""A candidate held against the GGUF model it is to be made of: what is wrong with it, what is doubtful."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from compression.gguf_inventory import unprunable
from spaces.candidate import Candidate
from spaces.errors import UserError, unknown
from spaces.inventory import Inventory, Tensor
from spaces.quant_types import REQUIRES_IMATRIX, WEIGHT_TYPES, quant_type

_POOR_WITHOUT_IMATRIX = frozenset({"IQ1_M", "IQ2_S", "IQ3_XXS"})
"""Types `llama-quantize` makes no file of without an imatrix, though ggml would."""
_OUTER = frozenset({"token_embd.weight", "output.weight", "per_layer_token_embd.weight"})
"""Weights `llama-imatrix` does not measure unless told to, so that llama-quantize does not ask for them."""


def completed(inventory: Inventory, candidate: Candidate, name: str) -> Candidate:
    """The candidate with its types in file order; tensors it does not name keep the type they have.

    Raises:
        UserError: It names a tensor that the model does not have or whose type cannot be chosen.
    """
    types, known = dict(candidate.types), {t.name: t for t in inventory.quantizable}
    for wrong in types.keys() - known.keys():
        if wrong in inventory.by_name:
            raise UserError(
                f"{name}: types: {wrong} stays {inventory.by_name[wrong].fixed_type}, as in llama-quantize; "
                "leave it out"
            )
        raise UserError(f"{name}: types: {unknown('tensor of ' + inventory.name, wrong, known)}"[:400])
    return replace(candidate, types=tuple((n, types.get(n, t.fixed_type)) for n, t in known.items()))


def check_candidate(
    inventory: Inventory, candidate: Candidate, imatrix: Mapping[str, np.ndarray] | None, name: str
) -> None:
    """Checks that the candidate is of this model and that llama.cpp could run what it makes.

    Args:
        inventory: The unpruned model's.
        candidate: Complete.
        imatrix: Weight name to (matrices, row) mean squared inputs.
        name: What messages call the candidate.

    Raises:
        UserError: The first rule that does not hold.
    """
    for tensor, type_name in candidate.types:
        if type_name not in WEIGHT_TYPES:
            raise UserError(f"{name}: {tensor}: {unknown('type of weights', type_name, WEIGHT_TYPES)}")
    candidate.validate(inventory, name)
    if not candidate.portable:
        raise UserError(
            f"{name}: expert counts or top-k differ by layer, which llama.cpp cannot load; keep as many "
            "experts in every layer and give every layer one top_k"
        )
    kept, top_k = len(candidate.layers[0].experts), candidate.layers[0].top_k
    _check_routing(inventory, kept, top_k, name)
    for t, (_, type_name) in zip(inventory.quantizable, candidate.types, strict=True):
        if type_name != t.fixed_type:
            _check_imatrix(t, type_name, imatrix, name)


def _check_routing(inventory: Inventory, kept: int, top_k: int, name: str) -> None:
    reason = unprunable(inventory)
    if reason and (kept, top_k) != (inventory.experts, inventory.top_k):
        raise UserError(
            f"{name}: {inventory.name} must keep its {inventory.experts} experts and top-{inventory.top_k}: "
            f"{reason}"
        )


def _check_imatrix(
    tensor: Tensor, type_name: str, imatrix: Mapping[str, np.ndarray] | None, name: str
) -> None:
    if imatrix is not None and tensor.name in imatrix:
        matrices, row = np.atleast_2d(imatrix[tensor.name]).shape
        wanted = tensor.shape[0] if len(tensor.shape) == 3 else 1
        if (matrices, row) != (wanted, tensor.row):
            raise UserError(
                f"{name}: the imatrix has {matrices} x {row} values for {tensor.name}, where {wanted} x "
                f"{tensor.row} are needed; give the imatrix of this model"
            )
        return
    outer = tensor.name in _OUTER
    if type_name in REQUIRES_IMATRIX or (type_name in _POOR_WITHOUT_IMATRIX and not outer):
        remedy = "choose a larger type" if imatrix is not None else "give --imatrix FILE or a larger type"
        raise UserError(f"{name}: {tensor.name}: {type_name} needs an imatrix of this tensor; {remedy}")


def doubts(inventory: Inventory, candidate: Candidate, imatrix: Mapping[str, np.ndarray] | None) -> list[str]:
    """What a person should know before this candidate is made, one line each."""
    changed = [
        (t, to)
        for t, (_, to) in zip(inventory.quantizable, candidate.types, strict=True)
        if to != t.fixed_type
    ]
    lines = []
    again = Counter(t.fixed_type for t, _ in changed if quant_type(t.fixed_type).bits_per_weight < 8)
    if again:
        lines.append(
            f"{again.total()} tensors are quantized a second time (from {', '.join(sorted(again))}), which "
            "adds to their error; use an F16, BF16 or Q8_0 file of the model if there is one"
        )
    missing = [
        t.name
        for t, to in changed
        if t.name not in _OUTER and quant_type(to).bits_per_weight < 8 and imatrix and t.name not in imatrix
    ]
    if missing:
        lines.append(f"the imatrix has nothing on {len(missing)} tensors ({missing[0]}, ...)")
    return lines
