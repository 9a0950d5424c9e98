"""lm-eval's transformers model, but a context is computed once for all its continuations.

All in one forward pass under a mask: a KV cache filled by contexts and then taken over by
their continuations was slower than lm-eval's own pass per request on the reference model.
`python -m experiments.benchmarks.task_time` measures both ways that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from evaluators.shared_prefix import Pack, pack, share, unique_rows

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 1024
"""Tokens of a forward pass."""


class PrefixLM(HFLM):
    """Scores as `HFLM` does, to float noise, and generates as it does.

    Where a layer's state is not attention (linear attention), it scores request by request.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, tokens: int = TOKENS) -> None:
        """Wraps a model.

        Args:
            model: A transformers causal language model; put into evaluation mode.
            tokenizer: Its tokenizer.
            max_length: Tokens it sees.
            tokens: Tokens of a forward pass, about.
        """
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=max_length,
            batch_size=16,
            softmax_dtype="float32",  # sums of bf16 log-probabilities would tie
        )
        self._tokens = tokens

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if "linear_attention" in (getattr(self.config, "layer_types", None) or ()):
            scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return scores
        items, places = share([(context, after) for _, context, after in requests], self.max_length)
        found: dict[tuple[int, int], tuple[float, bool]] = {}
        packs = pack(items)
        while packs:
            count = max(1, self._tokens // len(packs[0].tokens))  # the first is the longest
            found |= self._pass(packs[:count])
            packs = packs[count:]
        return [found[place] for place in places]

    @torch.inference_mode()
    def _pass(self, packs: Sequence[Pack]) -> dict[tuple[int, int], tuple[float, bool]]:
        """Scores of some packs, in one forward pass."""
        width = max(len(p.tokens) for p in packs)
        tokens = torch.zeros(len(packs), width, dtype=torch.long)
        positions = torch.zeros_like(tokens)
        # Padding attends to itself, since a row without anything to attend to gives no number.
        seen = torch.eye(width, dtype=torch.bool).repeat(len(packs), 1, 1)
        for i, p in enumerate(packs):
            n = len(p.tokens)
            tokens[i, :n], positions[i, :n] = torch.from_numpy(p.tokens), torch.from_numpy(p.positions)
            seen[i, :n, :n] = torch.from_numpy(p.attends())
        rows, index, targets = (torch.from_numpy(x).to(self.device) for x in unique_rows(packs, width))

        def select(_: Any, states: tuple[Tensor]) -> tuple[Tensor]:
            return (states[0].flatten(0, 1)[rows],)

        # Logits of what is not scored would take more memory than all else.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            logits = self.model(
                tokens.to(self.device),
                attention_mask=self._mask(seen, positions),
                position_ids=positions.to(self.device),
                use_cache=False,
            ).logits.float()
        finally:
            hook.remove()
        log_probs = (logits[index, targets] - logits.logsumexp(-1)[index]).double().cpu().numpy()
        likeliest = (logits.argmax(-1)[index] == targets).cpu().numpy()
        out: dict[tuple[int, int], tuple[float, bool]] = {}
        for p, x, y in zip(packs, *(np.split(v, _ends(packs)) for v in (log_probs, likeliest)), strict=True):
            out |= p.sums(x, y)
        return out

    def _mask(self, seen: Tensor, positions: Tensor) -> Any:
        """What a model takes as mask: of (batch, 1, length, length), or one for each kind of layer."""
        kinds = getattr(self.config, "layer_types", None) or ()
        window = getattr(self.config, "sliding_window", None)
        near = seen
        if window:
            near = seen & (positions[:, :, None] - positions[:, None] < window)
        full, sliding = (self._additive(x) for x in (seen, near))
        if "sliding_attention" in kinds:
            return {"full_attention": full, "sliding_attention": sliding}
        return full if kinds else sliding

    def _additive(self, seen: Tensor) -> Tensor:
        lowest = torch.finfo(self.model.dtype).min
        mask = torch.zeros(seen.shape, dtype=self.model.dtype).masked_fill_(~seen, lowest)
        return mask[:, None].to(self.device)


def _ends(packs: Sequence[Pack]) -> np.ndarray:
    """Where the scored tokens of each pack but the last end."""
    return np.cumsum([len(p.rows) for p in packs])[:-1]
