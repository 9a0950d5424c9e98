"""What a person sees: progress bars while it runs, tables at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from spaces.budget import format_size
from spaces.inventory import Inventory

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=120)  # a log file has no width of its own


class Stages:
    """Times each stage and draws its bar.

    Attributes:
        taken: Stage name to seconds and peak memory.
    """

    def __init__(self, peak: Callable[[], int]) -> None:
        self.peak = peak
        self.taken: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """A bar for a stage; yields `advance(done, total, note="")`."""
        columns = (
            TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        started, last = time.monotonic(), ""
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(name, total=None, note="")

            def advance(done: int, total: int, note: str = "") -> None:
                nonlocal last
                last = note
                progress.update(task, completed=done, total=total, note=note)

            yield advance
        seconds = time.monotonic() - started
        self.taken[name] = {"seconds": round(seconds, 2), "peak_memory_bytes": self.peak()}
        console.print(f"{name:<22} {seconds:7.1f} s  {last}")


def describe(inventory: Inventory) -> str:
    """One line on a model."""
    return (
        f"{inventory.name}: {inventory.parameters() / 1e9:.4g}B parameters, {len(inventory.moe_layers)} MoE "
        f"layers of {inventory.experts} experts, top-{inventory.top_k}"
    )


def problem_table(problem: Any) -> Table:
    """Inventory, budget and device of a problem."""
    table = Table(show_header=False, box=None, pad_edge=False)
    budget = problem.budget
    rows = [
        ("searched", describe(problem.source)),
        ("target", describe(problem.target)),
        ("device", f"{problem.device.title}: {format_size(budget.device_memory)}"),
        ("weights", f"{format_size(budget.weights)} (--budget)"),
        ("KV cache", f"{format_size(budget.kv_cache)} for {budget.context} tokens"),
        ("compute buffer", f"{format_size(budget.compute_buffer)} (estimate)"),
        ("reserve", format_size(budget.reserve)),
        ("left free", format_size(budget.device_memory - budget.weights - budget.overhead)),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def front_table(trials: Sequence[dict[str, Any]], chosen: Sequence[int], limit: int = 12) -> Table:
    """The Pareto front, lowest KL first."""
    table = Table(title="Pareto front (KL of the searched model; bytes and tokens/s of the target)")
    for column in ("trial", "form", "kept", "top-k", "KL (nats)", "perplexity", "top-1", "GB", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    by_number = {t["number"]: t for t in trials}
    for number in chosen[:limit]:
        trial = by_number[number]
        layers, s = trial["candidate"]["layers"], trial["scores"]
        table.add_row(
            str(number),
            trial["baseline"] or ("portable" if trial["portable"] else "ragged"),
            _span([len(m["experts"]) for m in layers]),
            _span([m["top_k"] for m in layers]),
            f"{s['kl']:.4f} ± {s['kl_se']:.4f}",
            f"{s['perplexity']:.2f}",
            f"{s['top1']:.1%}",
            f"{s['target_bytes'] / 1e9:.2f}",
            f"{s['tokens_per_second']:.1f}",
        )
    if len(chosen) > limit:
        table.caption = f"{len(chosen) - limit} more in result.json"
    return table


def comparison_table(rows: Sequence[tuple[str, dict[str, Any], dict[str, float]]]) -> Table:
    """Winner against baselines on the report text."""
    table = Table(title="On the report text, which nothing was chosen on")
    for column in ("config", "KL (nats)", "perplexity", "top-1", "GB", "KL - winner's (95 %)"):
        table.add_column(column, justify="left" if column == "config" else "right", no_wrap=True)
    for name, scores, difference in rows:
        delta = (
            f"+{difference['kl_difference']:.4f} ± {difference['kl_difference_95']:.4f}"
            if difference else ""
        )  # fmt: skip
        table.add_row(
            name,
            f"{scores['kl']:.4f} ± {scores['kl_se']:.4f}",
            f"{scores['perplexity']:.2f}",
            f"{scores['top1']:.1%}",
            f"{scores['target_bytes'] / 1e9:.2f}",
            delta.replace("+-", "-"),
        )
    return table


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
