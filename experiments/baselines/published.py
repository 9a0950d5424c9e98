"""The methods of others that the benchmark runs, at most adapted to one model, one bank and file bytes."""

from __future__ import annotations

from experiments.baselines.error_knapsack import error_knapsack
from experiments.baselines.greedy_damage import greedy_damage
from experiments.baselines.kl_knapsack import kl_knapsack
from experiments.baselines.llama_mixes import llama_mixes
from experiments.baselines.mc_moe import mc_moe
from experiments.baselines.method import Method
from experiments.baselines.simple import paper_rules, reap_grid, uniform

_ALL = (
    Method("uniform", uniform, "llama.cpp, llama-quantize", False, "types", True),
    Method("reap-grid", reap_grid, "arXiv 2510.13999", False, "experts, types", True),
    Method("paper-rules", paper_rules, "arXiv 2509.25689", False, "experts, top-k, types", True),
    Method("llama-mixes", llama_mixes, "llama.cpp, llama-quant.cpp", False, "types", True),
    Method("error-knapsack", error_knapsack, "llama.cpp PR #15550", False, "types", True),
    Method("kl-knapsack", kl_knapsack, "arXiv 2411.17525, AutoScheme, ModelOpt", False, "types", True),
    Method("greedy-damage", greedy_damage, "github.com/Thireus/GGUF-Tool-Suite", False, "types", True),
    Method("mc-moe", mc_moe, "arXiv 2410.06270", False, "types", True),
)

PUBLISHED: dict[str, Method] = {method.name: method for method in _ALL}
"""Name to method, simplest first."""
