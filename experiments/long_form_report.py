"""What `experiments.long_form` found, in words and as a plot, from its figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compression.files import atomic

Figures = Mapping[str, Any]
_SURE = 0.05  # p-value below which a difference is called one
RATES = {
    "repeated": "4-grams that occurred before",
    "loop": "texts that end in a loop",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "distinct_4": "distinct-4",
}
_NAMES = RATES | {"base_nll": "nats per token under the base model", "length": "mean length"}


def _span(row: Figures) -> str:
    return f"{row['first']}-{row['last']}"


def _verdict(change: float, p: float | None, more: str, less: str, same: str) -> str:
    if p is None or p >= _SURE:
        return same
    return more if change > 0 else less


def lines(figures: Figures) -> list[str]:
    """The answers, one line each."""
    out = [
        f"{figures['study']}: {figures['windows']} windows of {figures['window']} report tokens; the base "
        f"model makes use of {figures['usable_context']} (its config says {figures['declared_context']})",
        "",
        "Does damage grow with context?",
    ]
    for form, winner in figures["winners"].items():
        rows = winner["positions"]
        name = f"{form}{', repaired' if winner['repaired'] else ''}"
        inside = [r for r in rows if not r["beyond_context"]]
        shown = {r["first"]: r for r in (rows[0], inside[-1], rows[-1])}.values()
        ends = ", ".join(f"{r['kl']:.3f} ± {r['kl_se']:.3f} at {_span(r)}" for r in shown)
        out.append(f"  {name}: KL {ends}")
        for t in winner["kl_trends"]:
            says = _verdict(t["slope"], t["p"], "it grows", "it shrinks", "no clear change")
            out.append(
                f"    positions {_span(t)}: log KL changes by {t['slope']:+.3f} ± {t['se']:.3f} per doubling "
                f"(p = {t['p']:.2g}): {says}"
            )
        for r in (inside[-1], rows[-1]) if rows[-1]["beyond_context"] else rows[-1:]:
            sums = r["cumulative"]
            out.append(
                f"    at {_span(r)}: perplexity {r['perplexity']:.1f} (base {r['base_perplexity']:.1f}), "
                f"top-1 agreement {r['top1']:.1%}; from 0 to {r['last']}: KL {sums['kl']:.3f}, perplexity "
                f"{sums['perplexity']:.1f} ({sums['base_perplexity']:.1f}), top-1 {sums['top1']:.1%}"
            )
    if figures["generations"] is not None:
        out += ["", *_generations(figures["generations"])]
    return out


def _generations(found: Figures) -> list[str]:
    out = [
        f"Does it repeat more? {found['prompts']} texts of up to {found['generated_tokens']} tokens, the "
        f"last {found['positions_beyond_context']} of them beyond what the base model makes use of"
    ]
    for method, parts in found["methods"].items():
        for part in ("within_context", "whole"):
            out.append(f"  {method}, {part.replace('_', ' ')} (base model, portable winner, difference):")
            for name in ("repeated", "loop", "base_nll", "length"):
                r = parts[part][name]
                if r["difference"] is None:
                    continue
                scale, unit = (100, " %") if name in RATES else (1, "")
                says = _verdict(r["difference"], r["p"], "more", "less", "no clear difference")
                p = "" if r["p"] is None else f" (p = {r['p']:.2g})"
                values = ", ".join(f"{scale * r[k]:.4g}{unit}" for k in ("base", "candidate"))
                out.append(
                    f"    {_NAMES[name]}: {values}, {scale * r['difference']:+.2g} ± "
                    f"{scale * r['difference_se']:.2g}{p}: {says}"
                )
    return out


def draw(figures: Figures, path: Path) -> None:
    """KL and perplexity by position, and how repetitive long texts are; bars are standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = figures["generations"]
    methods = {} if found is None else found["methods"]
    figure, axes = plt.subplots(1, 2 + len(methods), figsize=(4.6 * (2 + len(methods)), 4.6))
    for i, (form, winner) in enumerate(figures["winners"].items()):
        rows = winner["positions"]
        at = np.arange(len(rows))
        label = f"{form}{', repaired' if winner['repaired'] else ''}"
        for axis, name in ((axes[0], "kl"), (axes[1], "nll")):
            values, error = (np.array([r[k] for r in rows]) for k in (name, f"{name}_se"))
            if name == "nll":  # of perplexity, by the delta method
                values, error = np.exp(values), np.exp(values) * error
            axis.errorbar(at, values, error, color=f"C{i}", marker="o", capsize=3, label=label)
    base = [r["base_perplexity"] for r in rows]
    axes[1].plot(at, base, color="0.3", marker="s", ls="--", label="base model")
    axes[0].set(title="Damage by position", ylabel="KL from the base model (nats)")
    axes[1].set(title="Perplexity by position", ylabel="perplexity")
    beyond = [i for i, r in enumerate(rows) if r["beyond_context"]]
    for axis in axes[:2]:
        axis.set_ylim(0, None)
        if beyond:
            axis.axvspan(beyond[0] - 0.5, at[-1] + 0.5, color="0.9", label="beyond the base model's use")
        axis.set_xlim(-0.5, at[-1] + 0.5)
        axis.set_xticks(at, [_span(r) for r in rows], rotation=45, ha="right")
        axis.set_xlabel("position in the context (tokens)")
    for axis, (method, parts) in zip(axes[2:], methods.items(), strict=True):
        _bars(axis, parts["whole"])
        axis.set_title(f"Texts of up to {found['generated_tokens']} tokens, {method}")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.tight_layout()
    with atomic(path) as stream:
        figure.savefig(stream, dpi=110, format="png")
    plt.close(figure)


def _bars(axis: Any, rates: Figures) -> None:
    at = np.arange(len(RATES))
    for shift, name, label, colour in (
        (-0.2, "base", "base model", "0.6"),
        (0.2, "candidate", "portable winner", "C0"),
    ):
        axis.bar(at + shift, [rates[k][name] or 0 for k in RATES], 0.38, color=colour, label=label)
    # The error is that of the difference, drawn on the candidate: what the comparison rests on.
    tops, errors = ([rates[k][name] or 0 for k in RATES] for name in ("candidate", "difference_se"))
    label = "standard error of the paired difference"
    axis.errorbar(at + 0.2, tops, errors, fmt="none", color="k", capsize=3, label=label)
    axis.set_xticks(at, RATES.values(), rotation=30, ha="right", fontsize=8)
    axis.set(ylabel="share", ylim=(0, 1.4))  # room for the legend
