"""Running a model block by block, with what its own forward pass would hand to each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from compression.shell import Shell

BATCH = 8
"""Windows that a block computes at once."""


class Passage:
    """Masks, positions and rotations are the model's own: its forward pass is recorded once per length."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    def _record(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The states entering the first block, and the keyword arguments of every block."""
        import torch

        body = self.shell.body
        recorded: list[dict[str, Any]] = []
        first: list[Tensor] = []

        class Recorder(torch.nn.Module):
            def __init__(self, block: Any) -> None:
                super().__init__()
                object.__setattr__(self, "block", block)

            def __getattr__(self, name: str) -> Any:
                return getattr(object.__getattribute__(self, "block"), name)

            def forward(self, states: Tensor, *args: Any, **arguments: Any) -> Tensor:
                first.append(states)
                recorded.append(arguments)
                return states

        layers = body.layers
        body.layers = torch.nn.ModuleList([Recorder(block) for block in layers])
        try:
            body(tokens, use_cache=False)
        finally:
            body.layers = layers
        for arguments in recorded:
            arguments["past_key_values"] = None
        return first[0], recorded

    def enter(self, tokens: Tensor) -> Tensor:
        """(batch, length) token ids to the (batch, length, hidden) states entering the first block."""
        states, recorded = self._record(tokens)
        # Masks hold for any batch when they were made for one window, so those are kept.
        self._arguments[tokens.shape[1]] = recorded if len(tokens) == 1 else self._record(tokens[:1])[1]
        return states

    def step(self, states: Tensor, layer: int) -> Tensor:
        """One block on (batch, length, hidden) states of windows that `enter` has seen the length of."""
        import torch

        arguments = self._arguments[states.shape[1]][layer]
        block = self.shell.body.layers[layer]
        done = []
        for part in states.split(BATCH):
            out = block(part, **arguments)
            done.append(out[0] if isinstance(out, tuple) else out)
        return torch.cat(done)
