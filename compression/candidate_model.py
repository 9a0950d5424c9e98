"""A model in memory that can become any candidate.

Weights are the bank's blocks, dequantized, so that what is scored is what is
exported. A pruned expert stays in memory but cannot be routed to, which gives
the same output as its absence and costs nothing to undo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from compression import ggml
from compression.families import Family
from compression.variant_bank import VariantBank
from spaces.candidate import Candidate
from spaces.inventory import Inventory

if TYPE_CHECKING:
    from torch import Tensor


class CandidateModel:
    """A transformers model with switches for experts, top-k and types.

    Attributes:
        model: The transformers model, in the state of the last `apply`.
    """

    def __init__(self, model: Any, inventory: Inventory, family: Family, bank: VariantBank) -> None:
        self.model, self.inventory, self.family, self.bank = model, inventory, family, bank
        self._types: dict[str, str | None] = {t.name: None for t in inventory.quantizable}
        self._original = {
            t.name: family.view(model, t.name).clone() for t in inventory.quantizable
        }  # fmt: skip

    def weights(self, name: str) -> np.ndarray:
        """The uncompressed weights of a tensor, float32, in GGUF's shape."""
        return np.ascontiguousarray(self._original[name].numpy())

    def plain(self, name: str) -> np.ndarray:
        """A tensor that is never quantized (norms, router, selection bias), float32."""
        if name.endswith("exp_probs_b.bias"):
            layer = self.inventory.by_name[name].layer
            router = self.family.moe(self.model, layer if layer is not None else 0).gate
            # `restrict` blanks the live bias of pruned experts; the file takes the model's own.
            return np.asarray(getattr(router, "full_bias", router.e_score_correction_bias))
        return np.ascontiguousarray(self.family.view(self.model, name).numpy())

    def set_type(self, name: str, type_name: str | None) -> None:
        """Gives a tensor its values in a type, or its original ones for None."""
        import torch

        if self._types[name] == type_name:
            return
        view = self.family.view(self.model, name)
        if type_name is None:
            view.copy_(self._original[name])
        else:
            tensor = self.inventory.by_name[name]
            values = ggml.dequantize(self.bank.blocks(tensor, type_name), type_name)
            view.copy_(torch.from_numpy(values))
        self._types[name] = type_name

    def restrict(self, layer: int, experts: tuple[int, ...] | None = None, top_k: int | None = None) -> None:
        """Keeps some experts of a layer and changes its top-k; None means as in the model."""
        self.family.restrict(
            self.model,
            layer,
            experts if experts is not None else range(self.inventory.experts),
            top_k or self.inventory.top_k,
        )

    def reset(self) -> None:
        """Back to the uncompressed model."""
        for tensor in self.inventory.quantizable:
            self.set_type(tensor.name, None)
        for layer in self.inventory.moe_layers:
            self.restrict(layer)

    def apply(self, candidate: Candidate) -> None:
        """Becomes `candidate`; only tensors whose type differs from the last one are written."""
        for name, type_name in candidate.types:
            self.set_type(name, type_name)
        for m in candidate.layers:
            self.restrict(m.layer, m.experts, m.top_k)

    def layer_states(self, tokens: Tensor) -> list[Tensor]:
        """States entering every block and leaving the last: layers + 1 of (batch, length, hidden)."""
        states = [self.model.model.embed_tokens(tokens)]
        for layer in range(self.inventory.layers):
            states.append(self.run(states[-1], layer, layer + 1))
        return states

    def run(self, states: Tensor, first: int, last: int) -> Tensor:
        """Runs blocks `first` to `last` on (batch, length, hidden) states of whole windows."""
        import torch

        body = self.model.model
        position = torch.arange(states.shape[1])[None]
        rotary = body.rotary_emb(states, position)
        for block in body.layers[first:last]:
            out = block(states, attention_mask=None, position_ids=position, position_embeddings=rotary)
            states = out[0] if isinstance(out, tuple) else out
        return states

    def hidden(self, tokens: Tensor) -> Tensor:
        """(batch, length) token ids to the (batch, length, hidden) input of the output matrix."""
        states = self.run(self.model.model.embed_tokens(tokens), 0, self.inventory.layers)
        return self.norm(states)

    def norm(self, states: Tensor) -> Tensor:
        """The final normalisation."""
        return self.model.model.norm(states)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) normed states to (..., vocabulary) logits."""
        return self.model.lm_head(hidden)

    @property
    def base_output(self) -> Tensor:
        """The uncompressed output matrix (vocabulary, hidden)."""
        return self._original["output.weight"]
