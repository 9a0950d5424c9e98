"""What a family is written in: the parts of a block, each with its GGUF name, shape and place.

A `Part` ties three names of one tensor together: GGUF's, the parameter's in the
transformers model, and those it may have on disk. A layout is a function from
the parameter to GGUF's order of it; it only slices, reshapes and swaps axes, so
that on a contiguous torch tensor it gives a writable view, and on a numpy array
read from disk the same values. Rows that no view can bring into order are given as
several views, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spaces.inventory import Tensor

Layout = Callable[[Any], Any]
"""Gives a view or a tuple of views; those of a tuple follow each other along the first axis."""


@dataclass(frozen=True)
class Code:
    """What GGUF's values are of the parameter's, where it is more than a shift.

    Attributes:
        to_gguf, from_gguf: Functions of float32 arrays, elementwise and inverse to each other.
    """

    to_gguf: Callable[[np.ndarray], np.ndarray]
    from_gguf: Callable[[np.ndarray], np.ndarray]


def whole(x: Any) -> Any:
    """The parameter as it is."""
    return x


def rotary(heads: int) -> Layout:
    """Rows of a query or key matrix, or its bias, in the order of llama.cpp's interleaved rotation.

    transformers rotates the first half of a head against the second; architectures with
    llama.cpp's NORM rotation pair neighbouring rows, so a head's halves are interleaved.
    """

    def layout(x: Any) -> Any:
        return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2)

    return layout


def half(first: bool) -> Layout:
    """The gate (first) or up half of stacked experts' (experts, 2 * width, hidden)."""

    def layout(x: Any) -> Any:
        middle = x.shape[1] // 2
        return x[:, :middle] if first else x[:, middle:]

    return layout


@dataclass(frozen=True)
class Part:
    """One tensor.

    Attributes:
        tensor: Its GGUF name, shape and flags.
        path: Its parameter or buffer in the transformers model, and its newest name on disk.
        layout: From the parameter (for stacked experts: from any slice of the first axis) to GGUF's
            order, but for the number of axes, which a reshape mends.
        plus: What GGUF's values are above the parameter's (norms stored around zero).
        aliases: Older names on disk, with the layout of `path`.
        each: Names on disk of one expert's matrix, {} for the expert, in GGUF's layout.
        input: Module whose input multiplies the rows; None takes the parameter's own module.
        output: (module, slice of a head's outputs) that multiplies the rows instead.
        axis: Axis of the parameter that counts experts, where the tensor is per expert.
        code: How GGUF's values follow from the parameter's, beyond `plus`.
    """

    tensor: Tensor
    path: str
    layout: Layout = whole
    plus: float = 0.0
    aliases: tuple[str, ...] = ()
    each: tuple[str, ...] = ()
    input: str | None = None
    output: tuple[str, slice] | None = None
    axis: int = 0
    code: Code | None = None

    def views(self, parameter: Any) -> tuple[Any, ...]:
        """A parameter, or any slice of stacked experts, in GGUF's order: one view or several."""
        laid = self.layout(parameter)
        return laid if isinstance(laid, tuple) else (laid,)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """GGUF's values of the parameter's."""
        if self.code is not None:
            return self.code.to_gguf(values)
        return values + np.float32(self.plus) if self.plus else values

    def decode(self, values: np.ndarray) -> np.ndarray:
        """The parameter's values of GGUF's."""
        if self.code is not None:
            return self.code.from_gguf(values)
        return values - np.float32(self.plus) if self.plus else values

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def module(self) -> str:
        """Path of the module that holds the parameter."""
        return self.path.rpartition(".")[0]

    @property
    def stacked(self) -> bool:
        """Expert matrices (or their biases): what one expert after the other is read and written."""
        return self.tensor.per_expert and "_exps" in self.tensor.role


