"""Any Mixture-of-Experts GGUF as an inventory, from its header alone; no code knows the model.

What llama.cpp's loaders agree on is enough: a layer's routed experts are stacked on the outermost
axis of tensors with fixed names (`llama-arch.cpp`), and `<arch>.expert_count` counts them.
"""

from __future__ import annotations

import re

from compression.gguf_file import GgufFile
from spaces.errors import UserError
from spaces.gguf_layout import Value
from spaces.gguf_reader import StoredTensor
from spaces.inventory import Inventory, Tensor
from spaces.quant_types import QUANT_TYPES, WEIGHT_TYPES

_NAME = re.compile(r"blk\.(?P<layer>[0-9]{1,6})\.(?P<rest>.+)", re.DOTALL)
_SUFFIX = re.compile(r"\.(weight|bias|scale|input_scale)$")
_STACK = re.compile(r"ffn_(gate|up|down|gate_up)_exps")
_ROUTER = frozenset({"ffn_gate_inp", "exp_probs_b", "exp_probs_b_vl"})
# Named like the others but of another shape: a norm of the input, and gemma4's scale of the router's input.
_NOT_PER_EXPERT = frozenset({"ffn_norm_exps.weight", "ffn_gate_inp.scale"})
_MOST_LAYERS = 4096  # llama.cpp takes 512
_OLD_EXPERT = re.compile(r"ffn_(gate|up|down)\.[0-9]+\.")

# Parts of the names that `tensor_allows_quantization` of llama-quant.cpp leaves alone.
_FIXED = re.compile(
    "|".join(
        re.escape(part)
        for part in (
            "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel",
            "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight",
            "indexer.q_proj.weight", "time_mix_first.weight", "time_mix_lerp_fused.weight",
            "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.",
        )
    )
    + r"|time_mix_(w[012]|v[012]|a[012]|g[12]|decay_w[12])\.weight|^(position_embd|token_types)\.weight$"
)  # fmt: skip
_FIXED_GLM5 = re.compile(
    r"hc_|indexer\.(attn_q_b|attn_k|proj)|indexer_compressor_(gate|ape)|ssm_([fg]_[ab]|beta)\.weight"
    r"|attn_(kv_a_mqa|k_b|v_b)\.weight"
)


def describe_gguf(file: GgufFile) -> Inventory:
    """The inventory of an opened model; its sizes are exact.

    The metadata is the file's but for three entries. `general.alignment` goes, as the layout here
    is the default one. `general.file_type` goes, as it names one mixture of `llama-quantize`, which
    tensors of freely chosen types are not; llama.cpp then names the most frequent type. And
    `<arch>.expert_feed_forward_length`, where missing and implied by the top-k, is written out, as
    several loaders would otherwise derive another width from another top-k.

    Raises:
        UserError: No Mixture-of-Experts model, or one whose layers differ in what pruning changes.
    """
    facts = _Facts(file)
    experts = facts.number("expert_count", default=0)
    if experts < 2:
        raise UserError(
            f"{file.path}: {facts.key('expert_count')} is {experts or 'missing or 0'}: not a "
            "Mixture-of-Experts model, so there are no experts to prune; use llama-quantize"
        )
    tensors = tuple(_tensor(file, t, experts) for t in file.tensors.values())
    stacks = [t for t in tensors if t.layer is not None and _STACK.fullmatch(t.role)]
    moe_layers = tuple(sorted({t.layer for t in stacks if t.layer is not None}))
    if not moe_layers:
        raise UserError(
            f"{file.path}: no stacked experts (blk.N.ffn_down_exps.weight); is the file complete?"
        )
    layers = facts.number("block_count")
    if layers > _MOST_LAYERS:
        raise UserError(f"{file.path}: {facts.key('block_count')} is {layers}; is the file damaged?")
    top_k = facts.uniform("expert_used_count", moe_layers)
    if not 1 <= top_k <= experts:
        raise UserError(
            f"{file.path}: {facts.key('expert_used_count')} must be within 1..{experts}, is {top_k}"
        )
    groups = facts.number("expert_group_count", default=1) or 1
    if experts % groups:
        raise UserError(f"{file.path}: {experts} experts do not divide into {groups} groups; is it damaged?")
    embedding = file.tensors.get("token_embd.weight")
    return Inventory(
        name=_title(file),
        model_type=file.architecture,
        metadata=_metadata(facts, stacks, top_k),
        expert_count_key=facts.key("expert_count"),
        expert_used_key=facts.key("expert_used_count"),
        tensors=tensors,
        layers=max(layers, moe_layers[-1] + 1),
        moe_layers=moe_layers,
        experts=experts,
        top_k=top_k,
        groups=groups,
        kv_values=_kv_values(facts, layers),
        vocabulary=embedding.shape[0] if embedding else facts.number("vocab_size"),
        hidden=facts.number("embedding_length"),
        heads=max(facts.per_layer("attention.head_count", layers, 0)),
        context=facts.number("context_length"),
        tokenizer_bytes=0,
        # llama.cpp ranks a group by its two best, and wants fewer groups than experts even where it is one.
        least_per_group=2 if facts.number("expert_group_count", default=0) else 1,
        groups_used=facts.number("expert_group_used_count", default=0) or groups,
    )


