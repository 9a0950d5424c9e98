"""What all pictures of a report share: colours, sizes, and how a figure becomes a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, GREY, RED = "#2a6f97", "#c05621", "#3f7d58", "#9ca3af", "#b91c1c"
_DPI = 110
_MOST_LABELS = 24


def figure(columns: int = 1, rows: int = 1, width: float = 10.5, height: float = 3.6, **options: Any) -> Any:
    """(figure, axes as an array) without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    options |= {"figsize": (width, height), "constrained_layout": True}
    made, axes = pyplot.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes.ravel() if rows == 1 else axes


def png(made: Any) -> bytes:
    """The figure as a PNG; it is closed."""
    from matplotlib import pyplot

    stream = io.BytesIO()
    made.savefig(stream, format="png", dpi=_DPI)
    pyplot.close(made)
    return stream.getvalue()


def plain_log(axis: Any) -> None:
    """A logarithmic x axis with numbers as people write them."""
    from matplotlib import ticker

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())


def ticks(count: int) -> np.ndarray:
    """At most some two dozen evenly spaced positions among `count`."""
    step = max(1, -(-count // _MOST_LABELS))
    return np.arange(0, count, step)


def heat_map(
    axis: Any,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    bar: str,
    *,
    write: str = "",
    **options: Any,
) -> None:
    """(R, C) values with names of both; NaN is left empty.

    Args:
        axis: Where it is drawn.
        values: (R, C).
        rows, columns: Names.
        bar: What the colour means, with its unit.
        write: Format of the numbers in the cells; none where there are many.
        options: For `imshow`.
    """
    image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="nearest", **options)
    axis.set_yticks(ticks(len(rows)), [rows[i] for i in ticks(len(rows))], fontsize=9)
    axis.set_xticks(ticks(len(columns)), [columns[i] for i in ticks(len(columns))], fontsize=9)
    axis.figure.colorbar(image, ax=axis, label=bar, fraction=0.05, pad=0.02)
    if not write or values.size > 160:
        return
    for (r, c), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axis.text(c, r, format(value, write), ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")  # fmt: skip
