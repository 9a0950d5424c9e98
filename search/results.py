"""What a run leaves in its folder: result.json, the winner's candidate and the target's recipe.

result.json, version 1:

    version, study, budget_bytes, target, device, model, sampler, seed
    trials      [{number, state, baseline, portable, params, candidate, scores, predicted_kl}]
    front       trial numbers, by ascending KL
    winners     {portable, ragged}: trial number or null
    baselines   {name: trial number}
    finals      {trial number: {selection, report}}: quality scores on text no trial saw, `windows_kl` (KL
                of every window) among them
    base        {report: {perplexity, ...}}: the uncompressed model
    trial_stage {tokens, seconds, evaluation_seconds, rank_correlation}: of the trials this run made itself
    repairs     {trial number: {used, tokens, selection, report}}: scores after re-fitting; the exported
                model holds it where used
    comparison  {baseline: {kl, kl_ratio, kl_difference, kl_difference_95}}, on the report text
    tasks       {"base" | trial number | "gguf": {task: {metric, value, standard_error, items, difference,
                difference_se}}}; "gguf" is the exported file in llama.cpp. Where items are right or wrong,
                all but the base have the mean of the items' differences from it, and its standard error
    export      {path, bytes, predicted_bytes, llama_cpp: {...}}, or null
    stages      {name: {seconds, peak_memory_bytes}}
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from compression.files import write_text
from spaces.candidate import Candidate
from spaces.carry import Carry
from spaces.inventory import Inventory
from spaces.plan import Plan

VERSION = 1


def trial_record(trial: FrozenTrial, candidate: Candidate) -> dict[str, Any]:
    """A trial as result.json has it."""
    return {
        "number": trial.number,
        "state": trial.state.name,
        "baseline": trial.user_attrs.get("baseline"),
        "portable": candidate.portable,
        "params": trial.params,
        "candidate": json.loads(candidate.to_json()),
        "scores": trial.user_attrs["scores"],
        "predicted_kl": trial.user_attrs["predicted_kl"],
    }


def recipe(plan: Plan, target: Inventory, criteria: dict[int, str], source: str) -> dict[str, Any]:
    """The target's plan for other tools: what to keep and which type each tensor gets.

    Args:
        plan: The target's plan.
        target: Its inventory.
        criteria: Target layer to the ranking its experts should be kept by.
        source: Name of the model the decisions were searched on.
    """
    kept, top_k = dict(plan.kept), dict(plan.top_k)
    return {
        "version": 1,
        "target": target.name,
        "searched_on": source,
        "file_bytes": target.file_bytes(plan),
        "parameters": sum(
            info_parameters(target, name, kept) for name in (t.name for t in target.tensors)
        ),
        "layers": [
            {"layer": i, "experts": kept[i], "of": target.experts, "top_k": top_k[i], "rank_by": criteria[i]}
            for i in target.moe_layers
        ],
        "types": dict(plan.types),
    }  # fmt: skip


def info_parameters(target: Inventory, name: str, kept: dict[int, int]) -> int:
    """Weights of one tensor after pruning."""
    tensor = target.by_name[name]
    count = 1
    for axis in tensor.kept_shape(kept.get(tensor.layer) if tensor.layer is not None else None):
        count *= axis
    return count


def tensor_types(plan: Plan) -> str:
    """The file `llama-quantize --tensor-type-file` takes: one `pattern=type` per line."""
    return "".join(f"^{re.escape(name)}$={kind.lower()}\n" for name, kind in plan.types)


def write_winner(
    candidate: Candidate, criteria: dict[int, str], carry: Carry, folder: Path
) -> dict[str, Any]:
    """Writes candidate.json, recipe.json and tensor-types.txt; returns the recipe."""
    plan = carry.plan(candidate.plan)
    target_criteria = {i: criteria[s] for i, s in carry.layer_of.items()}
    content = recipe(plan, carry.target, target_criteria, carry.source.name)
    write_text(folder / "candidate.json", candidate.to_json() + "\n")
    write_text(folder / "recipe.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "tensor-types.txt", tensor_types(plan))
    return content
