"""The Pareto picture as one self-contained page: two interactive plots, side by side where there is room."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compression.files import write_text
from search.labels import along, place
from search.pareto import FRONT, UNBEATEN, Mark, Words, by_size, by_speed, corners, marks, named
from spaces.space import PORTABLE, RAGGED

_SHAPES = {PORTABLE: "circle", RAGGED: "diamond"}
_BASELINE, _FRONT, _BUDGET = "#d6336c", "#475569", "#b91c1c"
_FRAME = (560.0, 430.0)
"""Width and height, in pixels, of the plot that names are placed for."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>
<body style="font: 15px system-ui, sans-serif; margin: 12px 16px; color: #111827">
<h1 style="font-size: 19px; margin: 0">{title}</h1>
{plots}
</body></html>
"""
_FRAGMENT = """<style>
.pareto {{ display: grid; gap: 8px; grid-template-columns: minmax(0, 1fr) }}
.pareto > div {{ height: 620px }}
@media (min-width: 1150px) {{ .pareto {{ grid-template-columns: repeat(2, minmax(0, 1fr)) }} }}
</style><p style="color: #475569; margin: 4px 0 8px">{note}</p><div class="pareto">{plots}</div>"""


def write_html(result: dict[str, Any], path: Path) -> None:
    """Draws the trials of result.json as `write_png` does; details on hovering."""
    title = html.escape(Words.of(result, "").title)
    write_text(path, _PAGE.format(title=title, plots=fragment(result)))


def fragment(result: dict[str, Any]) -> str:
    """The plots as a part of another page, with all they need.

    Trials that were stopped early are in the legend, where a click shows them.
    """
    words = Words.of(result, "are hidden: click them in the legend")
    trials = marks(result)
    shown = [m for m in trials if m.complete]
    budget = result["budget_bytes"] / 1e9
    figures = [
        _figure(trials, lambda m: m.gigabytes, by_size(shown), "hv", words, words.size, budget),
        _figure(trials, lambda m: m.speed, by_speed(shown), "vh", words, words.speed, None),
    ]
    plots = ""
    for i, figure in enumerate(figures):
        plot = figure.to_html(full_html=False, include_plotlyjs=i == 0, default_height="100%", config=_CONFIG)
        plots += f"<div>{plot}</div>"
    return _FRAGMENT.format(note=html.escape(words.note), plots=plots)


_CONFIG = {"responsive": True, "displaylogo": False}


def _figure(
    trials: Sequence[Mark],
    x: Callable[[Mark], float],
    line: Sequence[Mark],
    steps: str,
    words: Words,
    title: str,
    budget: float | None,
) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    shown = [m for m in trials if m.complete]
    span = _span([x(m) for m in shown]), _span([math.log10(m.kl) for m in shown])
    if budget is not None:
        line_style = {"color": _BUDGET, "dash": "dash", "width": 1.5}
        ends = [10 ** (bound + far) for bound, far in zip(span[1], (-1, 1), strict=True)]
        figure.add_trace(
            go.Scatter(
                x=[budget] * 2, y=ends, mode="lines", hoverinfo="skip", name=words.budget, line=line_style
            )
        )
    figure.add_trace(
        go.Scatter(
            x=[x(m) for m in line], y=[m.kl for m in line], mode="lines", hoverinfo="skip",
            name=FRONT, line={"shape": steps, "color": _FRONT, "width": 1.5},
        )
    )  # fmt: skip
    groups: dict[str, tuple[list[Mark], dict[str, Any]]] = {}
    for form, shape in _SHAPES.items():
        own = [m for m in shown if m.form == form and not m.winner and not m.baseline]
        groups[form] = own, {"symbol": shape}
    for form, shape in _SHAPES.items():
        own = [m for m in shown if m.form == form and m.baseline and not m.winner]
        groups[f"baseline, {form}"] = own, {"symbol": shape, "line": {"color": _BASELINE, "width": 2}}
    winners = [m for m in shown if m.winner]
    groups["winner"] = winners, {"symbol": "star", "size": 19, "line": {"color": "black", "width": 1.2}}
    for name, (own, marker) in groups.items():
        if own:
            figure.add_trace(_trace(own, x, name, {"coloraxis": "coloraxis", **marker}))
    ring = {"color": "#94a3b8", "size": 10, "line": {"color": "#111827", "width": 0.9}}
    figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=UNBEATEN, marker=ring))
    stopped = [m for m in trials if not m.complete]
    if stopped:
        faint = {"symbol": [_SHAPES[m.form] for m in stopped], "size": 6, "color": "#cbd5e1"}
        trace = _trace(stopped, x, "stopped early", faint)
        figure.add_trace(trace.update(visible="legendonly"))
    figure.update_layout(
        template="plotly_white", margin={"l": 64, "r": 8, "t": 34, "b": 8},
        legend={"orientation": "h", "yanchor": "top", "y": -0.14, "x": 0},
        coloraxis={"colorscale": "Viridis", "colorbar": {
            "title": {"text": "predicted decode speed (tokens/s)", "side": "right"}, "thickness": 14}},
        annotations=_names(shown, x, span, line, steps),
    )  # fmt: skip
    figure.update_xaxes(title=title, range=span[0])
    figure.update_yaxes(title=words.kl, type="log", range=span[1], tickvals=_ticks(span[1]))
    return figure


def _ticks(span: tuple[float, float]) -> list[float]:
    """1, 2, 3 and 5 of every power of ten within the limits of a log axis."""
    powers = range(math.floor(span[0]), math.ceil(span[1]) + 1)
    return [
        float(f"{n}e{p}") for p in powers for n in (1, 2, 3, 5) if span[0] <= math.log10(n) + p <= span[1]
    ]


def _trace(own: Sequence[Mark], x: Callable[[Mark], float], name: str, marker: dict[str, Any]) -> Any:
    import plotly.graph_objects as go

    edges = [0.9 if m.on_front else 0.0 for m in own]
    drawn = {"size": 10, "color": [m.speed for m in own], "line": {"color": "#111827", "width": edges}}
    opacity = [1.0 if m.on_front or m.baseline or m.winner else 0.6 for m in own]
    return go.Scatter(
        x=[x(m) for m in own], y=[m.kl for m in own], text=[_hover(m) for m in own], hoverinfo="text",
        mode="markers", name=name, marker={**drawn, "opacity": opacity, **marker},
    )  # fmt: skip


def _hover(m: Mark) -> str:
    kind = ", ".join(filter(None, [m.form, m.baseline, "winner" if m.winner else None]))
    return (
        f"trial {m.number} ({html.escape(kind)})<br>KL {m.kl:.4f} ± {m.kl_se:.4f} nats"
        f"<br>{m.gigabytes:.2f} GB, {m.speed:.1f} tokens/s" + (f"<br>{UNBEATEN}" if m.on_front else "")
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis: the values and a margin."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.07 * (high - low) or 0.1
    return low - margin, high + margin


def _names(
    shown: Sequence[Mark],
    x: Callable[[Mark], float],
    span: tuple[tuple[float, float], tuple[float, float]],
    line: Sequence[Mark],
    steps: str,
) -> list[dict[str, Any]]:
    """Names of winners and baselines, placed for a plot of `_FRAME`."""

    def pixels(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        out = []
        for point in points:
            at = point[0], math.log10(point[1])
            u, v = (f * (a - s[0]) / (s[1] - s[0]) for f, a, s in zip(_FRAME, at, span, strict=True))
            out.append((u, v))
        return out

    those = named(shown)
    where = pixels([(x(m), m.kl) for m in those])
    front = corners([(x(m), m.kl) for m in line], first_along=steps == "hv")
    centres = place(
        where,
        [(5.9 * len(m.label or "") + 6, 16.0) for m in those],
        [14.0 if m.winner else 9.0 for m in those],
        (0.0, 0.0, *_FRAME),
        pixels([(x(m), m.kl) for m in shown]) + along(pixels(front)),
    )
    return [
        {
            "x": x(m), "y": math.log10(m.kl), "ax": c[0] - w[0], "ay": w[1] - c[1],
            "text": html.escape(m.label or ""),
            "arrowhead": 0, "arrowwidth": 0.8, "arrowcolor": "#6b7280", "standoff": 9 if m.winner else 6,
            "bgcolor": "rgba(255,255,255,0.7)", "borderpad": 0,
            "font": {"size": 11, "color": "black" if m.winner else "#9d174d"},
        }
        for m, w, c in zip(those, where, centres, strict=True)
    ]  # fmt: skip