@dataclass
class Block:
    """Writes down one decoder layer, part by part; paths are below the layer.

    Attributes:
        layer: Its number; None for what stands outside the layers.
        parts: So far.
    """

    layer: int | None
    parts: list[Part] = field(default_factory=list)

    def add(
        self,
        role: str,
        path: str,
        *shape: int,
        suffix: str = "weight",
        quantizable: bool | None = None,
        per_expert: bool = False,
        layout: Layout = whole,
        plus: float = 0.0,
        aliases: Sequence[str] = (),
        each: Sequence[str] = (),
        input: str | None = None,
        output: tuple[str, slice] | None = None,
        axis: int = 0,
        code: Code | None = None,
    ) -> None:
        """Adds a tensor; matrices may be quantized unless said otherwise, vectors never."""
        prefix = "" if self.layer is None else f"blk.{self.layer}."
        below = "" if self.layer is None else f"model.layers.{self.layer}."
        tensor = Tensor(
            f"{prefix}{role}{suffix and '.'}{suffix}", shape, role, self.layer, per_expert,
            quantizable=suffix == "weight" and len(shape) > 1 if quantizable is None else quantizable,
        )  # fmt: skip
        self.parts.append(
            Part(
                tensor, below + path, layout, plus,
                tuple(below + a for a in aliases), tuple(below + e for e in each),
                None if input is None else below + input,
                None if output is None else (below + output[0], output[1]),
                axis, code,
            )
        )  # fmt: skip

    def linear(
        self, role: str, path: str, rows: int, columns: int, *, bias: bool = False, **more: Any
    ) -> None:
        """A matrix of `rows` outputs and `columns` inputs, and its bias."""
        old = more.pop("aliases", ())
        self.add(role, f"{path}.weight", rows, columns, aliases=[f"{a}.weight" for a in old], **more)
        if bias:
            layout = more.get("layout", whole)
            self.add(
                role, f"{path}.bias", rows, suffix="bias", layout=layout, aliases=[f"{a}.bias" for a in old]
            )

    def norm(self, role: str, path: str, size: int, **more: Any) -> None:
        """A vector of scales."""
        self.add(role, f"{path}.weight", size, **more)

    def mlp(self, path: str, hidden: int, width: int, suffix: str = "", bias: bool = False) -> None:
        """A gated feed-forward network: gate, up and down; `suffix` is _shexp for shared experts."""
        self.linear(f"ffn_gate{suffix}", f"{path}.gate_proj", width, hidden, bias=bias)
        self.linear(f"ffn_up{suffix}", f"{path}.up_proj", width, hidden, bias=bias)
        self.linear(f"ffn_down{suffix}", f"{path}.down_proj", hidden, width, bias=bias)

    def router(self, path: str, experts: int, hidden: int, aliases: Sequence[str] = ()) -> None:
        """The router's matrix, which stays F32."""
        self.add(
            "ffn_gate_inp", f"{path}.weight", experts, hidden,
            quantizable=False, per_expert=True, aliases=[f"{a}.weight" for a in aliases],
        )  # fmt: skip

    def experts(
        self,
        path: str,
        count: int,
        hidden: int,
        width: int,
        each: Sequence[tuple[str, str, str]] = (),
        fused: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Stacked experts: in memory `gate_up_proj` (gate rows first) and `down_proj`.

        Args:
            path: Module of the experts.
            count: Experts.
            hidden: Columns of gate and up.
            width: Columns of down.
            each: More (gate, up, down) names of one expert's matrices on disk, {} for the expert.
            fused: More (gate_up, down) names of stacked matrices on disk.
        """
        names = [*(f"{path}.{{}}.{p}_proj.weight" for p in ("gate", "up", "down"))]
        every = [names, *each]
        for i, (role, shape, layout, parameter) in enumerate((
            ("ffn_gate_exps", (count, width, hidden), half(True), "gate_up_proj"),
            ("ffn_up_exps", (count, width, hidden), half(False), "gate_up_proj"),
            ("ffn_down_exps", (count, hidden, width), whole, "down_proj"),
        )):  # fmt: skip
            self.add(
                role, f"{path}.{parameter}", *shape, per_expert=True, layout=layout,
                aliases=[pair[i == 2] for pair in fused], each=[n[i] for n in every],
            )  # fmt: skip
