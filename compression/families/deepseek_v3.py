"""DeepSeek-V3 as transformers lays it out in memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spaces.inventory import Inventory

_LINEARS = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_VECTORS = {
    "attn_norm": "input_layernorm",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(?:weight|bias)")


class DeepseekV3:
    """Names and views; see `compression.families.Family`."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory

    def view(self, model: Any, name: str) -> Tensor:
        if name == "token_embd.weight":
            return model.model.embed_tokens.weight.data
        if name == "output_norm.weight":
            return model.model.norm.weight.data
        if name == "output.weight":
            return model.lm_head.weight.data
        match = _BLOCK.fullmatch(name)
        assert match is not None, name
        block, role = model.model.layers[int(match[1])], match[2]
        if role in ("attn_k_b", "attn_v_b"):
            return self._latent(block, role)
        if role.endswith("_exps"):
            experts = block.mlp.experts
            width = experts.down_proj.shape[-1]
            if role == "ffn_down_exps":
                return experts.down_proj.data
            half = slice(0, width) if role == "ffn_gate_exps" else slice(width, 2 * width)
            return experts.gate_up_proj.data[:, half]
        if role == "exp_probs_b":
            return block.mlp.gate.e_score_correction_bias
        return block.get_submodule((_LINEARS | _VECTORS)[role]).weight.data

    def _latent(self, block: Any, role: str) -> Tensor:
        """The key half (heads, latent, nope) or value half (heads, value, latent) of kv_b_proj."""
        attention = block.self_attn
        weight = attention.kv_b_proj.weight.data
        per_head = weight.view(attention.num_heads, -1, weight.shape[-1])
        nope = attention.qk_nope_head_dim
        return per_head[:, :nope].transpose(1, 2) if role == "attn_k_b" else per_head[:, nope:]

    def inputs(self, model: Any) -> list[tuple[nn.Module, tuple[str, ...]]]:
        pairs: list[tuple[nn.Module, tuple[str, ...]]] = [(model.lm_head, ("output.weight",))]
        for i, block in enumerate(model.model.layers):
            present = {t.role for t in self.inventory.tensors if t.layer == i}
            pairs += [
                (block.get_submodule(path), (f"blk.{i}.{role}.weight",))
                for role, path in _LINEARS.items()
                if role in present
            ]
            pairs.append((block.self_attn.kv_b_proj, (f"blk.{i}.attn_v_b.weight",)))
        return pairs

    def outputs(self, model: Any) -> list[tuple[nn.Module, tuple[str, ...], slice]]:
        # llama.cpp multiplies the non-rotary part of the query with attn_k_b.
        pairs: list[tuple[nn.Module, tuple[str, ...], slice]] = []
        for i, block in enumerate(model.model.layers):
            nope = slice(0, block.self_attn.qk_nope_head_dim)
            pairs.append((block.self_attn.q_b_proj, (f"blk.{i}.attn_k_b.weight",), nope))
        return pairs

    def moe(self, model: Any, layer: int) -> Any:
        return model.model.layers[layer].mlp

    def restrict(self, model: Any, layer: int, experts: Sequence[int], top_k: int) -> None:
        import torch

        router = model.model.layers[layer].mlp.gate
        if not hasattr(router, "full_bias"):
            router.full_bias = router.e_score_correction_bias.clone()
        # The weights of chosen experts do not read the bias, so an expert that can never
        # be chosen is an expert that is not there.
        bias = torch.full_like(router.full_bias, float("-inf"))
        kept = torch.as_tensor(list(experts))
        bias[kept] = router.full_bias[kept]
        router.e_score_correction_bias.copy_(bias)
        router.top_k = top_k

    def shrink(self, model: Any, layer: int, experts: Sequence[int], top_k: int) -> None:
        import torch

        block, count = model.model.layers[layer].mlp, len(experts)
        for name in ("gate_up_proj", "down_proj"):
            old = getattr(block.experts, name)
            new = torch.empty((count, *old.shape[1:]), dtype=old.dtype)
            setattr(block.experts, name, torch.nn.Parameter(new, requires_grad=False))
        router = block.gate
        router.weight = torch.nn.Parameter(torch.empty(count, router.weight.shape[1]), requires_grad=False)
        router.e_score_correction_bias = torch.empty(count)
        block.experts.num_experts = router.num_experts = count
        router.top_k = top_k
