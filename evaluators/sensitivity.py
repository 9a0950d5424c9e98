"""One-at-a-time damage: the KL of each option alone, from the first block it changes onward."""

from __future__ import annotations

from typing import Any

import numpy as np

from compression.candidate_model import CandidateModel
from evaluators.divergence import compare
from evaluators.texts import TextSet
from spaces.space import Space


class Sensitivity:
    """Measures options on a few windows, keeping the base model's states between blocks.

    An option in block l leaves the blocks before it untouched, so only the blocks
    from l on are run: half the cost on average.

    Args:
        model: A candidate model; left uncompressed after every measure.
        space: Names the options.
        text: Windows to measure on.
    """

    def __init__(self, model: CandidateModel, space: Space, text: TextSet) -> None:
        import torch

        self.model, self.space, self.text = model, space, text
        model.reset()
        with torch.inference_mode():
            self.tokens = torch.from_numpy(text.windows.astype(np.int64))
            self.states = model.layer_states(self.tokens)
            self.base = model.logits(model.norm(self.states[-1]))

    def kl(self, decision: str, choice: Any) -> float:
        """Mean KL of one option alone, nats."""
        import torch

        model, inventory = self.model, self.model.inventory
        layer: int | None
        if decision.endswith(".experts") or decision.endswith(".top_k"):
            layer = int(decision.split(".")[1])
            if decision.endswith(".top_k"):
                model.restrict(layer, None, int(choice))
            else:
                model.restrict(layer, self.space.experts(layer, choice[0], choice[1]))
        else:
            layer = inventory.by_name[decision].layer
            model.set_type(decision, choice)
        try:
            with torch.inference_mode():
                if layer is not None:
                    states = model.run(self.states[layer], layer, inventory.layers)
                elif decision == "output.weight":
                    states = self.states[-1]
                else:
                    states = model.layer_states(self.tokens)[-1]
                kl, _, _ = compare(self.base, model.logits(model.norm(states)), self.tokens)
                return float(kl.double().mean())
        finally:
            if decision in inventory.by_name:
                model.set_type(decision, None)
            else:
                model.restrict(layer if layer is not None else 0)
