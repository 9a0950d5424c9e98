"""Places names beside the points of a picture, so that they cover neither each other nor the points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

Pixel = tuple[float, float]
Box = tuple[float, float, float, float]
"""left, low, right, high."""

_RADII = (0, 10, 24, 42, 66, 96, 130)
_ANGLES = tuple(range(0, 360, 15))
_COVERS_NAME, _COVERS_POINT, _LEAVES = 60.0, 4.0, 60.0


def place(
    anchors: Sequence[Pixel],
    sizes: Sequence[Pixel],
    gaps: Sequence[float],
    frame: Box,
    points: Sequence[Pixel] = (),
) -> list[Pixel]:
    """Centres of the names.

    Each name in turn, the most important first, takes the cheapest of some places around its
    anchor: near it, inside the frame, over no name placed before and over few points.

    Args:
        anchors: Where the named points are, in pixels.
        sizes: Width and height of each name.
        gaps: How far from its anchor each name has to stay: the size of what is drawn there.
        frame: What names should stay within.
        points: Everything drawn that had better stay visible.
    """
    dots = np.array([*points, *anchors], float).reshape(-1, 2)
    boxes: list[Box] = []
    centres = []
    for anchor, size, gap in zip(anchors, sizes, gaps, strict=True):
        around = _places(anchor, size, gap)
        prices = [_price(c, anchor, size, frame, dots, boxes) for c in around]
        centres.append(around[prices.index(min(prices))])
        boxes.append(_box(centres[-1], size))
    return centres


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share, in square pixels."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, wide) * max(0.0, high)


def _places(anchor: Pixel, size: Pixel, gap: float) -> list[Pixel]:
    """Centres such that the name's edge is at least one of the radii away."""
    out = []
    for radius in (gap + more for more in _RADII):
        for angle in _ANGLES:
            x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            out.append((anchor[0] + x * (radius + size[0] / 2), anchor[1] + y * (radius + size[1] / 2)))
    return out


def _box(centre: Pixel, size: Pixel) -> Box:
    half = size[0] / 2, size[1] / 2
    return centre[0] - half[0], centre[1] - half[1], centre[0] + half[0], centre[1] + half[1]


def leader(anchor: Pixel, centre: Pixel, size: Pixel, gap: float) -> tuple[Pixel, Pixel] | None:
    """The line from a point to the nearest edge of its name; None where they are side by side."""
    end = tuple(min(max(a, c - s / 2), c + s / 2) for a, c, s in zip(anchor, centre, size, strict=True))
    length = math.dist(anchor, end)
    if length < 2 * gap:
        return None
    start = tuple(a + (e - a) * gap / length for a, e in zip(anchor, end, strict=True))
    return (start[0], start[1]), (end[0], end[1])


def along(corners: Sequence[Pixel], step: float = 10.0) -> list[Pixel]:
    """Points along a line through some corners, for names to keep off it."""
    out: list[Pixel] = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        count = max(1, round(math.dist((x0, y0), (x1, y1)) / step))
        out += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]
    return out


def _price(
    centre: Pixel, anchor: Pixel, size: Pixel, frame: Box, dots: np.ndarray, placed: Sequence[Box]
) -> float:
    box = _box(centre, size)
    area = max(1.0, size[0] * size[1])
    outside = 1 - overlap(box, frame) / area
    shared = [overlap(box, other) / area for other in placed]
    names = sum(share + (share > 0) / 2 for share in shared)
    inside = (
        (dots[:, 0] > box[0] - 4) & (dots[:, 0] < box[2] + 4)
        & (dots[:, 1] > box[1] - 4) & (dots[:, 1] < box[3] + 4)
    )  # fmt: skip
    # From the anchor to the nearest edge of the name.
    away = math.hypot(
        max(0.0, box[0] - anchor[0], anchor[0] - box[2]), max(0.0, box[1] - anchor[1], anchor[1] - box[3])
    )
    return _LEAVES * outside + _COVERS_NAME * names + _COVERS_POINT * float(inside.sum()) + away / 6
