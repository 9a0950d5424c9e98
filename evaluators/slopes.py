"""What any option would change, from one backward pass: the slope of damage at a setting.

At a setting with weights w, another type of one tensor moves w by d, and

    KL(w + d) - KL(w) = grad KL . d + 1/2 d' F d + ...,

F being the Fisher information, which is the Hessian of KL where the candidate is
near the base model. The second term comes from labels drawn of the candidate's own
distribution: E (grad log p(y) . d)^2 = d' F d (the labels of a window's positions
are independent given the text, so one backward pass per window and draw serves all
of them). At the uncompressed model the first term vanishes and what remains are
the Fisher costs of HIGGS (arXiv 2411.17525) and ModelOpt. Sums over options are
then free: one pass serves every type of every tensor.

Blocks are run and differentiated one at a time, so that one block's gradients are
held at once. What a small change does by making a router choose other experts is
not in any gradient: measured costs of small changes are higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compression import ggml
from compression.candidate_model import CandidateModel
from compression.families.parts import Part
from compression.setting import Setting
from evaluators.texts import TextSet
from spaces.space import Space

if TYPE_CHECKING:
    from torch import Tensor

_DIRECTIONS = 2**26  # weights of gradient held at once, float32


@dataclass(frozen=True)
class Slope:
    """Change of mean KL, nats per token, if one tensor took another type.

    Attributes:
        first: grad KL . d.
        second: d' F d / 2; never negative.
    """

    first: float
    second: float


class Slopes:
    """Differentiates KL at settings of a model that is held in memory.

    Args:
        model: The model; left in the setting that was asked about last.
        space: Names the options.
    """

    def __init__(self, model: CandidateModel, space: Space) -> None:
        if model.stream:
            raise ValueError("slopes need the model in memory")
        self.model, self.space = model, space

    def tokens(self, text: TextSet, probes: int) -> int:
        """What `at` costs, in tokens of a forward pass: two of them, and a backward pass counts as two."""
        return int(text.windows.size) * (2 + 2 * (1 + probes))

    def at(
        self, setting: Setting, text: TextSet, states: np.ndarray, probes: int = 2, seed: int = 0
    ) -> dict[tuple[str, str], Slope]:
        """The slope of every (tensor, type) of the space.

        Args:
            setting: Where to differentiate.
            text: Windows to do it on.
            states: (at least n, length, hidden) base states of the same windows.
            probes: Draws of labels per window, for the second term; 0 leaves it 0.
            seed: Of the draws.
        """
        import torch

        model = self.model
        model.set_types(setting.entry)
        model.set_types(setting.exit)
        for layer, block in enumerate(setting.blocks):
            model.set_block(layer, block)
        windows = torch.from_numpy(text.windows.astype(np.int64))
        with torch.no_grad():
            entering = [x.clone() for x in model.layer_states(windows)]
        types = dict(setting.entry) | dict(setting.exit) | {n: t for b in setting.blocks for n, t in b.types}
        project = _Projector(model, self.space, types, windows.numel(), windows.shape[1])
        flowing, matrix = self._head(windows, entering[-1], states, probes, seed)
        if not model.family.tied:
            project.add(model.family.by_name["output.weight"], matrix)
        for layer in range(model.inventory.layers - 1, -1, -1):
            flowing = self._block(layer, entering[layer], flowing, project)
        self._embedding(windows, flowing, project, matrix if model.family.tied else None)
        return project.slopes

    def _head(
        self,
        windows: Tensor,
        leaving: Tensor,
        states: np.ndarray,
        probes: int,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """Gradients at the last block's output, (n, 1 + probes, length, hidden), and of the output matrix.

        KL's own come first.
        """
        import torch

        model, generator = self.model, torch.Generator().manual_seed(seed)
        out = torch.empty(len(windows), 1 + probes, *leaving.shape[1:])
        matrix: list[Tensor] = []
        for i in range(len(windows)):
            x = leaving[i : i + 1].clone().requires_grad_(True)
            hidden = model.norm(x)
            logits = model.logits(hidden)
            q = logits.detach()[0].softmax(-1)
            p = (torch.from_numpy(np.array(states[i])) @ model.base_output.T).softmax(-1)
            for k in range(1 + probes):
                gradient = q - p
                if k:
                    drawn = torch.multinomial(q, 1, generator=generator)[:, 0]
                    gradient = -q
                    gradient[torch.arange(len(drawn)), drawn] += 1
                (out[i, k],) = torch.autograd.grad(logits, x, gradient[None], retain_graph=k < probes)
                matrix.append(gradient.T @ hidden.detach()[0] / model.family.logit_divisor)
        return out, torch.stack(matrix).view(len(windows), 1 + probes, -1)

    def _block(self, layer: int, entering: Tensor, flowing: Tensor, project: _Projector) -> Tensor:
        """Projects a block's gradients; returns those at its input."""
        import torch

        shell = self.model.shell
        parts = [p for p in shell.parts(layer) if p.tensor.quantizable]
        out = torch.empty_like(flowing)
        for some in _groups(parts):
            parameters = {p.path: shell.parameter(p) for p in some}
            held: dict[str, list[Tensor]] = {p.name: [] for p in some}
            try:
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
                for i in range(len(entering)):
                    x = entering[i : i + 1].clone().requires_grad_(True)
                    y = self.model.run(x, layer, layer + 1)
                    for k in range(flowing.shape[1]):
                        out[i, k], *found = torch.autograd.grad(
                            y, [x, *parameters.values()], flowing[i, k][None],
                            retain_graph=k < flowing.shape[1] - 1,
                        )  # fmt: skip
                        by_path = dict(zip(parameters, found, strict=True))
                        for p in some:
                            views = p.views(by_path[p.path])
                            held[p.name].append(torch.cat([v.reshape(-1) for v in views]))
            finally:
                for parameter in parameters.values():
                    parameter.requires_grad_(False)
            for p in some:
                project.add(p, torch.stack(held.pop(p.name)).view(len(entering), flowing.shape[1], -1))
        return out

    def _embedding(self, windows: Tensor, flowing: Tensor, project: _Projector, more: Tensor | None) -> None:
        """Projects the embedding's gradients, with `more` of its use as the output matrix."""
        import torch

        part = self.model.family.by_name["token_embd.weight"]
        table = self.model.shell.parameter(part)
        rows = []
        try:
            table.requires_grad_(True)
            for i in range(len(windows)):
                x = self.model.embed(windows[i : i + 1])  # some families scale what they look up
                for k in range(flowing.shape[1]):
                    keep = k < flowing.shape[1] - 1
                    (found,) = torch.autograd.grad(x, table, flowing[i, k][None], retain_graph=keep)
                    rows.append(found.view(-1))
        finally:
            table.requires_grad_(False)
        gradients = torch.stack(rows).view(*flowing.shape[:2], -1)
        project.add(part, gradients if more is None else gradients + more)


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts whose gradients are held together; those of one parameter stay together."""
    groups: list[list[Part]] = [[]]
    size = 0
    for part in sorted(parts, key=lambda p: p.path):
        weights = int(np.prod(part.tensor.shape))
        same = bool(groups[-1]) and groups[-1][-1].path == part.path
        if groups[-1] and size + weights > _DIRECTIONS and not same:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += weights
    return groups


class _Projector:
    """Turns gradients into slopes: their products with what each type would change."""

    def __init__(
        self, model: CandidateModel, space: Space, types: dict[str, str | None], tokens: int, length: int
    ) -> None:
        self.model, self.space, self.types = model, space, types
        self.tokens, self.length = tokens, length
        self.slopes: dict[tuple[str, str], Slope] = {}

    def _values(self, part: Part, type_name: str | None) -> Tensor:
        """(weights,) of a tensor in a type; None: uncompressed."""
        import torch

        if type_name is not None:
            values = ggml.dequantize(self.model.bank.blocks(part.tensor, type_name), type_name)
        elif part.stacked:
            read = self.model.weights.read
            values = np.stack([read(part, e) for e in range(part.tensor.shape[0])])
        else:
            values = self.model.weights.read(part)
        return torch.from_numpy(np.array(values, np.float32)).view(-1)

    def add(self, part: Part, gradients: Tensor) -> None:
        """Notes the slopes of one tensor: gradients (windows, 1 + probes, weights)."""
        here = self._values(part, self.types[part.name])
        for type_name in self.space.ladder(part.tensor):
            change = self._values(part, type_name) - here
            products = (gradients @ change).double()
            first, second = products[:, 0].sum() / self.tokens, products[:, 1:].square()
            mean = float(second.mean()) if second.numel() else 0.0
            self.slopes[part.name, type_name] = Slope(float(first), mean / (2 * self.length))
