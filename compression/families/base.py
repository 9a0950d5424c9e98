"""What all families share: from a transformers config to parts, metadata and an inventory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from compression.families.parts import Block, Part
from spaces.errors import MALFORMED, UserError
from spaces.gguf_layout import Value
from spaces.inventory import Inventory, estimated_tokenizer_bytes

_LARGEST = 3.4e38  # of float32
_MOST_WEIGHTS = 2**50  # a thousand times what there is, and no offset of a file overflows


def u32(value: int) -> Value:
    if not 0 <= value < 2**32:
        raise UserError(f"config.json: {value!r} is no number that a GGUF's 32 bits can hold")
    return Value("u32", int(value))


def f32(value: float) -> Value:
    if not abs(value) <= _LARGEST:
        raise UserError(f"config.json: {value!r} is no number that a GGUF's float32 can hold")
    return Value("f32", float(value))


def boolean(value: bool) -> Value:
    return Value("bool", bool(value))


def shortest(value: float) -> float:
    """The number with the fewest digits that a file's float32 `value` can have been written from."""
    return float(str(np.float32(value)))


class Family:
    """One model of a family. A subclass says what is its own and is registered in `families`.

    Attributes:
        model_type: Hugging Face's name of the family.
        architecture: llama.cpp's name of the graph that runs it.
        router, experts: Modules of a layer: what ranks the experts, and the experts.
        counts: Attributes of the router and the experts that count experts.
        expert_field: The config's field that counts routed experts.
        scoring: How router logits become scores: softmax or sigmoid.
        least_per_group: Experts of a group (of all, without groups) that the router must find.
        renormalises: Whether llama.cpp's graph divides the weights of the chosen experts by their sum:
            True, False, or None where it reads `expert_weights_norm`.
        ties: Whether llama.cpp's graph takes the token embedding where there is no output matrix.
        config: The transformers config, with every default filled in.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    router: ClassVar[str] = "mlp.gate"
    experts: ClassVar[str] = "mlp.experts"
    counts: ClassVar[tuple[str, ...]] = ("num_experts",)
    expert_field: ClassVar[str] = "num_experts"
    scoring: ClassVar[str] = "softmax"
    least_per_group: ClassVar[int] = 1
    renormalises: ClassVar[bool | None] = None
    ties: ClassVar[bool] = True

    def __init__(self, config: Any, name: str) -> None:
        self.config, self.name = config, name

    # What a family says of itself.

    def block(self, block: Block) -> None:
        """Writes down the parts of `block.layer`, in file order."""
        raise NotImplementedError

    def hyperparameters(self) -> dict[str, Value]:
        """Metadata beyond `common`, without the architecture's prefix."""
        return {}

    def inexpressible(self) -> Iterator[str]:
        """What the GGUF architecture would compute differently, without an error."""
        return iter(())

    def approximations(self) -> Iterator[str]:
        """What llama.cpp computes a little differently in every GGUF of such a model: said, not refused."""
        return iter(())

    @classmethod
    def reads(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a GGUF of this architecture is of this family; arguments as of `config_of`."""
        return bool(metadata.get("expert_count"))

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """config.json's fields of the model that a GGUF holds.

        Args:
            metadata: Plain values; the architecture's prefix is cut off its keys.
            shapes: Shapes of the tensors by name, the row last.

        Raises:
            KeyError: An entry or a tensor is missing.
        """
        layers = int(metadata["block_count"]) - int(metadata.get("nextn_predict_layers", 0))
        return {
            "max_position_embeddings": int(metadata["context_length"]),
            "hidden_size": int(metadata["embedding_length"]),
            "num_hidden_layers": layers,
            "intermediate_size": int(metadata["feed_forward_length"]),
            "num_attention_heads": int(metadata["attention.head_count"]),
            "num_key_value_heads": int(metadata["attention.head_count_kv"]),
            "rms_norm_eps": shortest(metadata["attention.layer_norm_rms_epsilon"]),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shortest(metadata.get("rope.freq_base", 10000.0)),
            },
            "vocab_size": shapes["token_embd.weight"][0],
            cls.expert_field: int(metadata["expert_count"]),
            "num_experts_per_tok": int(metadata["expert_used_count"]),
            "tie_word_embeddings": "output.weight" not in shapes,
        }

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has routed experts."""
        return layer >= getattr(self.config, "first_k_dense_replace", 0)

    @property
    def expert_count(self) -> int:
        return int(getattr(self.config, self.expert_field))

    @property
    def expert_width(self) -> int:
        """Inner width of a routed expert."""
        return int(self.config.moe_intermediate_size)

    @property
    def groups(self) -> int:
        """Groups of group-limited routing, 1 without."""
        return 1

    @property
    def groups_used(self) -> int:
        """Groups of which a token's experts are."""
        return int(getattr(self.config, "topk_group", None) or 1)

    @property
    def logit_divisor(self) -> float:
        """What the output matrix' products are divided by."""
        return 1.0

    # What follows from it.

    @property
    def head_size(self) -> int:
        c = self.config
        return int(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)

    @property
    def kv_values(self) -> int:
        """Numbers the KV cache holds per token, all layers together."""
        return int(2 * self.config.num_key_value_heads * self.head_size * self.config.num_hidden_layers)

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the token embedding; llama.cpp then reads one tensor for both."""
        return bool(self.config.tie_word_embeddings)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Every tensor of the model, in file order."""
        c, outer = self.config, Block(None)
        embedding = ("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
        outer.add("token_embd", *embedding, input="lm_head" if self.tied else None)
        outer.norm("output_norm", "model.norm", c.hidden_size, plus=self.norm_plus)
        if not self.tied:
            outer.add("output", "lm_head.weight", c.vocab_size, c.hidden_size)
        parts = outer.parts
        for layer in range(c.num_hidden_layers):
            block = Block(layer)
            self.block(block)
            parts = parts + block.parts
        return tuple(parts)

    norm_plus: ClassVar[float] = 0.0

    @cached_property
    def by_name(self) -> dict[str, Part]:
        return {p.name: p for p in self.parts}

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a file of this model may hold such a tensor: a part, or one of layers that are left out."""
        layer = name.split(".")[1] if name.startswith("blk.") else ""
        if layer.isdigit() and int(layer) >= self.config.num_hidden_layers:
            return True
        part = self.by_name.get(name)
        # Leading axes of one, which llama.cpp does not tell from none, are in some converters' files.
        shorter = {tuple(shape[i:]) for i in range(len(shape)) if set(shape[:i]) <= {1}}
        return part is not None and part.tensor.shape in shorter

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.config.num_hidden_layers) if self.is_moe(i))

    def common(self) -> dict[str, Value]:
        """Metadata that every architecture reads."""
        c = self.config
        rope = c.rope_parameters
        return {
            "context_length": u32(c.max_position_embeddings),
            "embedding_length": u32(c.hidden_size),
            "block_count": u32(c.num_hidden_layers),
            "feed_forward_length": u32(c.intermediate_size),
            "attention.head_count": u32(c.num_attention_heads),
            "attention.head_count_kv": u32(c.num_key_value_heads),
            "attention.layer_norm_rms_epsilon": f32(c.rms_norm_eps),
            "rope.freq_base": f32(rope["rope_theta"]),
            "vocab_size": u32(c.vocab_size),
            "expert_count": u32(self.expert_count),
            "expert_used_count": u32(c.num_experts_per_tok),
        }

    def metadata(self) -> dict[str, Value]:
        """GGUF metadata but for the tokenizer."""
        general = {
            "general.architecture": Value("str", self.architecture),
            "general.type": Value("str", "model"),
            "general.name": Value("str", self.name),
            "general.quantization_version": u32(2),
        }
        values = self.common() | self.hyperparameters()
        return general | {f"{self.architecture}.{key}": value for key, value in values.items()}

    def refusals(self) -> list[str]:
        """Why no GGUF of this model would compute the same function; empty if one does."""
        c = self.config
        out = list(self.inexpressible())
        kind = c.rope_parameters.get("rope_type", "default")
        if kind not in self.rope_types:
            out.append(f"rope_type = {kind!r} ({self.architecture} of this project writes {self.rope_types})")
        if c.hidden_act not in ("silu", "swish"):
            out.append(f"hidden_act = {c.hidden_act!r} (llama.cpp's graph uses silu)")
        if self.tied and not self.ties:
            out.append(f"tie_word_embeddings = True (llama.cpp's {self.architecture} wants an output matrix)")
        renormalise = getattr(c, "norm_topk_prob", self.renormalises)
        if self.renormalises is not None and bool(renormalise) != self.renormalises:
            habit = "always" if self.renormalises else "never"
            out.append(
                f"norm_topk_prob = {renormalise} (llama.cpp's {self.architecture} {habit} renormalises)"
            )
        return out

    rope_types: ClassVar[tuple[str, ...]] = ("default",)

    def inventory(self) -> Inventory:
        """The model as the search sees it.

        Raises:
            UserError: Counts that no model can have.
        """
        try:
            self._check()
            found = self._inventory()
        except UserError:
            raise
        except (*MALFORMED, ZeroDivisionError) as error:
            raise UserError(f"{self.name}: config.json has a field of the wrong kind ({error})") from error
        if found.parameters() > _MOST_WEIGHTS:
            raise UserError(f"{self.name}: config.json asks for more than {_MOST_WEIGHTS:,} weights")
        return found

    def _inventory(self) -> Inventory:
        c = self.config
        return Inventory(
            name=self.name,
            model_type=self.model_type,
            metadata=self.metadata(),
            expert_count_key=f"{self.architecture}.expert_count",
            expert_used_key=f"{self.architecture}.expert_used_count",
            tensors=tuple(p.tensor for p in self.parts),
            layers=c.num_hidden_layers,
            moe_layers=self.moe_layers,
            experts=self.expert_count,
            top_k=c.num_experts_per_tok,
            groups=self.groups,
            kv_values=self.kv_values,
            vocabulary=c.vocab_size,
            hidden=c.hidden_size,
            heads=c.num_attention_heads,
            context=c.max_position_embeddings,
            tokenizer_bytes=estimated_tokenizer_bytes(c.vocab_size),
            least_per_group=self.least_per_group,
            groups_used=self.groups_used,
        )

    def _check(self) -> None:
        """Refuses values no model can have."""
        c = self.config
        fields = (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "intermediate_size",
        )  # fmt: skip
        counts = {f: getattr(c, f) for f in (*fields, *self.positive)}
        for field, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(
                    f"{self.name}: config.json: {field} must be a positive whole number, got {value!r}"
                )
        numbers = {"rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_parameters.get("rope_theta")}
        numbers |= {f: getattr(c, f) for f in ("routed_scaling_factor",) if hasattr(c, f)}
        for field, value in numbers.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise UserError(f"{self.name}: config.json: {field} must be a positive number, got {value!r}")
        experts, top_k, groups = self.expert_count, c.num_experts_per_tok, self.groups
        if not (isinstance(top_k, int) and 0 < top_k <= experts) or not self.moe_layers:
            raise UserError(
                f"{self.name}: config.json has no routed experts that a token could reach ({experts} "
                f"experts, {top_k} active, {len(self.moe_layers)} MoE layers)"
            )
        used = self.groups_used
        if groups < 1 or experts % groups or experts // groups < self.least_per_group or used > groups:
            raise UserError(
                f"{self.name}: config.json: {experts} routed experts cannot be routed in {groups} groups of "
                f"which {used} are used; groups must be even and hold {self.least_per_group} experts or more"
            )

    positive: ClassVar[tuple[str, ...]] = ()
