"""llama.cpp's own mixes: what `llama-quantize model.gguf Q4_K_M` makes of each tensor.

Source: the type rules of src/llama-quant.cpp (github.com/ggml-org/llama.cpp), as they stand in 2026,
for a model with an importance matrix. They are hand-made: a base type, better ones for the
attention's values and output, `ffn_down`, embedding and output, partly by depth.

Returned is the largest mix that fits, nothing pruned. Where none fits, as many experts stay (by
REAP) as some mix allows, since no mix reaches below 1.6 bits per weight; rules that look at
the number of experts see what is left, as llama-quantize would on the pruned file.

Deviations:

* MLA. llama-quantize knows the fused `attn_kv_b` of older files, as values, and gives its two halves the
  base type. Here `attn_k_b` and `attn_v_b` get the fused tensor's type, as the rules mean it: better and
  larger, so that a few of the smallest budgets need fewer experts or cannot be met.
  Values count as shared by all heads (GGUF stores MLA with one head of keys), as it sees them.
* Rows that no 256-weight block divides get llama-quantize's fallback, or of the types this
  space has for them the one nearest in size (Q5_0 for Q5_1, IQ4_NL for Q4_0).
* Mixes of legacy types (Q4_0 ...) and ternary ones are left out, as are rules for Falcon,
  Llama-70B and fused QKV.
"""

from __future__ import annotations

from collections.abc import Iterator

from experiments.baselines.lab import Lab
from experiments.baselines.method import Unreachable, candidate_of
from spaces.inventory import Tensor
from spaces.space import Space

BASE = {
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S", "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S",
    "Q2_K_S": "Q2_K", "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K",
    "IQ4_XS": "IQ4_XS", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K", "Q8_0": "Q8_0",
}  # fmt: skip
"""Mix to the type of whatever no rule names."""

_TINY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")  # mixes with rules of their own
_EMBEDDING = {
    "IQ1_S": "Q2_K", "IQ1_M": "Q2_K", "IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S",
    "IQ3_XXS": "IQ3_S",
}  # fmt: skip
_SHARED_VALUES = {
    "Q2_K": "Q4_K", "Q2_K_S": "Q4_K", "IQ3_XXS": "Q4_K", "IQ3_XS": "Q4_K", "IQ3_S": "Q4_K", "IQ3_M": "Q4_K",
    "Q3_K_L": "Q5_K", "IQ4_XS": "Q5_K",
}  # fmt: skip
_OWN_VALUES = {"Q2_K": "Q3_K", "IQ3_M": "Q4_K", "Q3_K_L": "Q5_K"}
_OUTPUT = {
    "IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "IQ3_XXS": "IQ3_S",
    "IQ3_M": "Q4_K", "Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K",
}  # fmt: skip
_OUTPUT_OF_EIGHT = frozenset(BASE) - {"Q2_K_S", "Q3_K_L", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"}
_QUERY = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
_VALUES = ("attn_v", "attn_k_b", "attn_v_b", "attn_kv_b")


def more_bits(layer: int, layers: int) -> bool:
    """Depths that several mixes favour: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _values(mix: str, layer: int, layers: int, shared: bool, experts: int) -> str | None:
    """Type of the attention's values."""
    if mix in _TINY:
        kind = "IQ3_S" if mix in ("IQ2_S", "IQ2_M") else "Q2_K"
        return "Q4_K" if shared or experts >= 4 else kind
    if experts == 8:
        return "Q8_0"
    if mix == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more_bits(layer, layers) else None
    if mix == "Q4_K_S":
        return "Q5_K" if layer < 4 else None
    return (_SHARED_VALUES if shared else _OWN_VALUES).get(mix)


def _down(mix: str, layer: int, layers: int, place: int, experts: int) -> str | None:
    """Type of `ffn_down`; `place` counts these tensors through the file."""
    early = layer < layers // 8
    if mix in _TINY:
        kind = "IQ3_S" if mix in ("IQ2_S", "IQ2_M") else "Q2_K"
        return kind if place < layers // 8 else None
    if mix == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more_bits(layer, layers) else None
    if mix == "IQ3_M":
        return "Q4_K" if early or (experts == 8 and more_bits(layer, layers)) else None
    if mix in ("Q2_K_S", "Q4_K_S"):
        return {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K"}[mix] if early else None
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(mix)


def _rule(space: Space, mix: str, tensor: Tensor, experts: int, place: int) -> str | None:
    """What a mix gives one tensor; None for its base type."""
    layer, layers, role = tensor.layer or 0, space.inventory.layers, tensor.role
    tied = "output.weight" not in space.inventory.by_name
    if role == "output" or (tied and role == "token_embd"):
        if tensor.row % 256 or mix == "Q8_0":
            return "Q8_0"
        return "Q5_K" if mix in _TINY or mix == "IQ3_XXS" else "Q6_K"
    if role == "token_embd":
        return _EMBEDDING.get(mix)
    if role in _VALUES:
        latent = role != "attn_v"
        return _values(mix, layer, layers, latent or shared_values(space), experts)
    if role == "attn_k" and experts == 8:
        return "Q4_K" if mix in _TINY else "Q8_0"
    if role in ("attn_k", "attn_q"):
        return _QUERY.get(mix)
    if role.startswith("ffn_down"):
        return _down(mix, layer, layers, place, experts)
    if role == "attn_output":
        return ("Q5_K" if mix in _OUTPUT_OF_EIGHT else None) if experts == 8 else _OUTPUT.get(mix)
    between = layers // 8 <= layer < 7 * layers // 8
    return "IQ3_XXS" if mix == "IQ3_XS" and between and role.startswith(("ffn_gate", "ffn_up")) else None


def shared_values(space: Space) -> bool:
    """Whether at least four heads share one head of values (llama.cpp's n_gqa)."""
    values = {key.split(".", 1)[1]: v.value for key, v in space.inventory.metadata.items() if "." in key}
    heads, shared = values.get("attention.head_count"), values.get("attention.head_count_kv")
    return isinstance(heads, int) and isinstance(shared, int) and heads >= 4 * shared


def mix_types(space: Space, mix: str, experts: int) -> dict[str, str]:
    """Type of every tensor in a mix of a file with `experts` experts per layer."""
    types, downs = {}, 0
    for t in space.inventory.quantizable:
        types[t.name] = space.nearest(t, _rule(space, mix, t, experts, downs) or BASE[mix])
        downs += t.role.startswith("ffn_down")
    return types


def _fitting(lab: Lab, kept: int) -> Iterator[tuple[int, str, dict[str, str]]]:
    for mix in BASE:
        types = mix_types(lab.space, mix, kept)
        size = lab.size(candidate_of(lab, types, kept))
        if size <= lab.limit:
            yield size, mix, types


def llama_mixes(lab: Lab) -> None:
    """The largest mix that fits, at the largest expert count at which one does; no tokens."""
    for kept in reversed(lab.space.kept_options):
        fitting = list(_fitting(lab, kept))
        if fitting:
            _, _, types = max(fitting, key=lambda found: found[:2])
            return lab.offer(candidate_of(lab, types, kept))
    raise Unreachable(f"no mix fits {lab.limit:,} bytes at any expert count")
