"""What must hold of a written file and of what led to it, checked instead of believed.

The field's silent failures are the list: experts that calibration never reached, tensors
that were to be quantized and were not, routers and norms that were not to be and were,
metadata of the unpruned model (ModelOpt #1340, GPTQModel #1376, llm-compressor #2060).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compression.calibration import Calibration
from compression.gguf_export import tensor_data
from compression.gguf_file import GgufFile
from compression.stored_model import StoredModel
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.inventory import Inventory

LOSSLESS = frozenset({"F32", "F16", "BF16"})
_DESTROYED = 0.9


def check_file(path: Path, model: StoredModel, candidate: Candidate) -> None:
    """Reads a written GGUF back and holds it against the candidate, the bank and the checkpoint.

    Raises:
        UserError: A tensor has another type, shape or bytes than the candidate asks for (quantized
            blocks against the bank, the rest against the checkpoint), or the counts in the metadata differ.
    """
    file, inventory = GgufFile.open(path), model.inventory
    again = "the file is not what was searched; export it again"
    infos = inventory.infos(candidate.plan)
    if list(file.tensors) != [info.name for info in infos]:
        raise UserError(f"{path}: holds other tensors than the model; {again}")
    for info in infos:
        stored = file.tensor(info.name)
        if stored.shape != info.shape or stored.info.type_id != info.type_id:
            raise UserError(f"{path}: {info.name} is {stored.type_name} of {stored.shape}; {again}")
        start = 0
        for piece in tensor_data(model, candidate, info.name):
            expected = np.ascontiguousarray(piece).view(np.uint8).reshape(-1)
            if not np.array_equal(file.part(info.name, start, len(expected)), expected):
                source = "the bank" if inventory.by_name[info.name].quantizable else "the checkpoint"
                raise UserError(f"{path}: {info.name} has other bytes than {source}; {again}")
            start += len(expected)
    for key, pairs in (
        (inventory.expert_count_key, candidate.plan.kept),
        (inventory.expert_used_key, candidate.plan.top_k),
    ):
        found = file.metadata[key].value
        if found != pairs[0][1]:
            raise UserError(f"{path}: {key} is {found}, the candidate has {pairs[0][1]}; {again}")


def unseen_experts(calibration: Calibration, inventory: Inventory) -> dict[int, list[int]]:
    """Layer to the experts that no calibration token reached; their imatrix is the layer's mean."""
    out: dict[int, list[int]] = {}
    for position, expert in calibration.unseen():
        out.setdefault(inventory.moe_layers[position], []).append(expert)
    return out


def warnings(
    calibration: Calibration, inventory: Inventory, errors: Mapping[tuple[str, str], float]
) -> list[str]:
    """What a user should know of calibration and quantization, a line each.

    Args:
        calibration: Of the model.
        inventory: Its tensors.
        errors: Relative squared error of every (tensor, type) in the bank.
    """
    lines = []
    unseen = unseen_experts(calibration, inventory)
    if unseen:
        count, (layer, first) = sum(map(len, unseen.values())), next(iter(unseen.items()))
        lines.append(
            f"{count} of {len(inventory.moe_layers) * inventory.experts} experts saw none of the "
            f"{calibration.tokens:,} calibration tokens (layer {layer}: {', '.join(map(str, first[:8]))}, "
            "...); their imatrix is their layer's mean and they rank last; a longer --calibration may help"
        )
    unchanged = [f"{n} as {t}" for (n, t), e in errors.items() if e == 0 and t not in LOSSLESS]
    if unchanged:
        lines.append(
            f"quantization changed nothing in {len(unchanged)} tensors ({unchanged[0]}): was the model "
            "quantized before, or are its weights all alike?"
        )
    destroyed = [f"{n} as {t}" for (n, t), e in errors.items() if e > _DESTROYED]
    if destroyed:
        lines.append(f"quantization left next to nothing of {len(destroyed)} tensors ({destroyed[0]})")
    return lines
