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

Other experts or another top-k of a layer are no small move of its weights, but what
they change of the block's output is known after running that block alone: d is then
taken there, with the gradients of the states, at the price of one block's forward
pass.

Blocks are run and differentiated one at a time, so that one block's gradients are
held at once. What a change does by making later routers choose other experts is not
in any gradient: measured costs of small changes are higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from compression.candidate_model import CandidateModel
from compression.families.parts import Part
from compression.setting import Setting, Settings
from evaluators.projection import Option, Projection, Slope
from evaluators.texts import TextSet
from spaces.space import Space

if TYPE_CHECKING:
    from torch import Tensor

_TOGETHER = 2**26  # weights of tensors whose gradients are taken together

__all__ = ["Option", "Slope", "Slopes"]


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
        self.settings = Settings(model.inventory)

    def tokens(self, text: TextSet, probes: int, routing: int = 0, base: bool = False) -> int:
        """What `at` costs, in tokens of a forward pass.

        Two forward passes, a backward pass (as much as two) for KL, which is flat at the
        uncompressed model (`base`), and for every draw, and one block's pass for every option of
        `routing`.
        """
        windows, backward = int(text.windows.size), probes + (0 if base and probes else 1)
        return windows * (2 + 2 * backward) + -(-windows * routing // self.model.inventory.layers)

    def at(
        self,
        setting: Setting,
        text: TextSet,
        states: np.ndarray,
        probes: int = 2,
        seed: int = 0,
        routing: Sequence[Option] = (),
    ) -> dict[Option, Slope]:
        """The slope of every (tensor, type) of the space, and of the options of `routing`.

        Args:
            setting: Where to differentiate.
            text: Windows to do it on.
            states: (at least n, length, hidden) base states of the same windows.
            probes: Draws of labels per window, for the second term; 0 leaves it 0.
            seed: Of the draws.
            routing: ("blk.N.experts", (kept, criterion)) and ("blk.N.top_k", k).
        """
        import torch

        model = self.model
        model.set_types(setting.entry)
        model.set_types(setting.exit)
        for layer, block in enumerate(setting.blocks):
            model.set_block(layer, block)
        windows = torch.from_numpy(text.windows.astype(np.int64))
        with torch.no_grad():
            states_in = [x.clone() for x in model.layer_states(windows)]
        types = dict(setting.entry) | dict(setting.exit) | {n: t for b in setting.blocks for n, t in b.types}
        project = Projection(model, self.space, types, *windows.shape)
        kinds = [False] * (setting != self.settings.base or not probes) + [True] * probes
        flowing, factors = self._head(states_in[-1], states, kinds, seed, project)
        for layer in range(model.inventory.layers - 1, -1, -1):
            for option in routing:
                if option[0].startswith(f"blk.{layer}."):
                    change = self._rerouted(setting, layer, option, states_in[layer]) - states_in[layer + 1]
                    products = torch.einsum("nkth,nth->kn", flowing, change).double().numpy()
                    drawn = np.array(kinds)
                    project.note(option, products[~drawn].ravel(), products[drawn].ravel())
            model.set_block(layer, setting.blocks[layer])
            flowing = self._block(layer, states_in[layer], flowing, kinds, project)
        self._embedding(windows, flowing, kinds, factors, project)
        return project.slopes()

    def _rerouted(self, setting: Setting, layer: int, option: Option, entering: Tensor) -> Tensor:
        """A block's output with other experts or another top-k, the rest of its setting kept."""
        import torch

        decision, choice = option
        block = setting.blocks[layer]
        if decision.endswith(".experts"):
            assert isinstance(choice, tuple)
            experts = self.space.experts(layer, *choice)
            top_k = block.top_k
        else:
            assert isinstance(choice, int)
            experts, top_k = block.experts, choice  # type: ignore[assignment]
        other = self.settings.routed(setting, layer, experts, top_k).blocks[layer]
        self.model.set_block(layer, other)
        with torch.no_grad():
            return self.model.run(entering, layer, layer + 1)

    def _head(
        self, leaving: Tensor, states: np.ndarray, kinds: Sequence[bool], seed: int, project: Projection
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Gradients at the last block's output, (n, kinds, length, hidden); False of `kinds` is KL's own.

        Where the output matrix is the embedding too, its gradients come as pairs of factors (logits'
        gradient, normed states), one for each window and kind.
        """
        import torch

        model, generator = self.model, torch.Generator().manual_seed(seed)
        out = torch.empty(len(leaving), len(kinds), *leaving.shape[1:])
        factors: list[tuple[Tensor, Tensor]] = []
        for i in range(len(leaving)):
            x = leaving[i : i + 1].clone().requires_grad_(True)
            hidden = model.norm(x)
            logits = model.logits(hidden)
            q = logits.detach()[0].softmax(-1)
            for k, drawn in enumerate(kinds):
                if drawn:
                    labels = torch.multinomial(q, 1, generator=generator)[:, 0]
                    gradient = -q
                    gradient[torch.arange(len(labels)), labels] += 1
                else:
                    gradient = q - (torch.from_numpy(np.array(states[i])) @ model.base_output.T).softmax(-1)
                keep = k < len(kinds) - 1
                (out[i, k],) = torch.autograd.grad(logits, x, gradient[None], retain_graph=keep)
                pair = gradient / model.family.logit_divisor, hidden.detach()[0]
                if model.family.tied:
                    factors.append(pair)
                else:
                    part = model.family.by_name["output.weight"]
                    project.add(part, (pair[0].T @ pair[1]).reshape(-1), drawn=drawn)
        return out, factors

    def _block(
        self, layer: int, entering: Tensor, flowing: Tensor, kinds: Sequence[bool], project: Projection
    ) -> Tensor:
        """Projects a block's gradients; returns those at its input."""
        import torch

        shell = self.model.shell
        out = torch.empty_like(flowing)
        for some in _groups([p for p in shell.parts(layer) if p.tensor.quantizable]):
            parameters = {p.path: shell.parameter(p) for p in some}
            try:
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
                for i in range(len(entering)):
                    x = entering[i : i + 1].clone().requires_grad_(True)
                    y = self.model.run(x, layer, layer + 1)
                    for k, drawn in enumerate(kinds):
                        out[i, k], *found = torch.autograd.grad(
                            y, [x, *parameters.values()], flowing[i, k][None],
                            retain_graph=k < len(kinds) - 1,
                        )  # fmt: skip
                        by_path = dict(zip(parameters, found, strict=True))
                        for p in some:
                            views = p.views(by_path[p.path])
                            project.add(p, torch.cat([v.reshape(-1) for v in views]), drawn=drawn)
            finally:
                for parameter in parameters.values():
                    parameter.requires_grad_(False)
            project.flush()
        return out

    def _embedding(
        self,
        windows: Tensor,
        flowing: Tensor,
        kinds: Sequence[bool],
        factors: list[tuple[Tensor, Tensor]],
        project: Projection,
    ) -> None:
        """Projects the embedding's gradients, with those of its use as the output matrix."""
        import torch

        part = self.model.family.by_name["token_embd.weight"]
        table = self.model.shell.parameter(part)
        try:
            table.requires_grad_(True)
            for i in range(len(windows)):
                x = self.model.embed(windows[i : i + 1])  # some families scale what they look up
                for k, drawn in enumerate(kinds):
                    keep = k < len(kinds) - 1
                    (found,) = torch.autograd.grad(x, table, flowing[i, k][None], retain_graph=keep)
                    if factors:
                        of_logits, states = factors[i * len(kinds) + k]
                        found = found + of_logits.T @ states
                    project.add(part, found.reshape(-1), drawn=drawn)
        finally:
            table.requires_grad_(False)


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts whose gradients are taken together; those of one parameter stay together."""
    groups: list[list[Part]] = [[]]
    size = 0
    for part in sorted(parts, key=lambda p: p.path):
        weights = int(np.prod(part.tensor.shape))
        same = bool(groups[-1]) and groups[-1][-1].path == part.path
        if groups[-1] and size + weights > _TOGETHER and not same:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += weights
    return groups
