"""Puts a report together and writes it."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

from evaluators.throughput import speeds
from search.pareto_html import fragment
from search.pareto_png import write_png
from search.report import checks, pictures, tables
from search.report.diagnosis import findings
from search.report.facts import Facts
from search.report.page import Code, Heading, Interactive, Page, Picture, Table, Text
from search.report.words import summary
from spaces.budget import Budget, format_size


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
    page.add(Heading("Damage by kind of text"), pictures.by_domain(facts), tables.domain_table(facts))
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
    page.add(Heading("How to reproduce it"), *_reproduce(facts))
    return page


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
    for found in speeds(facts.problem.carry, facts.candidate, context):
        device = found.device
        budget = Budget.on(device, facts.target, size, context)
        lacks = budget.weights + budget.overhead - device.memory
        if device.name == facts.problem.device.name:
            strong.append(len(rows))
        rows.append([
            device.title, format_size(device.memory), "yes" if found.fits else f"lacks {format_size(lacks)}",
            "-" if found.tokens_per_second is None else f"{found.tokens_per_second:.1f}",
        ])  # fmt: skip
    return Table(
        ("device", "memory", f"fits, {context} tokens of context", "predicted tokens/s"), rows, strong
    )


def _reproduce(facts: Facts) -> list[Text | Code]:
    s, out = facts.opened.settings, facts.folder
    command = [
        "python", "-m", "search.run", "--budget", f"{s['budget']}B", "--study", s["study"],
        "--trials", str(s["trials"]),
        "--sampler", s["sampler"], "--seed", str(s["seed"]), "--device", s["device"]["name"],
        "--context", str(s["context"]), "--runtime", s["runtime"],
    ]  # fmt: skip
    if facts.source.name != "moefit-reference":
        command += ["--model", s["model"]]
    if s["target"] != s["model"]:
        command += ["--target", s["target"]]
    for option in ("text", "calibration", "storage"):
        if s.get(option):
            command += [f"--{option}", str(s[option])]
    if s.get("types"):
        command += ["--types", ",".join(s["types"])]
    identity = facts.opened.study.user_attrs.get("identity") or {}
    return [
        Text(
            f"The study's files lie in {out.name}/. The same command, seed and machine give the same trials; "
            f"model fingerprint {identity.get('model')}, texts {identity.get('texts')}."
        ),
        Code(
            "\n".join((
                shlex.join(command),
                f"python -m search.export --study {s['study']} --trial {facts.number}",
                f"python -m search.report --study {s['study']} --trial {facts.number}",
            ))
        ),
    ]  # fmt: skip


def write(facts: Facts, path: Path) -> list[Path]:
    """Writes `path` (.html) and its Markdown twin; returns both."""
    page, twin = build(facts), path.with_suffix(".md")
    page.write_html(path)
    page.write_markdown(twin)
    return [path, twin]
