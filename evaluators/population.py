"""Many candidates at once, block by block: what two of them have in common is computed once.

At every block each distinct pair of (states that enter, setting of the block) is
run once; candidates that share their first blocks share those states. Options
measured one at a time share everything before the block they change, and a model
larger than memory is read once for the whole population instead of once for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compression.candidate_model import CandidateModel
from compression.heap import trim
from compression.passage import BATCH
from compression.setting import Setting
from evaluators.divergence import Divergence, divergence, references
from evaluators.texts import TextSet

if TYPE_CHECKING:
    from torch import Tensor

_MEMORY = 2**30


@dataclass
class Work:
    """What evaluating cost.

    Attributes:
        tokens: Tokens of every candidate, as if each had been run alone.
        block_tokens: Tokens that went through a block.
        head_tokens: Tokens that went through the output matrix.
    """

    tokens: int = 0
    block_tokens: int = 0
    head_tokens: int = 0


class Population:
    """Scores settings of one model together.

    Args:
        model: The model; it is left in some setting.
        memory: Bytes that states may take; more candidates than fit are run on fewer windows at a time.

    Attributes:
        work: Running account of what was computed.
    """

    def __init__(self, model: CandidateModel, memory: int = _MEMORY) -> None:
        self.model, self.memory, self.work = model, memory, Work()

    def measure(self, settings: Sequence[Setting], text: TextSet, states: np.ndarray) -> list[Divergence]:
        """The divergence of each setting.

        Args:
            settings: What to score; equal ones are scored once.
            text: Windows to score on.
            states: (at least n, length, hidden) base states of the same windows.
        """
        import torch

        if not settings:
            return []
        distinct = list(dict.fromkeys(settings))
        length, hidden = text.windows.shape[1], self.model.inventory.hidden
        self.work.tokens += len(settings) * text.windows.size
        # While a block runs, both what enters it and what leaves it are held.
        window = 2 * 4 * length * hidden * len(distinct)
        step = max(BATCH, self.memory // window // BATCH * BATCH)
        parts: list[list[tuple[Tensor, ...]]] = [[] for _ in distinct]
        with torch.inference_mode():
            windows = torch.from_numpy(text.windows.astype(np.int64))
            for start in range(0, len(windows), step):
                some = slice(start, min(start + step, len(windows)))
                for i, rows in enumerate(self._some(distinct, windows[some], states[some])):
                    parts[i] += rows
        results = {s: divergence(p, text) for s, p in zip(distinct, parts, strict=True)}
        return [results[s] for s in settings]

    def _some(
        self, settings: Sequence[Setting], windows: Tensor, states: np.ndarray
    ) -> list[list[tuple[Tensor, ...]]]:
        """Measures of every setting on some windows."""
        final, owner = self._through_blocks(settings, windows)
        groups: dict[tuple[int, tuple[tuple[str, str | None], ...]], list[int]] = {}
        for i, setting in enumerate(settings):
            groups.setdefault((owner[i], setting.exit), []).append(i)
        out: list[list[tuple[Tensor, ...]]] = [[] for _ in settings]
        normed = {state: self.model.norm(x) for state, x in final.items()}
        ordered = sorted(groups, key=lambda g: (tuple(t or "" for _, t in g[1]), g[0]))
        for part, base in references(self.model, windows, states):
            for state, leave in ordered:
                self.model.set_types(leave)
                found = base.compare(self.model.logits(normed[state][part]))
                for i in groups[state, leave]:
                    out[i].append(found)
            trim()
        self.work.head_tokens += len(groups) * windows.numel()
        return out

    def _through_blocks(
        self, settings: Sequence[Setting], windows: Tensor
    ) -> tuple[dict[int, Tensor], list[int]]:
        """States leaving the last block by number, and the number of each setting's."""
        states: dict[int, Tensor] = {}
        numbers: dict[object, int] = {}
        owner = []
        for setting in settings:
            if setting.entry not in numbers:
                numbers[setting.entry] = len(numbers)
                self.model.set_types(setting.entry)
                states[numbers[setting.entry]] = self.model.embed(windows)
            owner.append(numbers[setting.entry])
        for layer in range(self.model.inventory.layers):
            states, owner = self._block(layer, settings, states, owner)
            self.work.block_tokens += len(states) * windows.numel()
        return states, owner

    def _block(
        self, layer: int, settings: Sequence[Setting], states: dict[int, Tensor], owner: list[int]
    ) -> tuple[dict[int, Tensor], list[int]]:
        """One block on every distinct pair of states and setting."""
        pairs = [(s.blocks[layer], n) for s, n in zip(settings, owner, strict=True)]
        waiting = {n: len({p for p in pairs if p[1] == n}) for n in states}
        numbers: dict[object, int] = {}
        after: dict[int, Tensor] = {}
        order = sorted(set(pairs), key=lambda p: (p[0].order, p[1]))
        self.model.set_block(layer, order[0][0])
        with self.model.held(layer):
            for block, n in order:
                self.model.set_block(layer, block)
                numbers[block, n] = len(numbers)
                after[numbers[block, n]] = self.model.run(states[n], layer, layer + 1)
                waiting[n] -= 1
                if not waiting[n]:
                    del states[n]
        trim()
        return after, [numbers[p] for p in pairs]
