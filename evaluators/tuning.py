"""A repair that costs no bytes: scales, norms and routers re-fitted to the base model's distributions.

Every block of a quantized tensor stores a scale, and norms and routers are stored
in F32 whatever the candidate: their values are free. A few steps of gradient
descent on KL(base || candidate), on calibration text, move them to make up for what
pruning and low bits did. The integers inside the blocks, the types, the experts
and every byte count stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from compression.block_scales import SCALED, scale_blocks
from compression.candidate_model import CandidateModel
from compression.families.parts import Part
from compression.overrides import Overrides
from evaluators.divergence import Reference
from evaluators.texts import TextSet
from spaces.candidate import Candidate
from spaces.quant_types import quant_type

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How long and how fast.

    Attributes:
        steps: Of Adam (Kingma and Ba, 2015).
        windows: Per step.
        scale_rate: Learning rate of the logarithm of block scales.
        plain_rate: Of F32 tensors, relative to their root mean square.
        warmup: Steps of rising rates; after them they fall as a cosine to a tenth.
    """

    steps: int = 60
    windows: int = 8
    scale_rate: float = 1e-2
    plain_rate: float = 1e-2
    warmup: int = 5

    def rate(self, step: int) -> float:
        """Factor on the rates at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.9 * 0.5 * (1 + float(np.cos(np.pi * done)))


@dataclass
class _Adam:
    """Moments of one tensor of unknowns."""

    value: Any
    first: Any = field(init=False)
    second: Any = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second = self.value * 0, self.value * 0

    def step(self, gradient: Tensor, rate: float, number: int) -> Tensor:
        """The change of the value, which is applied."""
        self.first.mul_(0.9).add_(gradient, alpha=0.1)
        self.second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        first, second = self.first / (1 - 0.9 ** (number + 1)), self.second / (1 - 0.99 ** (number + 1))
        change: Tensor = -rate * first / (second.sqrt() + 1e-12)
        self.value.add_(change)
        return change


class Tuner:
    """Re-fits one candidate.

    Args:
        model: The model, held in memory; left as the candidate without repairs.
        candidate: What it is to be.
        recipe: Steps and rates.
    """

    def __init__(self, model: CandidateModel, candidate: Candidate, recipe: Recipe | None = None) -> None:
        if model.stream:
            raise ValueError("re-fitting needs the model in memory")
        self.model, self.candidate, self.recipe = model, candidate, recipe or Recipe()
        self.types = dict(candidate.types)
        self.kept = {m.layer: list(m.experts) for m in candidate.layers}
        self.scales: dict[str, _Adam] = {}
        self.plain: dict[str, _Adam] = {}

    def run(
        self,
        text: TextSet,
        progress: Callable[[int, int, float], None] = lambda done, total, kl: None,
        start: Overrides | None = None,
    ) -> Overrides:
        """The repairs.

        Args:
            text: Calibration windows; the base model's states on them are computed here.
            progress: Called with (steps done, steps in all, mean KL of the step).
            start: Other repairs to go on from.
        """
        import torch

        model = self.model
        windows = torch.from_numpy(text.windows.astype(np.int64))
        model.use(None)
        model.reset()
        with torch.no_grad():
            states = model.hidden(windows)
        model.apply(self.candidate)
        model.use(start)
        parts = [p for p in model.family.parts if self._tunable(p)]
        parameters = {p.path: model.shell.parameter(p) for p in parts}
        order = np.random.default_rng(0).permutation(len(windows))
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            for step in range(self.recipe.steps):
                position = step * self.recipe.windows
                chosen = order[(position + np.arange(self.recipe.windows)) % len(order)]
                kl = self._gradients(windows[chosen], states[chosen])
                # Two plain parts may share a parameter (biases of gates and ups), which is stepped once.
                once = {p.name if p.tensor.quantizable else p.path: p for p in parts}
                with torch.no_grad():
                    for part in once.values():
                        self._update(part, parameters[part.path], step)
                for parameter in parameters.values():
                    parameter.grad = None
                progress(step + 1, self.recipe.steps, kl)
            overrides = self._overrides(parts, start)
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None
            model.overrides = None
            more = {*start.blocks, *start.plain} if start is not None else set()
            model.rewrite({p.name for p in parts} | more)
        return overrides

    def _tunable(self, part: Part) -> bool:
        tensor = part.tensor
        if tensor.quantizable:
            return self.types[tensor.name] in SCALED
        # A bias that only selects experts has no gradient.
        return part.code is None and tensor.role != "exp_probs_b"

    def _gradients(self, windows: Tensor, states: Tensor) -> float:
        """Accumulates the gradients of mean KL; returns it."""
        import torch

        total, count = 0.0, len(windows)
        for w, base_states in zip(windows.split(2), states.split(2), strict=True):
            hidden = self.model.norm(self.model.run(self.model.embed(w), 0, self.model.inventory.layers))
            with torch.no_grad():
                base = Reference(base_states @ self.model.base_output.T, w)
            log_q = self.model.logits(hidden).log_softmax(-1)
            kl = (base.negative_entropy - (base.p * log_q).sum(-1)).mean(-1).sum() / count
            kl.backward()
            total += float(kl.detach())
        return total

    def _rows(self, part: Part) -> Sequence[int] | None:
        """Experts whose rows of a part are in use; None: the part has no experts."""
        layer = part.tensor.layer
        return self.kept[layer] if part.tensor.per_expert and layer is not None else None

    def _update(self, part: Part, parameter: Tensor, step: int) -> None:
        """One step on a part's scales, or on its values."""
        if parameter.grad is None:
            return
        rate = self.recipe.rate(step)
        if not part.tensor.quantizable:
            key = part.path
            if key not in self.plain:
                self.plain[key] = _Adam(parameter.detach().clone())
            adam = self.plain[key]
            size = float(adam.value.square().mean().sqrt())
            parameter.add_(adam.step(parameter.grad, rate * self.recipe.plain_rate * size, step))
            return
        block = quant_type(self.types[part.name]).block
        values, gradients = part.views(parameter), part.views(parameter.grad)
        for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
            blocks = (*value.shape[:-1], value.shape[-1] // block)
            slope = (value * gradient).reshape(*blocks, block).sum(-1)
            adam = self.scales.setdefault(f"{part.name}/{i}", _Adam(slope * 0))
            change = adam.step(slope, rate * self.recipe.scale_rate, step)
            value.mul_(change.exp().repeat_interleave(block, -1))

    def _overrides(self, parts: Sequence[Part], start: Overrides | None) -> Overrides:
        """The fitted values in the candidate's own types."""
        blocks = dict(start.blocks) if start is not None else {}
        plain = dict(start.plain) if start is not None else {}
        for part in parts:
            tensor = part.tensor
            if not tensor.quantizable:
                if part.path in self.plain:
                    plain[part.name] = self._whole(part)
                continue
            kind = self.types[part.name]
            raw = self.model.blocks(tensor, kind)
            shape = (*raw.shape[:-1], tensor.row // quant_type(kind).block)
            found = [a.value for n, a in self.scales.items() if n.startswith(f"{part.name}/")]
            if found:
                factors = np.concatenate([f.exp().numpy().reshape(-1) for f in found]).reshape(shape)
                blocks[part.name] = scale_blocks(raw, kind, factors)
        return Overrides(self.candidate.key, blocks, plain)

    def _whole(self, part: Part) -> np.ndarray:
        """An unquantized tensor in GGUF's order, the experts that are left out as they were."""
        whole = np.array(self.model.plain(part.name), np.float32)
        fitted = self.model.shell.parameter(part).detach()
        values = np.concatenate([v.numpy().reshape(-1) for v in part.views(fitted)])
        experts = self._rows(part)
        if experts is None or part.stacked:  # only routers' parameters lack the experts left out
            return part.encode(values.reshape(whole.shape)).astype(np.float32)
        whole[experts] = part.encode(values.reshape(len(experts), *whole.shape[1:]))
        return whole
