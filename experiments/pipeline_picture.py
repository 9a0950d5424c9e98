"""The picture of docs/concepts.md: `python -m experiments.pipeline_picture docs/pictures/pipeline.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from compression.files import atomic
from search.report import draw

STEPS = (
    ("inventory", "config.json:\nevery tensor's\nexact bytes"),
    ("calibration", "routing statistics,\nimatrix, sets of\nexperts to keep"),
    ("bank", "every tensor in\nevery GGUF type,\nquantized once"),
    ("costs", "what each option\nalone does to KL,\nby gradients"),
    ("trials", "ask: knapsack on a\ndraw of the belief\nscore: KL by rungs"),
    ("finals", "winners on text\nno trial saw; report\non text of its own"),
    ("repair", "scales, norms and\nrouters re-fitted,\nsame bytes"),
    ("export", "GGUF for llama.cpp,\nfolder for ragged,\nreport, MLflow"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    made, (axis,) = draw.figure(width=13.5, height=2.0)
    axis.set_axis_off()
    axis.set_xlim(-0.1, len(STEPS) - 0.1)
    axis.set_ylim(-0.12, 1.12)
    for i, (name, text) in enumerate(STEPS):
        looped = name == "trials"
        box = {
            "boxstyle": "round,pad=0.55",
            "fc": "#fdf1ea" if looped else "#eef6fb",
            "ec": draw.ORANGE if looped else draw.BLUE,
        }
        axis.text(i + 0.4, 0.55, text, ha="center", va="center", fontsize=9.5, linespacing=1.35, bbox=box)
        axis.text(i + 0.4, 1.0, name, ha="center", fontsize=11, weight="bold", color="#111827")
        if i:
            axis.annotate(
                "", (i - 0.04, 0.55), (i - 0.17, 0.55), arrowprops={"arrowstyle": "->", "color": "#6b7280"}
            )
    axis.annotate(
        "", (3.98, 0.2), (4.82, 0.2),
        arrowprops={"arrowstyle": "->", "color": draw.ORANGE, "connectionstyle": "arc3,rad=-0.45"},
    )  # fmt: skip
    axis.text(4.4, -0.12, "every trial corrects the belief", ha="center", fontsize=8.5, color=draw.ORANGE)
    with atomic(parser.parse_args().out) as stream:
        stream.write(draw.png(made))


if __name__ == "__main__":
    main()
