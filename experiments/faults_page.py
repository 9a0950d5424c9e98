"""docs/faults.md: what was done to a search, what was lost, and how long it took to go on."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

_HEAD = """# Faults

What happens to a search when something breaks, as tests make it happen. Every row is written by the named test when
`python -m experiments.slow_suite` runs (all slow tests, one command; it goes on where it was cut off), and this page is
made of its results by `python -m experiments.slow_suite --docs docs/faults.md`.

In short: a search that was killed goes on with the same command and ends with the same trials and the same winner, to the
byte (with one driver; several drivers of one study ask in an order that time decides). A driver of this machine is known to
be dead at once, a driver of another one, or of this one before it was started anew, after two minutes without a sign of life.

| fault | injected | lost | median time to go on | test |
|---|---|---|---|---|
"""

_SLOW = """
## All slow tests, as they were run last

| test | outcome | time | date | commit |
|---|---|---|---|---|
"""


def page(results: Mapping[str, Any]) -> str:
    """The page as Markdown, of the content of slow_suite.json."""
    faults = [
        f"| {fault['fault']} | {fault['injected']} | {fault['lost']} | {_seconds(fault['seconds'])} | `{test}` |"
        for test, fault in _measured(results, "fault")
    ]
    tests = [
        f"| `{record['test']}` | {record['outcome']}{_why(record)} | {record['seconds']:,.0f} s | {record['date']} "
        f"| {record['commit']} |"
        for _, about in sorted(results.items())
        for record in about["tests"]
    ]
    return (
        _HEAD + "\n".join(faults) + "\n" + _soak(results) + _fuzz(results) + _SLOW + "\n".join(tests) + "\n"
    )


def _measured(results: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """(test, what it measured under a name)."""
    for _, about in sorted(results.items()):
        for record in about["tests"]:
            found = record.get("measured", {}).get(name)
            for one in found if isinstance(found, list) else [] if found is None else [found]:
                yield record["test"], one


def _seconds(value: Any) -> str:
    seconds = statistics.median(value) if isinstance(value, list) else value
    return "at once" if seconds is None or seconds < 0.1 else f"{seconds:.1f} s"


def _why(record: Mapping[str, Any]) -> str:
    return f" ({record['said'][:80]})" if record["outcome"] == "skipped" and "said" in record else ""


def _series(value: Any) -> str:
    """Of one figure for every 250 trials, the first and the last."""
    return f"{value[0]} at the beginning, {value[-1]} at the end" if isinstance(value, list) else str(value)


def _soak(results: Mapping[str, Any]) -> str:
    rows = [
        f"- {key.replace('_', ' ')}: {_series(value)}"
        for _, soak in _measured(results, "soak")
        for key, value in soak.items()
    ]
    return "\n## A study of 5,000 trials\n\n" + "\n".join(rows) + "\n" if rows else ""


def _fuzz(results: Mapping[str, Any]) -> str:
    rows = [
        f"| {fuzz['target']} | {fuzz['engine']} | {fuzz['inputs']:,} | {fuzz['faults']} |"
        for _, fuzz in _measured(results, "fuzz")
    ]
    head = "\n## Made-up inputs\n\n| target | made by | inputs | crashes, hangs, tracebacks |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n" if rows else ""
