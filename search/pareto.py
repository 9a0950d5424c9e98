"""The Pareto front of a study, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compression.files import atomic, write_text

Point = tuple[float, float, float]
"""(KL, target bytes, tokens per second)."""

_COLOURS = {"portable": "#2a6f97", "ragged": "#c05621", "baseline": "#6b7280"}


def dominates(a: Point, b: Point) -> bool:
    """`a` is as good as `b` in KL, bytes and speed, and better in one."""
    as_good = a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2]
    return as_good and a != b


def front(points: Sequence[Point]) -> list[int]:
    """Positions of the points no other dominates, by ascending KL."""
    best = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    return sorted(best, key=lambda i: (points[i], i))


def front_of(records: Sequence[dict[str, Any]]) -> list[int]:
    """Trial numbers on the front of result.json's complete trials, by ascending KL."""
    complete = [r for r in records if r["state"] == "COMPLETE"]
    points = [
        (r["scores"]["kl"], r["scores"]["target_bytes"], r["scores"]["tokens_per_second"]) for r in complete
    ]
    return [complete[i]["number"] for i in front(points)]


def kind_of(trial: dict[str, Any]) -> str:
    """baseline, portable or ragged."""
    if trial.get("baseline"):
        return "baseline"
    return "portable" if trial["portable"] else "ragged"


def _label(trial: dict[str, Any]) -> str:
    s = trial["scores"]
    name = trial.get("baseline") or kind_of(trial)
    return (
        f"trial {trial['number']} ({name})<br>KL {s['kl']:.4f} ± {s['kl_se']:.4f}<br>"
        f"{s['target_bytes'] / 1e9:.2f} GB, {s['tokens_per_second']:.1f} tokens/s"
    )


def write_html(
    trials: Sequence[dict[str, Any]], chosen: Sequence[int], title: str, budget: int, path: Path
) -> None:
    """An interactive plot, self-contained: KL against predicted speed, size in the hover text."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for kind, colour in _COLOURS.items():
        group = [t for t in trials if kind_of(t) == kind]
        figure.add_trace(
            go.Scatter(
                x=[t["scores"]["tokens_per_second"] for t in group],
                y=[t["scores"]["kl"] for t in group],
                text=[_label(t) for t in group],
                hoverinfo="text",
                mode="markers",
                name=kind,
                marker={"size": 9, "color": colour, "opacity": 0.75},
            )
        )
    line = sorted(
        (t for t in trials if t["number"] in set(chosen)), key=lambda t: t["scores"]["tokens_per_second"]
    )
    figure.add_trace(
        go.Scatter(
            x=[t["scores"]["tokens_per_second"] for t in line],
            y=[t["scores"]["kl"] for t in line],
            mode="markers",
            name="Pareto front",
            hoverinfo="skip",
            marker={"size": 15, "symbol": "circle-open", "color": "#111827", "line": {"width": 2}},
        )
    )
    figure.update_layout(
        title=f"{title}: KL against speed, all within {budget / 1e9:.4g} GB",
        xaxis_title="predicted tokens/s of the target",
        yaxis_title="KL divergence of the searched model (nats per token)",
        yaxis_type="log",
        template="plotly_white",
    )
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))


def write_png(
    trials: Sequence[dict[str, Any]], chosen: Sequence[int], title: str, budget: int, path: Path
) -> None:
    """The same as a picture: KL against size on the left, against speed on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, constrained_layout=True)
    on_front = set(chosen)
    for kind, colour in _COLOURS.items():
        group = [t for t in trials if kind_of(t) == kind]
        for axis, x in zip(axes, (_gigabytes, _speed), strict=True):
            axis.scatter([x(t) for t in group], [t["scores"]["kl"] for t in group], s=34, c=colour,
                         alpha=0.75, label=kind, edgecolors="none")  # fmt: skip
    line = [t for t in trials if t["number"] in on_front]
    for axis, x in zip(axes, (_gigabytes, _speed), strict=True):
        axis.scatter([x(t) for t in line], [t["scores"]["kl"] for t in line], s=110, facecolors="none",
                     edgecolors="#111827", linewidths=1.4, label="Pareto front")  # fmt: skip
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
    axes[0].axvline(budget / 1e9, color="#b91c1c", linewidth=1, linestyle="--", label="budget")
    axes[0].set_xlabel("file size of the target (GB)")
    axes[1].set_xlabel("predicted tokens/s of the target")
    axes[0].set_ylabel("KL divergence of the searched model (nats/token)")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    with atomic(path) as stream:
        figure.savefig(stream, dpi=120, format="png")
    pyplot.close(figure)


def _gigabytes(trial: dict[str, Any]) -> float:
    return float(trial["scores"]["target_bytes"]) / 1e9


def _speed(trial: dict[str, Any]) -> float:
    return float(trial["scores"]["tokens_per_second"])
