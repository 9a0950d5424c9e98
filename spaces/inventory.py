"""The tensors of a model and what they cost, from its `config.json` alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from spaces.errors import MALFORMED, UserError
from spaces.gguf_layout import TensorInfo, Value, file_size, padded
from spaces.json_text import read_text
from spaces.plan import Plan
from spaces.quant_types import quant_type

# A GGUF vocabulary takes some 30 to 45 bytes a token: text, merge, type and their lengths.
_VOCABULARY_BYTES_PER_TOKEN = 48


@dataclass(frozen=True)
class Tensor:
    """One tensor as GGUF names and lays it out.

    Attributes:
        name: GGUF name, with `.weight` or `.bias`.
        shape: Axes in numpy order; the last is the row that types pack.
        role: The name without block number and suffix (`ffn_gate_exps`).
        layer: Block number, None outside the blocks.
        per_expert: The first axis counts routed experts.
        quantizable: The search may choose its type; otherwise it stays as it is.
        fixed_type: GGUF type of a tensor that is not quantizable.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None
    per_expert: bool = False
    quantizable: bool = True
    fixed_type: str = "F32"

    @property
    def row(self) -> int:
        return self.shape[-1]

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    def kept_shape(self, experts: int | None) -> tuple[int, ...]:
        """The shape when `experts` of the routed experts stay."""
        return (experts, *self.shape[1:]) if self.per_expert and experts is not None else self.shape

    def bytes(self, type_name: str, experts: int | None = None) -> int:
        """Bytes of the data in type `type_name` with `experts` experts kept."""
        shape = self.kept_shape(experts)
        return math.prod(shape[:-1]) * quant_type(type_name).row_bytes(shape[-1])


@dataclass(frozen=True)
class Inventory:
    """A model as the search sees it.

    Attributes:
        name: What a person calls it.
        model_type: Hugging Face's family name.
        metadata: GGUF metadata but for the tokenizer, for the unpruned model.
        expert_count_key, expert_used_key: The two entries pruning changes.
        tensors: In file order.
        layers: Blocks in all.
        moe_layers: Blocks with routed experts.
        experts, top_k: Routed experts of such a block, and those active per token.
        groups: Expert groups of group-limited routing, 1 where there are none.
        kv_values: Numbers the KV cache holds per token, all layers together.
        vocabulary, hidden, heads: As in the config.
        context: Longest context the model was made for.
        tokenizer_bytes: Bytes of the tokenizer's metadata; estimated until known.
        least_per_group: Experts that must stay in a group (in all, without groups).
        groups_used: Groups a token may choose its experts from.
    """

    name: str
    model_type: str
    metadata: Mapping[str, Value]
    expert_count_key: str
    expert_used_key: str
    tensors: tuple[Tensor, ...]
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    groups: int
    kv_values: int
    vocabulary: int
    hidden: int
    heads: int
    context: int
    tokenizer_bytes: int
    least_per_group: int = 1
    groups_used: int = 1

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        return {t.name: t for t in self.tensors}

    @cached_property
    def quantizable(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t.quantizable)

    def parameters(self, kept: int | None = None) -> int:
        """Weights in all, or with `kept` experts in every MoE layer."""
        return sum(math.prod(t.kept_shape(kept)) for t in self.tensors)

    def uniform_plan(self, type_name: str, kept: int | None = None, top_k: int | None = None) -> Plan:
        """Every quantizable tensor in `type_name`, or in what llama-quantize falls back to."""
        from spaces.quant_types import fitting

        return Plan(
            kept=tuple((i, kept or self.experts) for i in self.moe_layers),
            top_k=tuple((i, top_k or self.top_k) for i in self.moe_layers),
            types=tuple((t.name, fitting(type_name, t.row)) for t in self.quantizable),
        )

    def infos(self, plan: Plan) -> list[TensorInfo]:
        """The tensors of the compressed file, in order."""
        types, kept = dict(plan.types), dict(plan.kept)
        infos = []
        for t in self.tensors:
            type_name = types[t.name] if t.quantizable else t.fixed_type
            experts = None if t.layer is None else kept.get(t.layer)
            shape = t.kept_shape(experts)
            infos.append(TensorInfo(t.name, shape, quant_type(type_name).id, t.bytes(type_name, experts)))
        return infos

    def plan_metadata(self, plan: Plan) -> dict[str, Value]:
        """Metadata of the compressed file; a ragged plan's counts become arrays."""
        out = dict(self.metadata)
        for key, pairs in ((self.expert_count_key, plan.kept), (self.expert_used_key, plan.top_k)):
            values = dict(pairs)
            if len(set(values.values())) == 1:
                out[key] = Value("u32", next(iter(values.values())))
            else:
                out[key] = Value("u32", tuple(values.get(i, 0) for i in range(self.layers)))
        return out

    def file_bytes(self, plan: Plan) -> int:
        """Size of the model's file: exact once `tokenizer_bytes` is, to within it before."""
        data = file_size(self.plan_metadata(plan), self.infos(plan))
        return padded(data + self.tokenizer_bytes)

    def kv_cache_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Bytes of the KV cache for `context` tokens (MLA keeps the latent and the rotary key)."""
        return self.kv_values * context * bytes_per_value

    def compute_buffer_bytes(self, context: int, batch: int = 512) -> int:
        """Activations of one micro-batch in float32: logits, hidden states, attention scores."""
        return 4 * batch * (self.vocabulary + 8 * self.hidden + self.heads * context)


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder.

    Raises:
        UserError: The folder or file is missing or is not a JSON object.
    """
    try:
        there, file = path.exists(), path / "config.json" if path.is_dir() else path
        if there and file.exists() and not file.is_file():  # a pipe would be waited for
            raise UserError(f"{file}: is no file; give a folder that holds config.json")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path!s:.200}: cannot be a model folder ({error})") from error
    if not there:
        raise UserError(f"{path}: no such model folder; give a folder that holds config.json")
    try:
        config = json.loads(read_text(file))
    except MALFORMED as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); is this a model folder?") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: must hold a JSON object, got {type(config).__name__}")
    return config


def published_targets() -> list[str]:
    """Names `--target` knows without a folder."""
    return sorted(
        f.name.removesuffix(".json") for f in resources.files("spaces").joinpath("configs").iterdir()
        if f.name.endswith(".json")
    )  # fmt: skip


def estimated_tokenizer_bytes(vocabulary: int) -> int:
    """Bytes to allow for a vocabulary that is not at hand."""
    return vocabulary * _VOCABULARY_BYTES_PER_TOKEN
