"""The Pareto picture as PNG: KL against size and against speed, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compression.files import atomic
from search.labels import along, leader, place
from search.pareto import FRONT, UNBEATEN, Mark, Words, by_size, by_speed, corners, marks, named
from spaces.space import PORTABLE, RAGGED

_SHAPES = {PORTABLE: "o", RAGGED: "D"}
_SIZES = {PORTABLE: 46, RAGGED: 38}
_DPI = 120
_BASELINE, _FRONT, _BUDGET = "#d6336c", "#475569", "#b91c1c"


def write_png(result: dict[str, Any], path: Path) -> None:
    """Draws the complete trials of result.json.

    Colour is predicted speed, shape the form; baselines are outlined and named, winners are
    stars, trials that no other beats are opaque, and a line joins the front of each panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    shown = [m for m in marks(result) if m.complete]
    words = Words.of(result, "are left out")
    speeds = [m.speed for m in shown] or [0.0]
    colours = ScalarMappable(Normalize(min(speeds), max(speeds)), "viridis")
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 6.6), dpi=_DPI, sharey=True, layout="constrained")
    panels: list[tuple[Callable[[Mark], float], list[Mark], str]] = [
        (lambda m: m.gigabytes, by_size(shown), "steps-post"),
        (lambda m: m.speed, by_speed(shown), "steps-pre"),
    ]
    for axis, (x, line, steps) in zip(axes, panels, strict=True):
        axis.plot([x(m) for m in line], [m.kl for m in line], drawstyle=steps, color=_FRONT, linewidth=1.3,
                  zorder=1)  # fmt: skip
        rgba = colours.to_rgba(np.array([m.speed for m in shown]))
        for m, colour in sorted(zip(shown, rgba, strict=True), key=lambda it: _depth(it[0])):
            _draw(axis, x(m), m, colour)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(which="major", alpha=0.25)
        axis.margins(0.07)
    budget = axes[0].axvline(
        result["budget_bytes"] / 1e9, color=_BUDGET, linewidth=1.2, linestyle="--", zorder=0
    )
    axes[0].set_xlabel(words.size)
    axes[1].set_xlabel(words.speed)
    axes[0].set_ylabel(words.kl)
    figure.colorbar(colours, ax=axes, label="predicted decode speed (tokens/s)", pad=0.01, aspect=32)
    figure.suptitle(f"{words.title}\n", fontsize=14, linespacing=1.6)
    figure.text(0.5, 0.935, words.note, ha="center", fontsize=10, color="#475569")
    figure.legend(
        *_legend(words.budget, budget), loc="outside lower center", ncols=7, columnspacing=1.6, frameon=False
    )
    figure.canvas.draw()
    figure.set_layout_engine("none")  # names are placed for this layout
    for axis, (x, line, steps) in zip(axes, panels, strict=True):
        lines = [corners([(x(m), m.kl) for m in line], first_along=steps == "steps-post")]
        if axis is axes[0]:
            lines.append([(result["budget_bytes"] / 1e9, y) for y in axis.get_ylim()])
        _name(figure, axis, shown, x, lines)
    with atomic(path) as stream:
        figure.savefig(stream, dpi=_DPI, format="png")
    pyplot.close(figure)


def _depth(m: Mark) -> tuple[bool, bool, bool]:
    """What is drawn over what."""
    return m.winner, m.baseline is not None, m.on_front


def _draw(axis: Any, x: float, m: Mark, colour: Any) -> None:
    """One trial."""
    if m.winner:
        axis.scatter(x, m.kl, s=330, marker="*", color=[colour], edgecolors="black", linewidths=1.1, zorder=5)
        return
    edge = _BASELINE if m.baseline else ("#111827" if m.on_front else "none")
    axis.scatter(
        x, m.kl, s=_SIZES[m.form], marker=_SHAPES[m.form], color=[colour], edgecolors=edge,
        linewidths=1.6 if m.baseline else 0.7, alpha=1.0 if m.on_front or m.baseline else 0.55,
        zorder=4 if m.baseline else 2 + m.on_front,
    )  # fmt: skip


def _name(
    figure: Any,
    axis: Any,
    shown: Sequence[Mark],
    x: Callable[[Mark], float],
    lines: Sequence[Sequence[tuple[float, float]]],
) -> None:
    """Writes the names of winners and baselines, each joined to its point."""
    from matplotlib.lines import Line2D

    those = named(shown)
    texts = [
        figure.text(0, 0, m.label, fontsize=8.5, fontweight="bold" if m.winner else "normal",
                    color="black" if m.winner else "#9d174d", ha="center", va="center", zorder=6)
        for m in those
    ]  # fmt: skip
    renderer = figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in texts]
    frame = axis.get_window_extent(renderer)

    def pixels(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(float(a), float(b)) for a, b in axis.transData.transform(values)] if values else []

    where = pixels([(x(m), m.kl) for m in those])
    sizes = [(b.width + 4, b.height + 2) for b in boxes]
    gaps = [19.0 if m.winner else 8.0 for m in those]
    inner = (frame.x0 + 3, frame.y0 + 3, frame.x1 - 3, frame.y1 - 3)
    busy = pixels([(x(m), m.kl) for m in shown]) + [p for line in lines for p in along(pixels(line))]
    centres = place(where, sizes, gaps, inner, busy)
    to_figure = figure.transFigure.inverted()
    for text, anchor, centre, size, gap in zip(texts, where, centres, sizes, gaps, strict=True):
        text.set_position(to_figure.transform(centre))
        ends = leader(anchor, centre, size, gap)
        if ends is not None:
            (x0, y0), (x1, y1) = to_figure.transform(ends)
            figure.add_artist(Line2D([x0, x1], [y0, y1], color="#6b7280", linewidth=0.7))


def _legend(budget_text: str, budget: Any) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    def dot(marker: str, edge: str, size: float = 7, width: float = 0.8) -> Any:
        return Line2D([], [], linestyle="none", marker=marker, markersize=size, markerfacecolor="#94a3b8",
                      markeredgecolor=edge, markeredgewidth=width)  # fmt: skip

    entries = {
        "portable": dot(_SHAPES[PORTABLE], "none"),
        "ragged": dot(_SHAPES[RAGGED], "none", 6),
        UNBEATEN: dot("o", "#111827"),
        "baseline": dot("o", _BASELINE, 7, 1.8),
        "winner": dot("*", "black", 14),
        FRONT: Line2D([], [], color=_FRONT),
        budget_text: budget,
    }
    return list(entries.values()), list(entries)
