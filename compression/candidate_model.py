"""A model that can become any candidate, held in memory or streamed through it.

Weights are the bank's blocks, dequantized, so that what is scored is what is
exported. A pruned expert cannot be routed to, which gives the same output as its
absence and costs nothing to undo.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from compression import ggml
from compression.checkpoint import Checkpoint
from compression.families.parts import Part
from compression.overrides import Overrides
from compression.passage import BATCH, Passage
from compression.recent import Recent
from compression.setting import BlockSetting, Types
from compression.shell import Shell
from compression.stored_model import StoredModel
from compression.variant_bank import VariantBank
from spaces.candidate import Candidate
from spaces.inventory import Inventory

if TYPE_CHECKING:
    from torch import Tensor


class CandidateModel(StoredModel):
    """A transformers model with switches for experts, top-k and types.

    Args:
        checkpoint: The uncompressed model.
        inventory: Its tensors, with the tokenizer where files are to be written.
        bank: Quantized variants of its tensors.
        stream: Hold one decoder layer at a time, filled anew whenever it is run.
        cache: Bytes of dequantized weights to keep at hand.

    Attributes:
        model: The transformers model, in the state of the last `apply`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        inventory: Inventory,
        bank: VariantBank,
        stream: bool = False,
        cache: int = 0,
    ) -> None:
        super().__init__(checkpoint, inventory, bank)
        self.stream = stream
        self._recent: Recent[tuple[str, str | None], tuple[Tensor, ...]] = Recent(cache)
        self.shell = Shell(self.family)
        self.model = self.shell.model
        self.passage = Passage(self.shell)
        self._types: dict[str, str | None] = {}
        self._routing: dict[int, tuple[tuple[int, ...] | None, int]] = {}
        self._filled: set[int | None] = set()
        self._fill(None)
        if stream:
            for layer in range(inventory.layers):
                self._fill_on_use(layer)
        else:
            for layer in range(inventory.layers):
                self._fill(layer)

    def _fill_on_use(self, layer: int) -> None:
        """Lets the model's own forward pass stream too, as lm-eval calls it."""
        block = self.model.model.layers[layer]
        held = []

        def before(*_: Any) -> None:
            held.append(self.held(layer))
            held[-1].__enter__()

        def after(*_: Any) -> None:
            held.pop().__exit__(None, None, None)

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after, always_call=True)

    def _fill(self, layer: int | None) -> None:
        """Writes every part of a layer in its present type, and sets its router."""
        for part in self.shell.parts(layer):
            self._write(part)
        self._filled.add(layer)
        if layer is not None and self.family.is_moe(layer):
            self.shell.router(layer).keep(*self._routing.get(layer, (None, self.inventory.top_k)))

    def _write(self, part: Part) -> None:
        """Puts a part into the model in its present type, from the cache where it lies there."""
        key = (part.name, self._types.get(part.name))
        repaired = self.overrides is not None and part.name in {
            *self.overrides.blocks, *self.overrides.plain
        }  # fmt: skip
        known = None if repaired else self._recent.get(key)
        if known is not None:
            for target, values in zip(self.shell.views(part), known, strict=True):
                target.copy_(values)
            return
        self._write_anew(part)
        if part.tensor.quantizable and not self.stream and not repaired:
            views = self.shell.views(part)
            size = sum(v.numel() * v.element_size() for v in views)
            self._recent.put(key, lambda: tuple(v.clone() for v in views), size)

    def _write_anew(self, part: Part) -> None:
        type_name = self._types.get(part.name)
        if self.overrides is not None and part.name in self.overrides.plain:
            return self.shell.write(part, self.overrides.plain[part.name])
        if type_name is None:
            return self.shell.fill(part, self.weights)
        blocks = self.blocks(part.tensor, type_name)
        if not part.stacked:
            return self.shell.write(part, ggml.dequantize(blocks, type_name))
        for e in self._present(part):
            self.shell.write(part, ggml.dequantize(blocks[e], type_name), e)

    def _present(self, part: Part) -> Sequence[int]:
        """Experts whose weights have to be there: in a layer filled for one pass, the kept ones."""
        layer = part.tensor.layer
        kept = self._routing.get(-1 if layer is None else layer, (None, 0))[0]
        return kept if self.stream and kept is not None else range(part.tensor.shape[0])

    @contextmanager
    def held(self, layer: int) -> Iterator[None]:
        """Keeps a layer in memory for the length of the block."""
        if layer in self._filled:
            yield
            return
        try:
            self._fill(layer)
            yield
        finally:
            if self.stream:
                self._filled.discard(layer)
                self.shell.empty(layer)

    def set_type(self, name: str, type_name: str | None) -> None:
        """Gives a tensor its values in a type, or its original ones for None."""
        if self._types.get(name) == type_name:
            return
        self._types[name] = type_name
        part = self.family.by_name[name]
        if part.tensor.layer in self._filled:
            self._write(part)

    def restrict(self, layer: int, experts: tuple[int, ...] | None = None, top_k: int | None = None) -> None:
        """Keeps some experts of a layer and changes its top-k; None means as in the model."""
        if experts is not None and len(experts) == self.inventory.experts:
            experts = None
        before = self._routing.get(layer, (None, self.inventory.top_k))
        self._routing[layer] = (experts, top_k or self.inventory.top_k)
        if layer in self._filled and self._routing[layer] != before:
            if self.stream and experts != before[0]:  # experts left out so far hold nothing
                for part in self.shell.parts(layer):
                    if part.stacked:
                        self._write(part)
            self.shell.router(layer).keep(*self._routing[layer])

    def reset(self) -> None:
        """Back to the uncompressed model."""
        for tensor in self.inventory.quantizable:
            self.set_type(tensor.name, None)
        for layer in self.inventory.moe_layers:
            self.restrict(layer)

    def apply(self, candidate: Candidate) -> None:
        """Becomes `candidate`; only tensors whose type differs from the last one are written."""
        for m in candidate.layers:
            self.restrict(m.layer, m.experts, m.top_k)
        for name, type_name in candidate.types:
            self.set_type(name, type_name)

    def use(self, overrides: Overrides | None) -> None:
        """Takes repairs of the candidate the model is, or takes them back for None."""
        names = set[str]()
        for some in (self.overrides, overrides):
            if some is not None:
                names |= {*some.blocks, *some.plain}
        self.overrides = overrides
        self.rewrite(names)

    def rewrite(self, names: Iterable[str]) -> None:
        """Puts tensors into the model anew, whatever was done to its parameters since."""
        for name in sorted(names):
            part = self.family.by_name[name]
            layer = part.tensor.layer
            if layer not in self._filled:
                continue
            if layer is not None and part.tensor.per_expert and not part.stacked:
                # The router keeps its rows of all experts to itself: it is made anew of what is written.
                self.shell.forget_router(layer)
                self._write(part)
                self.shell.router(layer).keep(*self._routing.get(layer, (None, self.inventory.top_k)))
            else:
                self._write(part)

    def set_block(self, layer: int, setting: BlockSetting) -> None:
        """Sets one block; the others stay as they are."""
        if self.family.is_moe(layer):
            self.restrict(layer, setting.experts, setting.top_k)
        self.set_types(setting.types)

    def set_types(self, types: Types) -> None:
        """Gives several tensors their types."""
        for name, type_name in types:
            self.set_type(name, type_name)

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, length) token ids to the (batch, length, hidden) states entering the first block."""
        return self.passage.enter(tokens)

    def run(self, states: Tensor, first: int, last: int) -> Tensor:
        """Runs blocks `first` to `last` on (batch, length, hidden) states of whole windows."""
        for layer in range(first, last):
            with self.held(layer):
                states = self.passage.step(states, layer)
        return states

    def layer_states(self, tokens: Tensor) -> list[Tensor]:
        """States entering every block and leaving the last: layers + 1 of (batch, length, hidden)."""
        states = [self.embed(tokens)]
        for layer in range(self.inventory.layers):
            states.append(self.run(states[-1], layer, layer + 1))
        return states

    def hidden(self, tokens: Tensor) -> Tensor:
        """(batch, length) token ids to the (batch, length, hidden) input of the output matrix."""
        if self.stream:
            return self.norm(self.run(self.embed(tokens), 0, self.inventory.layers))
        import torch

        # A few windows at a time stay in the processor's cache.
        parts = tokens.split(BATCH)
        return torch.cat([self.norm(self.run(self.embed(t), 0, self.inventory.layers)) for t in parts])

    def norm(self, states: Tensor) -> Tensor:
        """The final normalisation."""
        normed: Tensor = self.model.model.norm(states)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) normed states to (..., vocabulary) logits."""
        logits: Tensor = self.model.lm_head(hidden)
        divisor = self.family.logit_divisor
        return logits if divisor == 1 else logits / divisor

    @cached_property
    def base_output(self) -> Tensor:
        """The uncompressed output matrix (vocabulary, hidden), its divisor applied."""
        import torch

        name = "token_embd.weight" if self.family.tied else "output.weight"
        matrix = torch.from_numpy(np.array(self.weights.read(self.family.by_name[name])))
        return matrix / self.family.logit_divisor
