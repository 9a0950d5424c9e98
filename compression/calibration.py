"""One pass over calibration text: how experts are used and what every weight multiplies.

Per expert of a layer: tokens routed to it, its mean router score when
selected, the sum of its gates (router mass), the mean over its tokens of
gate * ||output|| (REAP, arXiv 2510.13999) and the largest output it made
(super experts, arXiv 2507.23279). Per column of a quantizable tensor: the mean
squared input, which is what llama.cpp calls the importance matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compression.families import Family
from compression.files import atomic
from spaces.errors import UserError
from spaces.inventory import Inventory

if TYPE_CHECKING:
    from torch import Tensor

STATISTICS = ("tokens", "score", "mass", "reap", "peak")


@dataclass(frozen=True)
class Calibration:
    """What a pass measured.

    Attributes:
        imatrix: GGUF tensor name to mean squared input: (row,), or (experts, row) for stacked experts.
        routing: Statistic name to (MoE layers, experts) float64.
        tokens: Tokens of the pass.
        text: Hash of the token ids, so that a stale calibration is noticed.
    """

    imatrix: dict[str, np.ndarray]
    routing: dict[str, np.ndarray]
    tokens: int
    text: str

    def unseen(self) -> list[tuple[int, int]]:
        """(position of the MoE layer, expert) of experts no token reached."""
        return [(int(i), int(e)) for i, e in np.argwhere(self.routing["tokens"] == 0)]

    def save(self, path: Path) -> None:
        """Writes the arrays as one .npz file."""
        arrays = {f"imatrix/{k}": v for k, v in self.imatrix.items()}
        arrays |= {f"routing/{k}": v for k, v in self.routing.items()}
        about = json.dumps({"tokens": self.tokens, "text": self.text}).encode()
        with atomic(path) as stream:
            np.savez(stream, about=np.frombuffer(about, np.uint8), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads what `save` wrote; a damaged file is a `UserError`."""
        try:
            with np.load(path, allow_pickle=False) as data:
                about = json.loads(data["about"].tobytes())
                imatrix = {k[8:]: data[k] for k in data.files if k.startswith("imatrix/")}
                routing = {k[8:]: data[k] for k in data.files if k.startswith("routing/")}
            return cls(imatrix, routing, int(about["tokens"]), str(about["text"]))
        except Exception as error:  # np.load raises many kinds on a damaged archive
            raise UserError(f"{path}: damaged calibration file; delete it to calibrate again") from error


class _Sums:
    """Running sums of squares per tensor."""

    def __init__(self) -> None:
        self.squares: dict[str, np.ndarray] = {}
        self.rows: dict[str, float] = {}

    def add(self, names: tuple[str, ...], x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).double()
        squares = flat.square().sum(0).numpy()
        for name in names:
            self.squares[name] = self.squares.get(name, 0.0) + squares
            self.rows[name] = self.rows.get(name, 0) + len(flat)


class _MoeObserver:
    """Stands in for a layer's experts: the same result, with every statistic on the way."""

    def __init__(self, experts: Any, count: int) -> None:
        self.experts = experts
        self.stats = {name: np.zeros(count) for name in STATISTICS}
        width = experts.down_proj.shape[-1]
        self.gate_up = np.zeros((count, experts.gate_up_proj.shape[-1]))
        self.down = np.zeros((count, width))
        self.scores: Tensor | None = None

    def watch_router(self, module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Forward hook of the router: keeps its scores until the experts run."""
        self.scores = output[0].detach().sigmoid()

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        import torch
        from torch.nn import functional

        assert self.scores is not None
        out = torch.zeros_like(hidden)
        for e in index.unique().tolist():
            token, slot = torch.where(index == e)
            x, gate = hidden[token], weights[token, slot]
            proj, up = functional.linear(x, self.experts.gate_up_proj[e]).chunk(2, -1)
            inner = self.experts.act_fn(proj) * up
            y = functional.linear(inner, self.experts.down_proj[e])
            norm = y.norm(dim=-1).double()
            self.gate_up[e] += x.double().square().sum(0).numpy()
            self.down[e] += inner.double().square().sum(0).numpy()
            self.stats["tokens"][e] += len(token)
            self.stats["score"][e] += float(self.scores[token, e].double().sum())
            self.stats["mass"][e] += float(gate.double().sum())
            self.stats["reap"][e] += float((gate.double() * norm).sum())
            self.stats["peak"][e] = max(self.stats["peak"][e], float(y.abs().max()))
            out.index_add_(0, token, y * gate[:, None])
        return out


@contextmanager
def _observed(
    model: Any, inventory: Inventory, family: Family, sums: _Sums
) -> Iterator[dict[int, _MoeObserver]]:
    """Hooks every linear and replaces every layer's experts for the length of the block."""
    observers: dict[int, _MoeObserver] = {}
    handles = []
    try:
        for module, names in family.inputs(model):
            handles.append(
                module.register_forward_pre_hook(lambda m, args, names=names: sums.add(names, args[0]))
            )
        for module, names, part in family.outputs(model):

            def add_part(m: Any, args: Any, y: Any, names: Any = names, part: slice = part) -> None:
                sums.add(names, y.reshape(-1, inventory.heads, y.shape[-1] // inventory.heads)[..., part])

            handles.append(module.register_forward_hook(add_part))
        for layer in inventory.moe_layers:
            block = family.moe(model, layer)
            observer = observers[layer] = _MoeObserver(block.experts, inventory.experts)
            handles.append(block.gate.register_forward_hook(observer.watch_router))
            block.experts.forward = observer
        yield observers
    finally:
        for handle in handles:
            handle.remove()
        for layer in observers:
            vars(family.moe(model, layer).experts).pop("forward", None)


def calibrate(
    model: Any,
    inventory: Inventory,
    family: Family,
    windows: np.ndarray,
    text: str,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Calibration:
    """Runs the model over calibration windows and gathers every statistic.

    Args:
        model: The uncompressed transformers model.
        inventory: Its tensors.
        family: Its family.
        windows: (n, length) token ids.
        text: Hash that names the windows.
        progress: Called with the tokens done so far.
    """
    import torch

    sums = _Sums()
    with torch.inference_mode(), _observed(model, inventory, family, sums) as observers:
        for start in range(0, len(windows), 8):
            model(torch.from_numpy(windows[start : start + 8].astype(np.int64)), use_cache=False)
            progress(min(start + 8, len(windows)) * windows.shape[1])
    imatrix = {n: (s / max(1, sums.rows[n])).astype(np.float32) for n, s in sums.squares.items()}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in STATISTICS}
    for layer, observer in observers.items():
        count = np.maximum(observer.stats["tokens"], 1)
        for name in STATISTICS:
            value = observer.stats[name]
            rows[name].append(value / count if name in ("score", "reap") else value)
        for role, squares in (("gate", observer.gate_up), ("up", observer.gate_up), ("down", observer.down)):
            imatrix[f"blk.{layer}.ffn_{role}_exps.weight"] = _with_unseen(squares, observer.stats["tokens"])
    routing = {name: np.stack(values) for name, values in rows.items()}
    return Calibration(imatrix, routing, int(windows.size), text)


def _with_unseen(squares: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Mean squares per expert; an expert no token reached takes the layer's mean."""
    mean = squares / np.maximum(tokens, 1)[:, None]
    mean[tokens == 0] = squares.sum(0) / max(1.0, tokens.sum())
    return mean.astype(np.float32)
