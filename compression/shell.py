"""A transformers model without weights, and the way from GGUF's tensors into it.

The model is made on the meta device, so that it takes no memory; blocks are given
memory when they are filled and can be emptied again, which is how a model larger
than memory is run.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from compression.families.base import Family
from compression.families.parts import Part
from compression.router import Router
from compression.weights import Weights
from spaces.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Shell:
    """The model of a family, empty.

    Attributes:
        model: The transformers model, in float32.
        routers: The router of every MoE layer, once filled.
    """

    def __init__(self, family: Family) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.family = family
        config = copy.deepcopy(family.config)
        try:
            with torch.device("meta"):
                model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:  # models raise many kinds on configs that do not fit together
            raise UserError(
                f"{family.name}: transformers cannot make a model of config.json ({str(error)[:200]})"
            ) from error
        self.model = model.eval().requires_grad_(False)
        self.body = model.model
        # Frequencies are computed, not stored, so that the one buffer is made anew off the meta device.
        self.body.rotary_emb = type(self.body.rotary_emb)(config=config)
        self.routers: dict[int, Router] = {}
        self._parts: dict[int | None, list[Part]] = {}
        for part in family.parts:
            self._parts.setdefault(part.tensor.layer, []).append(part)
        self._check_places()

    def _check_places(self) -> None:
        """Every parameter has a part, and every part a parameter."""
        there = set(self.model.state_dict())
        if self.family.tied:
            there.discard("lm_head.weight")
        named = {p.path for p in self.family.parts}
        odd = sorted(there ^ named)
        if odd:
            verb = "does not place" if odd[0] in there else "places, but the model lacks,"
            raise UserError(
                f"{self.family.name}: the family {self.family.model_type} {verb} {len(odd)} tensors, "
                f"{odd[0]} first; config.json sets an option that it does not cover"
            )

    def _owner(self, part: Part) -> tuple[nn.Module, str]:
        module, _, leaf = part.path.rpartition(".")
        return self.model.get_submodule(module), leaf

    def parameter(self, part: Part) -> Tensor:
        """The parameter or buffer that holds a part."""
        owner, leaf = self._owner(part)
        found: Tensor = getattr(owner, leaf)
        return found

    def _put(self, part: Part, value: Tensor) -> None:
        import torch

        owner, leaf = self._owner(part)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
        if part.name == "token_embd.weight" and self.family.tied:
            self.model.lm_head.weight = self.model.model.embed_tokens.weight

    def views(self, part: Part, expert: int | None = None) -> tuple[Tensor, ...]:
        """The weights that GGUF calls `part.name`, in GGUF's order, writable in place: see `Part.views`."""
        parameter = self.parameter(part).data
        return part.views(parameter if expert is None else parameter[expert : expert + 1])

    def write(self, part: Part, values: np.ndarray, expert: int | None = None) -> None:
        """Puts GGUF's values of a part, or of one of its experts, into the model; makes room if needed."""
        self.place(part, part.decode(values), expert)

    def _room(self, part: Part) -> None:
        """Gives an empty part memory."""
        import torch

        if self.parameter(part).is_meta:
            self._put(part, torch.empty(self.parameter(part).shape, dtype=torch.float32))

    def place(self, part: Part, values: np.ndarray, expert: int | None = None) -> None:
        """As `write`, of the values that the parameter itself holds."""
        import torch

        self._room(part)
        ours = values if values.flags.writeable else np.array(values)  # torch takes no read-only memory
        source = torch.from_numpy(np.ascontiguousarray(ours, np.float32)).flatten()
        done = 0
        # A thread has an inference mode of its own, and memory made in one is only written in one.
        with torch.inference_mode():
            for target in self.views(part, expert):
                target.copy_(source[done : done + target.numel()].reshape(target.shape))
                done += target.numel()
        if done != source.numel():
            raise RuntimeError(f"{part.name}: {source.numel()} values for {done} places")

    def fill(self, part: Part, weights: Weights) -> None:
        """Writes a part as it lies in the checkpoint, an expert at a time on every thread of torch."""
        import torch

        if part.stacked:
            self._room(part)
            # Reading and converting numbers releases the interpreter's lock.
            with ThreadPoolExecutor(torch.get_num_threads()) as threads:
                done = threads.map(
                    lambda e: self.place(part, weights.parameter(part, e), e), range(part.tensor.shape[0])
                )
                deque(done, maxlen=0)
        else:
            self.place(part, weights.parameter(part))

    def parts(self, layer: int | None) -> Sequence[Part]:
        """The parts of a layer; None: those outside."""
        return self._parts.get(layer, ())

    def empty(self, layer: int) -> None:
        """Gives the memory of a layer back."""
        import torch

        self.forget_router(layer)
        for part in self.parts(layer):
            self._put(part, torch.empty_like(self.parameter(part), device="meta"))

    def forget_router(self, layer: int) -> None:
        """Gives a layer's router its rows of all experts back, and leaves it to itself."""
        if layer in self.routers:
            router = self.routers.pop(layer)
            router.keep(None, router.top_k)  # else the room of the experts left out would be lost
            router.close()

    def router(self, layer: int) -> Router:
        """The router of a filled MoE layer."""
        if layer not in self.routers:
            f = self.family
            module = self.body.layers[layer].get_submodule(f.router)
            below = f"model.layers.{layer}.{f.router}."
            axes = {
                p.path.removeprefix(below): p.axis
                for p in self.parts(layer)
                if p.tensor.per_expert and p.path.startswith(below)
            }
            self.routers[layer] = Router(module, axes, f.counts)
        return self.routers[layer]

    def expert_module(self, layer: int) -> Any:
        """The experts of a layer."""
        return self.body.layers[layer].get_submodule(self.family.experts)

    def shrink(self, layer: int, count: int, top_k: int) -> None:
        """Resizes an empty layer to `count` experts for good."""
        import torch

        for part in self.parts(layer):
            if part.tensor.per_expert:
                shape = list(self.parameter(part).shape)
                shape[part.axis] = count
                self._put(part, torch.empty(shape, device="meta"))
        router = self.body.layers[layer].get_submodule(self.family.router)
        for module in (router, self.expert_module(layer)):
            for name in self.family.counts:
                if hasattr(module, name):
                    setattr(module, name, count)
        router.top_k = top_k
