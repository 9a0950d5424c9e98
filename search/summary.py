"""The last lines of a run: what won, by how much, where it lies and how to go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from search.console import console
from search.options import Options
from spaces.budget import format_size


def show(
    result: dict[str, Any],
    options: Options,
    tracking_uri: str,
    predicted: Sequence[tuple[float, float]],
    knapsack: bool,
) -> None:
    """Prints the summary of a finished run."""
    comparison = result["comparison"]
    simple = {n: c for n, c in comparison.items() if not n.startswith("knapsack")}
    if simple:
        name, nearest = min(simple.items(), key=lambda item: item[1]["kl"])
        console.print(
            f"winner: {nearest['kl_ratio']:.2f} x the KL of the best simple baseline ({name}), "
            f"{nearest['kl_difference']:+.4f} ± {nearest['kl_difference_95']:.4f} nats apart"
        )
    if knapsack and len(predicted) > 2:
        rho = spearmanr([p for p, _ in predicted], [k for _, k in predicted]).statistic
        console.print(f"additive model against measured KL: Spearman {rho:.2f} over {len(predicted)} trials")
    if result["target"] != result["model"]:
        console.print(
            f"bytes, memory and tokens/s are {result['target']}'s; quality is that of {result['model']}, "
            "on which the decisions were searched"
        )
    for row, scores in result["tasks"].items():
        name = {"base": "base", "gguf": "llama.cpp"}.get(row, f"trial {row}")
        console.print(f"lm-eval {name:<10} {'  '.join(_score(t, s) for t, s in scores.items())}")
    if len(result["tasks"]) > 1:
        console.print("in brackets: difference from base over the same items")
    export = result["export"]
    if export:
        check = export["llama_cpp"]
        console.print(
            f"GGUF: {_short(Path(export['path']))} ({format_size(export['bytes'])}, "
            f"{export['bytes'] - export['predicted_bytes']} bytes off the prediction); llama.cpp loads it, "
            f"perplexity {check['perplexity']:.3f}, evaluator {check['evaluator_perplexity']:.3f}"
        )
    total = sum(s["seconds"] for s in result["stages"].values())
    peak = max(s["peak_memory_bytes"] for s in result["stages"].values())
    console.print(f"files: {_short(options.out)}  ({total:.0f} s, peak {format_size(peak)} per process)\n")
    storage = f" --storage {options.storage}" if options.storage else ""
    if not options.storage and options.out != (Path("runs") / options.study).resolve():
        storage = f" --storage {_short(options.out / 'study.journal')}"
    # Printed plain, so that a terminal's width never breaks a command in two.
    print(f"mlflow ui --host 127.0.0.1 --backend-store-uri {tracking_uri}")
    print(f"python -m search.export --study {options.study} --trial best{storage}")


def _score(task: str, score: dict[str, Any]) -> str:
    """A task's score, and its difference from the base model's where items are paired."""
    paired = ""
    if "difference" in score:
        paired = f" ({score['difference']:+.3f}{spread(score['difference_se'])})"
    return f"{task} {score['value']:.3f}{spread(score['standard_error'])}{paired}"


def spread(error: float | None) -> str:
    """A standard error as it follows a figure; nothing where there is none."""
    return "" if error is None else f" ± {error:.3f}"


def _short(path: Path) -> str:
    """Relative to the current folder where that is shorter."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
