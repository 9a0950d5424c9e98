"""The quick checks the paper asks for (arXiv 2509.25689), as pictures of one trial."""

from __future__ import annotations

import numpy as np

from evaluators.contributions import LEVERS
from evaluators.throughput import Throughput, speeds
from search.report import draw
from search.report.facts import Facts
from search.report.page import Picture
from spaces.candidate import Candidate, MoeLayer

READING = 5.0
"""Tokens per second that a person reads at; the paper's own target."""

_SENSITIVITY_BITS = "Q2_K"
_MANY = 64  # experts


def activation(facts: Facts) -> Picture:
    """How often every expert is chosen, and which ones were pruned."""
    tokens = facts.calibration.routing["tokens"]
    share = tokens / np.maximum(tokens.sum(1, keepdims=True), 1) * facts.source.experts
    order = np.argsort(-share, 1)
    ordered = np.take_along_axis(share, order, 1)
    made, axes = draw.figure(columns=2, height=1.6 + 0.22 * min(40, len(share)))
    layers = [str(i) for i in facts.source.moe_layers]
    names = [str(i) for i in range(facts.source.experts)]
    many = facts.source.experts > _MANY
    there = share.copy()
    if many:  # too many for crosses: what is pruned is left white
        for row, m in enumerate(facts.candidate.layers):
            there[row, ~np.isin(np.arange(facts.source.experts), m.experts)] = np.nan
    draw.heat_map(axes[0], there, layers, names, "use (1 = even)", cmap="cividis")
    axes[0].set_xlabel("expert (white: pruned)" if many else "expert (crosses: pruned)")
    axes[0].set_ylabel("layer")
    for row, m in enumerate(facts.candidate.layers):
        gone = [e for e in range(facts.source.experts) if e not in set(m.experts)]
        if not many:
            axes[0].plot(gone, [row] * len(gone), "x", color="white", markersize=5, markeredgewidth=1.2)
    for row, m in enumerate(facts.candidate.layers):
        axes[1].plot(range(1, len(names) + 1), ordered[row], color=draw.BLUE, alpha=0.5, linewidth=1)
        places = np.flatnonzero(~np.isin(order[row], m.experts))
        axes[1].plot(places + 1, ordered[row][places], "x", color=draw.RED, markersize=2 if many else 5)
    axes[1].axhline(1, color=draw.GREY, linewidth=1, linestyle="--")
    axes[1].set_xlabel("expert, most used first (crosses: pruned)")
    axes[1].set_ylabel("use (1 = even)")
    return Picture(
        "activation",
        draw.png(made),
        "Activation frequency of every expert on the calibration text, over an even share. Pruned experts "
        "need not be the least used: sets are chosen by what the layer's output loses.",
    )


def stability(facts: Facts) -> Picture:
    """Routing after compression, layer by layer."""
    rows = facts.evidence["routing"]
    x = np.arange(len(rows))
    made, axes = draw.figure(columns=2, height=3.2)
    axes[0].bar(x - 0.2, [r["kept_mass"] for r in rows], 0.4, color=draw.BLUE, label="routed mass kept")
    axes[0].bar(x + 0.2, [r["agreement"] for r in rows], 0.4, color=draw.ORANGE, label="same experts chosen")
    axes[0].set_ylim(0, 1.05)
    axes[0].set_ylabel("share of the base model's")
    axes[1].plot(x, [r["entropy_base"] for r in rows], "o--", color=draw.GREY, label="base model")
    axes[1].plot(x, [r["entropy"] for r in rows], "o-", color=draw.BLUE, label="this trial")
    axes[1].set_ylabel("entropy of a token's gates (nats)")
    axes[1].set_ylim(0, None)
    for axis in axes:
        axis.set_xticks(draw.ticks(len(rows)), [str(rows[i]["layer"]) for i in draw.ticks(len(rows))])
        axis.set_xlabel("layer")
        axis.legend(frameon=False, fontsize=8, loc="lower left", ncols=2, bbox_to_anchor=(0, 1.0))
    return Picture(
        "routing",
        draw.png(made),
        "Routing after compression: the share of the base model's gates that goes to experts still "
        "there, how "
        "many of its choices are made again, and how many experts a token really spreads over.",
    )


