"""Puts a report together and writes it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from evaluators.throughput import Throughput
from search.pareto_html import fragment
from search.pareto_png import write_png
from search.report import checks, pictures, tables
from search.report.diagnosis import findings
from search.report.facts import Facts
from search.report.page import Heading, Interactive, Page, Picture, Table, Text
from search.report.reproduce import reproduce
from search.report.words import summary
from spaces.budget import Budget, format_size
from spaces.devices import DEVICES


def build(facts: Facts) -> Page:
    """The whole page."""
    page = Page(
        f"{facts.target.name} at {format_size(facts.result['budget_bytes'])}: {facts.label} of study "
        f"{facts.result['study']}"
    )
    page.add(Heading("In words"), *map(Text, summary(facts)))
    page.add(Heading("Pareto front"), _front(facts))
    page.add(Heading("Against the baselines"), pictures.against(facts), tables.comparison(facts))
    page.add(Heading("Layer by layer"), pictures.layers(facts), tables.layer_table(facts))
    page.add(Heading("Where the bytes went"), pictures.bytes_left(facts), tables.bytes_table(facts))
    page.add(Heading("Speed on each device"), device_table(facts), checks.activation_counts(facts))
    page.add(
        Heading("Damage by kind of text"), _note(facts), pictures.by_domain(facts), tables.domain_table(facts)
    )
    tasks = tables.tasks_table(facts)
    page.add(Heading("lm-eval tasks"), tasks or Text("No tasks were scored; --tasks names some."))
    page.add(
        Heading("Diagnosis"),
        *(Text(f.text + (f" Sign: {f.sign}." if f.sign else "")) for f in findings(facts)),
    )
    page.add(Heading("What each component costs"), checks.contributions(facts))
    page.add(Heading("Experts and routing"), checks.activation(facts), checks.stability(facts))
    page.add(Heading("Quantization error"), pictures.errors(facts))
    page.add(Heading("Sensitivity by layer"), checks.sensitivity(facts))
    page.add(Heading("How to reproduce it"), *reproduce(facts))
    return page


def _note(facts: Facts) -> Text | None:
    """What the damage by kind of text is of, where it is not of the trial as it ships."""
    if tables.of_own(facts):
        return None
    tokens = facts.evidence["tokens"]["parts"]
    return Text(f"Before repairs, on {tokens:,} tokens of the report text.")


def _front(facts: Facts) -> Interactive:
    """The study's plot, interactive where that can be."""
    caption = (
        "Every complete trial: KL on the search text against the target's size and predicted speed. On the "
        "front are those that no other trial beats in all three."
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pareto.png"
        write_png(facts.result, path)
        return Interactive(fragment(facts.result), Picture("pareto", path.read_bytes(), caption))


def device_table(facts: Facts) -> Table:
    """Predicted speed and fit on every device."""
    size, context = facts.target.file_bytes(facts.target_plan), facts.problem.context
    rows, strong = list[list[str]](), list[int]()
    own = facts.problem.device
    for device in (own if d.name == own.name else d for d in DEVICES.values()):
        budget = Budget.on(device, facts.target, size, context)
        lacks = budget.weights + budget.overhead - device.memory
        speed = Throughput(facts.problem.carry, device, context).evaluate(facts.candidate)
        if device is own:
            strong.append(len(rows))
        rows.append([
            device.title, format_size(device.memory), "yes" if budget.fits else f"lacks {format_size(lacks)}",
            f"{speed['tokens_per_second']:.1f}" if budget.fits else "-",
        ])  # fmt: skip
    return Table(
        ("device", "memory", f"fits, {context} tokens of context", "predicted tokens/s"), rows, strong
    )


def write(facts: Facts, path: Path) -> list[Path]:
    """Writes `path` (.html) and its Markdown twin; returns both."""
    page, twin = build(facts), path.with_suffix(".md")
    page.write_html(path)
    page.write_markdown(twin)
    return [path, twin]