def unprunable(inventory: Inventory) -> str | None:
    """Why experts of this model cannot be taken out by slicing tensors, or None if they can."""
    roles = {t.role for t in inventory.tensors}
    if "ffn_gate_tid2eid" in roles:
        return "its first layers choose experts by a fixed table of their numbers (ffn_gate_tid2eid)"
    if any(r.endswith("_chexps") for r in roles):
        return "its experts share adjugate experts by number (ffn_*_chexps)"
    if (inventory.model_type, inventory.experts) == ("llama4", 128):
        return "llama.cpp tells by the 128 experts that this llama4 does not normalize its queries and keys"
    return None


class _Facts:
    """The model's hyperparameters by their names without the architecture."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.architecture = file, file.architecture

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def value(self, name: str) -> object:
        found = self.file.metadata.get(self.key(name))
        return None if found is None else found.value

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number; a default stands in for one that is not there."""
        value = self.value(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            got = "is missing" if value is None else f"is {str(value)[:40]}"
            raise UserError(
                f"{self.file.path}: {self.key(name)} must be a whole number, but {got}; "
                "convert the model again"
            )
        return value

    def per_layer(self, name: str, layers: int, default: int) -> list[int]:
        """A number that may differ by layer."""
        value = self.value(name)
        if isinstance(value, tuple):
            if value and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value):
                return list(value)
            raise UserError(
                f"{self.file.path}: {self.key(name)} must hold whole numbers, one per layer; "
                "convert the model again"
            )
        return [self.number(name, default)] * max(layers, 1)

    def uniform(self, name: str, layers: tuple[int, ...]) -> int:
        """A number that may be given per layer but must be the same in all of these."""
        value = self.value(name)
        if not isinstance(value, tuple):
            return self.number(name)
        numbers = self.per_layer(name, 0, 0)
        chosen = {numbers[i] for i in layers if i < len(numbers)}
        if len(chosen) != 1 or len(numbers) <= layers[-1]:
            raise UserError(
                f"{self.file.path}: {self.key(name)} differs by layer ({str(numbers)[:60]}), which moefit "
                "does not handle; use a model with one top-k"
            )
        return chosen.pop()


def _tensor(file: GgufFile, stored: StoredTensor, experts: int) -> Tensor:
    match = _NAME.fullmatch(stored.name)
    rest = match["rest"] if match else stored.name
    if match and _OLD_EXPERT.match(rest):
        raise UserError(
            f"{file.path}: {stored.name!r} is one expert's tensor, as files of 2023 have them; convert the "
            "model again with today's llama.cpp"
        )
    stem = rest.partition(".")[0]
    per_expert = bool(match) and rest not in _NOT_PER_EXPERT and (stem in _ROUTER or stem.endswith("_exps"))
    if per_expert and stored.shape[0] != experts:
        raise UserError(
            f"{file.path}: {stored.name!r} must have the {experts} experts of expert_count on its outermost "
            f"axis, its shape is {list(stored.shape)}; convert the model again"
        )
    if per_expert and len(stored.shape) == 1 and QUANT_TYPES[stored.type_name].block > 1:
        raise UserError(
            f"{file.path}: {stored.name!r} packs several experts in a block ({stored.type_name}); "
            "convert the model again"
        )
    return Tensor(
        name=stored.name,
        shape=stored.shape,
        role=_SUFFIX.sub("", rest),
        layer=int(match["layer"]) if match else None,
        per_expert=per_expert,
        quantizable=_quantizable(stored, file.architecture),
        fixed_type=stored.type_name,
    )


def _quantizable(stored: StoredTensor, architecture: str) -> bool:
    """Whether `llama-quantize` would choose a type for it."""
    name, shape = stored.name, stored.shape
    # ggml does not count axes of length 1 outside of the others.
    axes = next((len(shape) - i for i, n in enumerate(shape) if n > 1), 1)
    return (
        axes in (2, 3)
        and name.endswith("weight")
        and stored.type_name in WEIGHT_TYPES
        and not _FIXED.search(name)
        and not (architecture == "glm5-next" and _FIXED_GLM5.search(name))
    )


def _title(file: GgufFile) -> str:
    """The model's name, on one line and without anything a terminal would act on."""
    value = file.metadata.get("general.name")
    text = value.value if value is not None and isinstance(value.value, str) else ""
    return "".join(c for c in text if c.isprintable())[:100].strip() or file.path.stem


def _metadata(facts: _Facts, stacks: list[Tensor], top_k: int) -> dict[str, Value]:
    left_out = {"general.alignment", "general.file_type"}
    metadata = {k: v for k, v in facts.file.metadata.items() if k not in left_out}
    metadata["general.quantization_version"] = Value("u32", 2)  # of the blocks written today
    widths = {t.row for t in stacks if t.role == "ffn_down_exps" and t.name.endswith("weight")}
    dense, key = facts.value("feed_forward_length"), facts.key("expert_feed_forward_length")
    if key not in metadata and len(widths) == 1 and top_k > 1 and dense == min(widths) * top_k:
        metadata[key] = Value("u32", min(widths))
    return metadata


def _kv_values(facts: _Facts, layers: int) -> int:
    """Numbers of the KV cache per token; sliding windows are counted as if they were full."""
    heads = facts.per_layer("attention.head_count", layers, 0)
    width = facts.number("embedding_length") // max(1, *heads)
    key = max(facts.per_layer("attention.key_length", layers, width))
    value = max(facts.per_layer("attention.value_length", layers, width))
    if facts.value("attention.key_length_mla") is not None:
        value = 0  # the values are the first numbers of the cached keys
    per_layer = facts.per_layer("attention.head_count_kv", layers, max(heads))
    return sum(per_layer[:layers]) * (key + value)
