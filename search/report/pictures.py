"""Pictures of the trial itself: against its rivals, layer by layer, where its bytes went, on which text."""

from __future__ import annotations

import math

import numpy as np

from evaluators.contributions import role_of
from search.report import draw
from search.report.facts import Facts, Quality
from search.report.page import Picture
from search.report.tables import bytes_by_role, domains, half, rivals
from spaces.quant_types import QUANT_TYPES

_MOST_RIVALS = 18


def _bar(found: Quality) -> float:
    wide = half(found)
    return 0.0 if math.isnan(wide) else wide


def against(facts: Facts) -> Picture:
    """KL of the trial, the winners and the baselines, with intervals."""
    rows = rivals(facts)
    own = [r for r in rows[_MOST_RIVALS:] if r[1] == facts.number]
    rows = [*rows[:_MOST_RIVALS], *own]
    made, (axis,) = draw.figure(height=1.2 + 0.32 * len(rows))
    for i, (_, number, _, found) in enumerate(rows):
        colour = (
            draw.ORANGE if number == facts.number else draw.BLUE if number in facts.winners else draw.GREY
        )
        axis.errorbar(found.kl, i, xerr=_bar(found), fmt="o", color=colour, capsize=3, markersize=6)
        axis.text(found.kl * 1.06, i - 0.05, f"{found.kl:.3f}", va="center", fontsize=8, color="#374151")
    axis.set_yticks(range(len(rows)), [r[0] for r in rows], fontsize=9)
    draw.plain_log(axis)
    axis.set_xlabel("KL to the base model on the report text (nats per token, bars: 95 % of windows)")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.25)
    axis.margins(x=0.08)
    return Picture("against", draw.png(made), "Every config on text nothing was chosen on; lower is better.")


def layers(facts: Facts) -> Picture:
    """Bits of every tensor, experts kept and top-k of every layer."""
    by_name, types = facts.source.by_name, dict(facts.candidate.types)
    roles = list(dict.fromkeys(by_name[n].role for n in types if by_name[n].layer is not None))
    count = facts.source.layers
    bits = np.full((len(roles), count), np.nan)
    for name, kind in types.items():
        t = by_name[name]
        if t.layer is not None:
            bits[roles.index(t.role), t.layer] = QUANT_TYPES[kind].bits_per_weight
    made, axes = draw.figure(
        rows=2, width=10.5, height=2.6 + 0.3 * len(roles), sharex=False,
        gridspec_kw={"height_ratios": [1, 0.18 * len(roles) + 1]},
    )  # fmt: skip
    above, below = axes[0][0], axes[1][0]
    where = [m.layer for m in facts.candidate.layers]
    kept = [len(m.experts) for m in facts.candidate.layers]
    above.bar(where, [facts.source.experts] * len(where), color="#e5e7eb", label="pruned")
    above.bar(where, kept, color=draw.BLUE, label="kept")
    active = [m.top_k for m in facts.candidate.layers]
    above.plot(where, active, "o", color=draw.ORANGE, markersize=5, label="active per token (top-k)")
    if count <= 32:
        for x, n in zip(where, kept, strict=True):
            above.text(x, n, str(n), ha="center", va="bottom", fontsize=8)
    above.set_ylabel("experts")
    above.set_xlim(-0.5, count - 0.5)
    above.set_xticks(draw.ticks(count))
    above.legend(frameon=False, fontsize=8, loc="upper left", ncols=3, bbox_to_anchor=(0, 1.28))
    draw.heat_map(below, bits, roles, [str(i) for i in range(count)], "bits per weight", write=".1f",
                  cmap="viridis", vmin=1.5, vmax=8.5)  # fmt: skip
    below.set_xlabel("layer of the searched model")
    outside = ", ".join(
        f"{n.removesuffix('.weight')} {t}" for n, t in types.items() if by_name[n].layer is None
    )
    return Picture(
        "layers", draw.png(made), f"What each layer keeps, and the type of each tensor. {outside}."
    )


def bytes_left(facts: Facts) -> Picture:
    """Where the target's bytes went."""
    found = sorted(bytes_by_role(facts).items(), key=lambda item: item[1][0])
    found = [(r, v) for r, v in found if v[0] > 0.0005 * sum(x[0] for _, x in found)]
    made, axes = draw.figure(columns=2, height=0.9 + 0.42 * len(found), sharey=True)
    names = [r for r, _ in found]
    now = np.array([v[2] for _, v in found]) / 1e9
    pruned = np.array([v[0] - v[1] for _, v in found]) / 1e9
    fewer = np.array([v[1] - v[2] for _, v in found]) / 1e9
    axes[0].barh(names, now, color=draw.BLUE, label="left")
    axes[0].barh(names, fewer, left=now, color=draw.ORANGE, alpha=0.75, label="saved by types")
    axes[0].barh(names, pruned, left=now + fewer, color=draw.GREY, label="saved by pruning")
    axes[0].set_xlabel("GB of the target, from BF16")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    axes[1].barh(names, now, color=draw.BLUE)
    for i, x in enumerate(now):
        axes[1].text(x, i, f" {x:.3g} GB", va="center", fontsize=8)
    axes[1].set_xlabel("GB of the target that are left")
    axes[1].margins(x=0.18)
    return Picture("bytes", draw.png(made), "Where the bytes went, by role of the tensor.")


def by_domain(facts: Facts) -> Picture:
    """Damage by kind of text."""
    rows = domains(facts)
    made, (axis,) = draw.figure(height=0.9 + 0.3 * len(rows))
    wide = [0 if math.isnan(h) else h for _, _, h, _ in rows]
    colours = [draw.RED if i == 0 else draw.BLUE for i in range(len(rows))]
    axis.barh([r[0] for r in rows], [r[1] for r in rows], xerr=wide, color=colours, capsize=3, alpha=0.85)
    mean = sum(r[1] * r[3] for r in rows) / sum(r[3] for r in rows)
    axis.axvline(mean, color="#374151", linestyle="--", linewidth=1, label="all of the text")
    axis.invert_yaxis()
    axis.set_xlabel("KL to the base model (nats per token, bars: 95 % of windows)")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return Picture("domains", draw.png(made), f"Damage by kind of text; {rows[0][0]} suffers most.")


def errors(facts: Facts) -> Picture:
    """Quantization error of the chosen type by layer and role."""
    by_name = facts.source.by_name
    roles = list(dict.fromkeys(role_of(by_name[n]) for n, _ in facts.candidate.types))
    roles = [r for r in roles if r not in ("embedding", "output")]
    total = np.zeros((2, len(roles), facts.source.layers))
    for name, kind in facts.candidate.types:
        t = by_name[name]
        error = facts.errors.get((name, kind))
        if t.layer is not None and error is not None:
            r = roles.index(role_of(t))
            total[:, r, t.layer] += error * t.parameters, t.parameters
    with np.errstate(invalid="ignore", divide="ignore"):
        values = 100 * total[0] / total[1]
    made, (axis,) = draw.figure(height=1.3 + 0.4 * len(roles))
    draw.heat_map(axis, values, roles, [str(i) for i in range(facts.source.layers)],
                  "weighted error (%)", write=".1f", cmap="magma_r")  # fmt: skip
    axis.set_xlabel("layer of the searched model")
    return Picture(
        "errors",
        draw.png(made),
        "Quantization error of the chosen types by layer and role: squared error over squared weights, both "
        "weighted by the importance matrix.",
    )
