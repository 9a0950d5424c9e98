"""The DeepSeek-V3 architecture, written for training throughput.

Same function as `transformers.DeepseekV3ForCausalLM` (a test compares logits),
with what a CPU needs: bf16 products, tokens sorted by expert so that each
expert is two matrix products, a loss that never keeps the logits, and no casts
inside a step. `to_checkpoint` names the weights as transformers does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of the reference model. Every row a GGUF type packs is a multiple of 256 but `nope`."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 5
    dense_layers: int = 1
    dense_width: int = 512
    experts: int = 16
    top_k: int = 4
    expert_width: int = 256
    heads: int = 4
    q_rank: int = 256
    kv_rank: int = 256
    nope: int = 32
    rope: int = 32
    value: int = 64
    scale: float = 2.5
    context: int = 512
    theta: float = 10000.0

    def config(self) -> dict[str, Any]:
        """`config.json` of the checkpoint."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "first_k_dense_replace": self.dense_layers,
            "intermediate_size": self.dense_width,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.expert_width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "q_lora_rank": self.q_rank,
            "kv_lora_rank": self.kv_rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.value,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": self.scale,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-6,
            "rope_theta": self.theta,
            "rope_interleave": True,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "dtype": "bfloat16",
        }


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, its gradients formed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        log_z = logits.logsumexp(-1, keepdim=True)
        loss = (log_z.squeeze(-1) - logits.gather(1, target[:, None]).squeeze(1)).mean()
        gradient = logits.sub_(log_z).exp_()
        gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -1.0))
        gradient = (gradient / len(target)).to(hidden.dtype)
        ctx.save_for_backward(gradient @ weight, gradient.T @ hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        return hidden * upstream.to(hidden.dtype), weight * upstream.to(weight.dtype), None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs; x (..., seq, heads, rope)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_a = nn.Linear(s.hidden, s.q_rank, bias=False)
        self.q_norm = nn.RMSNorm(s.q_rank, 1e-6)
        self.q_b = nn.Linear(s.q_rank, s.heads * (s.nope + s.rope), bias=False)
        self.kv_a = nn.Linear(s.hidden, s.kv_rank + s.rope, bias=False)
        self.kv_norm = nn.RMSNorm(s.kv_rank, 1e-6)
        self.kv_b = nn.Linear(s.kv_rank, s.heads * (s.nope + s.value), bias=False)
        self.out = nn.Linear(s.heads * s.value, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (batch, length, _) = self.s, x.shape
        q = self.q_b(self.q_norm(self.q_a(x))).view(batch, length, s.heads, s.nope + s.rope)
        latent, k_rope = self.kv_a(x).split((s.kv_rank, s.rope), -1)
        kv = self.kv_b(self.kv_norm(latent)).view(batch, length, s.heads, s.nope + s.value)
        q_nope, q_rope = q.split((s.nope, s.rope), -1)
        k_nope, value = kv.split((s.nope, s.value), -1)
        k_rope = _rotate(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, s.heads, -1)
        q = torch.cat((q_nope, _rotate(q_rope, cos, sin)), -1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, value.transpose(1, 2), is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Moe(nn.Module):
    bias: Tensor
    load: Tensor

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.router = nn.Parameter(torch.empty(s.experts, s.hidden))
        self.register_buffer("bias", torch.zeros(s.experts))
        self.register_buffer("load", torch.zeros(s.experts), persistent=False)
        self.gate = nn.Parameter(torch.empty(s.experts, s.expert_width, s.hidden))
        self.up = nn.Parameter(torch.empty(s.experts, s.expert_width, s.hidden))
        self.down = nn.Parameter(torch.empty(s.experts, s.hidden, s.expert_width))
        self.shared = Mlp(s.hidden, s.expert_width)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        score = (flat.float() @ self.router.float().T).sigmoid()
        chosen = (score.detach() + self.bias).topk(self.s.top_k, -1).indices
        weight = score.gather(1, chosen)
        weight = weight / weight.sum(-1, keepdim=True) * self.s.scale
        order = chosen.view(-1).argsort(stable=True)
        counts = chosen.view(-1).bincount(minlength=self.s.experts)
        self.load += counts
        token = order // self.s.top_k
        outputs = []
        pieces = flat.index_select(0, token).split(counts.tolist())
        for piece, gate, up, down in zip(
            pieces, self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True
        ):
            outputs.append((F.silu(piece @ gate.T) * (piece @ up.T)) @ down.T)
        routed = torch.cat(outputs) * weight.view(-1)[order].to(flat.dtype).unsqueeze(1)
        mixed = self.shared(flat).index_add(0, token, routed)
        return mixed.view_as(x)


class Block(nn.Module):
    def __init__(self, s: Shape, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(s.hidden, 1e-6)
        self.attention = Attention(s)
        self.mlp_norm = nn.RMSNorm(s.hidden, 1e-6)
        self.mlp = Mlp(s.hidden, s.dense_width) if layer < s.dense_layers else Moe(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Network(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape, i) for i in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, 1e-6)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                out = name.endswith(("out.weight", "down", "down.weight"))
                fan_in = parameter.shape[-1]
                nn.init.normal_(parameter, std=fan_in**-0.5 * (0.3 if out else 0.6))
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02)

    def hidden(self, tokens: Tensor) -> Tensor:
        """(batch, length) token ids to (batch, length, hidden) normed states."""
        s = self.shape
        frequency = s.theta ** (-torch.arange(0, s.rope, 2, device=tokens.device) / s.rope)
        angle = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), frequency)
        x = self.embedding(tokens)
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean next-token cross-entropy in nats of (batch, length + 1) token ids."""
        states = self.hidden(tokens[:, :-1])
        loss: Tensor = _LinearCrossEntropy.apply(
            states.reshape(-1, states.shape[-1]), self.head.weight, tokens[:, 1:].reshape(-1)
        )
        return loss

    def views(self) -> dict[str, Tensor]:
        """The live weights under the names that DeepSeek-V3 checkpoints carry, one tensor per expert."""
        s = self.shape
        out = {
            "model.embed_tokens.weight": self.embedding.weight,
            "model.norm.weight": self.norm.weight,
            "lm_head.weight": self.head.weight,
        }
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            a: Any = block.attention
            p = f"model.layers.{i}."
            out |= {
                p + "input_layernorm.weight": block.attention_norm.weight,
                p + "post_attention_layernorm.weight": block.mlp_norm.weight,
                p + "self_attn.q_a_proj.weight": a.q_a.weight,
                p + "self_attn.q_a_layernorm.weight": a.q_norm.weight,
                p + "self_attn.q_b_proj.weight": a.q_b.weight,
                p + "self_attn.kv_a_proj_with_mqa.weight": a.kv_a.weight,
                p + "self_attn.kv_a_layernorm.weight": a.kv_norm.weight,
                p + "self_attn.kv_b_proj.weight": a.kv_b.weight,
                p + "self_attn.o_proj.weight": a.out.weight,
            }
            mlp = block.mlp
            dense = mlp.shared if isinstance(mlp, Moe) else mlp
            prefix = p + ("mlp.shared_experts." if isinstance(mlp, Moe) else "mlp.")
            for name in ("gate", "up", "down"):
                out[f"{prefix}{name}_proj.weight"] = getattr(dense, name).weight
            if isinstance(mlp, Moe):
                out[p + "mlp.gate.weight"] = mlp.router
                out[p + "mlp.gate.e_score_correction_bias"] = mlp.bias
                for e in range(s.experts):
                    for name in ("gate", "up", "down"):
                        out[f"{p}mlp.experts.{e}.{name}_proj.weight"] = getattr(mlp, name)[e]
        return {k: v.detach() for k, v in out.items()}

    def to_checkpoint(self) -> dict[str, Tensor]:
        """A copy of the weights under a checkpoint's names."""
        return {k: v.contiguous().clone() for k, v in self.views().items()}

    @torch.no_grad()
    def from_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the weights of a checkpoint of the same shape; `KeyError` if one is missing."""
        for name, view in self.views().items():
            view.copy_(tensors[name])


def parameter_count(shape: Shape) -> int:
    """Parameters of the model, embeddings included."""
    with torch.device("meta"):
        return sum(math.prod(p.shape) for p in Network(shape).parameters())