def contributions(facts: Facts) -> Picture:
    """What each lever, role and layer costs."""
    parts = {(p["kind"], p["name"]): (p["kl"], p["kl_se"]) for p in facts.evidence["parts"]}
    whole = parts["all", ""][0]
    made, axes = draw.figure(columns=3, width=12, height=3.6)
    names = list(LEVERS)
    y = np.arange(len(names))
    alone = [parts["only", n] for n in names]
    last = [whole - parts["without", n][0] for n in names]
    axes[0].barh(y - 0.2, [v for v, _ in alone], 0.4, xerr=[e for _, e in alone], color=draw.BLUE,
                 capsize=3, label="alone")  # fmt: skip
    axes[0].barh(y + 0.2, last, 0.4, color=draw.ORANGE, label="on top of the others")
    axes[0].set_yticks(y, names)
    axes[0].axvline(whole, color="#374151", linestyle="--", linewidth=1, label="all together")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left", ncols=3, bbox_to_anchor=(-0.15, 1.06))
    roles = sorted(((n, v) for (k, n), v in parts.items() if k == "role"), key=lambda item: -item[1][0])
    axes[1].barh([n for n, _ in roles], [v for _, (v, _) in roles], xerr=[e for _, (_, e) in roles],
                 color=draw.BLUE, capsize=3)  # fmt: skip
    for axis in axes[:2]:
        axis.invert_yaxis()
        axis.set_xlabel("KL (nats per token)")
        axis.tick_params(axis="y", labelsize=9)
    count = facts.source.layers
    types = [parts["layer types", str(i)][0] for i in range(count)]
    pruning = [parts.get(("layer experts", str(i)), (0.0, 0.0))[0] for i in range(count)]
    axes[2].bar(range(count), types, color=draw.BLUE, label="its types alone")
    axes[2].bar(range(count), pruning, bottom=types, color=draw.ORANGE, label="its pruning and top-k alone")
    axes[2].set_xticks(draw.ticks(count))
    axes[2].set_xlabel("layer")
    axes[2].set_ylabel("KL (nats per token)")
    axes[2].legend(
        frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), title="one layer alone"
    )
    axes[1].set_title("types of one role alone", fontsize=10)
    return Picture(
        "contributions",
        draw.png(made),
        "What each component costs, by itself and on top of the others (before repairs, bars: one standard "
        "error). Where the two differ, components interact.",
    )


def sensitivity(facts: Facts) -> Picture:
    """Layers under two metrics: KL, and error of the weights."""
    inventory, space = facts.source, facts.space
    kl, error = np.zeros(inventory.layers), np.zeros((2, inventory.layers))
    kinds: dict[str, int] = {}
    for t in inventory.quantizable:
        if t.layer is None:
            continue
        kind = space.nearest(t, _SENSITIVITY_BITS)
        kinds[kind] = kinds.get(kind, 0) + t.parameters
        kl[t.layer] += facts.costs.costs[facts.costs.index[t.name, kind]]
        found = facts.errors.get((t.name, kind))
        if found is not None:
            error[:, t.layer] += found * t.parameters, t.parameters
    count = space.kept_options[len(space.kept_options) // 2]
    pruning = {
        layer: min(facts.costs.costs[facts.costs.index[f"blk.{layer}.experts", (count, c)]]
                   for c in space.criteria)
        for layer in inventory.moe_layers
    }  # fmt: skip
    used = max(kinds, key=lambda k: kinds[k])
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = 100 * error[0] / error[1]
    made, axes = draw.figure(columns=3, width=12, height=3.1)
    x = np.arange(inventory.layers)
    axes[0].bar(x, kl, color=draw.BLUE)
    axes[0].set_ylabel(f"KL of all its tensors in {used} (nats)")
    axes[1].bar(x, relative, color=draw.GREEN)
    axes[1].set_ylabel(f"weighted error in {used} (%)")
    axes[2].bar(list(pruning), list(pruning.values()), color=draw.ORANGE)
    axes[2].set_ylabel(f"KL of keeping {count} of {inventory.experts} experts (nats)")
    for axis in axes:
        axis.set_xticks(draw.ticks(inventory.layers))
        axis.set_xlabel("layer")
    return Picture(
        "sensitivity",
        draw.png(made),
        "Sensitivity by layer under two metrics, KL to the base model and error of the weights: what "
        "distorts "
        "weights most is not what damages the model most.",
    )


def activation_counts(facts: Facts) -> Picture:
    """Predicted speed at every top-k on every device, against reading speed."""
    source, options = facts.source, facts.space.top_k_options
    made, (axis,) = draw.figure(height=4.0)
    for found in speeds(facts.problem.carry, facts.candidate, facts.problem.context):
        model, name = Throughput(facts.problem.carry, found.device, facts.problem.context), found.device.name
        rates = [model.evaluate(_with_top_k(facts.candidate, k))["tokens_per_second"] for k in options]
        fits = found.fits
        look = ("-", 1.4, 1.0) if fits else (":", 1.0, 0.35)
        label = name if fits else f"{name} (does not fit)"
        axis.plot(
            options,
            rates,
            "o",
            markersize=4,
            linestyle=look[0],
            linewidth=look[1],
            alpha=look[2],
            label=label,
        )
    axis.axhline(READING, color=draw.RED, linestyle="--", linewidth=1)
    axis.text(options[0], READING * 1.05, "reading speed", color=draw.RED, fontsize=8)
    axis.set_yscale("log")
    axis.set_xticks(options)
    axis.set_xlabel(
        f"active experts per token of the searched model (top-k, {source.top_k} in the base model)"
    )
    axis.set_ylabel("predicted tokens/s of the target")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return Picture(
        "top_k",
        draw.png(made),
        "Activation counts against what each device can read per second, this trial's types.",
    )


def _with_top_k(candidate: Candidate, top_k: int) -> Candidate:
    """The candidate with another top-k in every layer."""
    layers = tuple(MoeLayer(m.layer, m.experts, min(top_k, len(m.experts))) for m in candidate.layers)
    return Candidate(layers, candidate.types)
