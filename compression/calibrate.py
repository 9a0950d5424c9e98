"""The calibration pass: layer by layer, so that one layer at a time need be in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from compression.calibration import STATISTICS, Calibration
from compression.candidate_model import CandidateModel

if TYPE_CHECKING:
    from torch import Tensor


class _Sums:
    """Running sums of squares per tensor."""

    def __init__(self) -> None:
        self.squares: dict[str, np.ndarray] = {}
        self.rows: dict[str, float] = {}

    def add(self, names: tuple[str, ...], x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        squares = np.zeros(flat.shape[-1])
        for rows in flat.split(4096):
            squares += rows.double().square().sum(0).numpy()
        for name in names:
            self.squares[name] = self.squares.get(name, 0.0) + squares
            self.rows[name] = self.rows.get(name, 0) + len(flat)


class _ExpertObserver:
    """Stands in for a layer's experts: the same result, with every statistic on the way."""

    def __init__(
        self, experts: Any, count: int, hidden: int, width: int, scoring: str, kept: Tensor | None
    ) -> None:
        self.experts, self.scoring, self.kept = experts, scoring, kept
        self.stats = {name: np.zeros(count) for name in STATISTICS}
        self.gate_up = np.zeros((count, hidden))
        self.down = np.zeros((count, width))
        self.scores: Tensor | None = None

    def watch_router(self, module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Forward hook of the router: keeps its scores, by number among all experts, until those run."""
        import torch

        logits = output[0].detach().float()
        scores = logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)
        self.scores = scores
        if self.kept is not None:
            self.scores = torch.zeros(len(scores), len(self.stats["tokens"]))
            self.scores[:, self.kept] = scores

    def _linear(self, x: Tensor, name: str, expert: int) -> Tensor:
        """x through one expert's matrix, however transformers' class of experts holds it."""
        from torch.nn import functional

        weight = getattr(self.experts, name)[expert]
        bias = getattr(self.experts, f"{name}_bias")[expert] if self.experts.has_bias else None
        return functional.linear(x, weight.T if self.experts.is_transposed else weight, bias)

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        import torch

        assert self.scores is not None
        out = torch.zeros_like(hidden)
        for e in index.unique().tolist():
            token, slot = torch.where(index == e)
            x, gate = hidden[token], weights[token, slot]
            inner = self.experts._apply_gate(self._linear(x, "gate_up_proj", e))
            y = self._linear(inner, "down_proj", e)
            norm = y.norm(dim=-1).double()
            self.gate_up[e] += x.double().square().sum(0).numpy()
            self.down[e] += inner.double().square().sum(0).numpy()
            self.stats["tokens"][e] += len(token)
            self.stats["score"][e] += float(self.scores[token, e].double().sum())
            self.stats["mass"][e] += float(gate.double().sum())
            self.stats["reap"][e] += float((gate.double() * norm).sum())
            self.stats["peak"][e] = max(self.stats["peak"][e], float(y.abs().max()))
            out.index_add_(0, token, (y * gate[:, None]).to(out.dtype))
        return out


@contextmanager
def _observed(model: CandidateModel, layer: int, sums: _Sums) -> Iterator[_ExpertObserver | None]:
    """Hooks every linear of a layer and replaces its experts for the length of the block."""
    import torch

    inputs: dict[str, list[str]] = {}
    handles, observer, experts = [], None, None
    try:
        for part in model.shell.parts(layer):
            if not part.tensor.quantizable or part.stacked:
                continue
            if part.output is not None:
                source, piece = part.output

                def add_part(m: Any, args: Any, y: Any, name: str = part.name, piece: slice = piece) -> None:
                    heads = model.inventory.heads
                    sums.add((name,), y.reshape(-1, heads, y.shape[-1] // heads)[..., piece])

                handles.append(model.model.get_submodule(source).register_forward_hook(add_part))
            else:
                inputs.setdefault(part.input or part.module, []).append(part.name)
        for path, names in inputs.items():
            module = model.model.get_submodule(path)
            if not isinstance(module, torch.nn.Linear):
                continue
            handles.append(
                module.register_forward_pre_hook(lambda m, args, names=tuple(names): sums.add(names, args[0]))
            )
        if model.family.is_moe(layer):
            experts = model.shell.expert_module(layer)
            restricted, family = model.shell.router(layer), model.family
            router = restricted.module
            observer = _ExpertObserver(
                experts,
                family.expert_count,
                model.inventory.hidden,
                family.expert_width,
                family.scoring,
                restricted.kept,
            )
            handles.append(router.register_forward_hook(observer.watch_router))
            experts.forward = observer
        yield observer
    finally:
        for handle in handles:
            handle.remove()
        if experts is not None:
            vars(experts).pop("forward", None)


def calibrate(
    model: CandidateModel,
    windows: np.ndarray,
    text: str,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Calibration:
    """Runs the uncompressed model over calibration windows and gathers every statistic.

    Args:
        model: The model; left uncompressed.
        windows: (n, length) token ids.
        text: Hash that names the windows.
        progress: Called with the tokens done so far (layers count alike).
    """
    import torch

    inventory, family, sums = model.inventory, model.family, _Sums()
    observers: dict[int, _ExpertObserver] = {}
    model.reset()
    with torch.inference_mode():
        states = model.embed(torch.from_numpy(windows.astype(np.int64)))
        for layer in range(inventory.layers):
            with model.held(layer), _observed(model, layer, sums) as observer:
                states = model.run(states, layer, layer + 1)
            if observer is not None:
                observer.experts = None  # a streamed layer's memory goes with it
                observers[layer] = observer
            progress(windows.size * (layer + 1) // inventory.layers)
        sums.add(("token_embd.weight" if family.tied else "output.weight",), model.norm(states))
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
