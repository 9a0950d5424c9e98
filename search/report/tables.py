"""Tables of a report, from facts to the text of cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from evaluators.contributions import role_of
from search.report.facts import Facts, Quality
from search.report.page import Table
from search.summary import spread
from spaces.budget import format_size

_Z95 = 1.96
_BASE_TYPE = "BF16"


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and the half width of its 95 % interval (Student's t); NaN of one value."""
    n = len(values)
    if n < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(student.ppf(0.975, n - 1) * values.std(ddof=1)) / math.sqrt(n)


def half(found: Quality) -> float:
    """Half width of the 95 % interval of a KL; NaN where there is none."""
    return _Z95 * found.kl_se if found.windows is None else interval(found.windows)[1]


def within(value: float) -> str:
    """A half width as it follows a figure."""
    return "" if math.isnan(value) else f" ± {value:.4f}"


def rivals(facts: Facts) -> list[tuple[str, int, bool, Quality]]:
    """(label, trial, repaired, scores) of the trial, the winners and every baseline, best first."""
    out = []
    for number in sorted(facts.winners | {facts.number}):
        record = next(t for t in facts.result["trials"] if t["number"] == number)
        form = "portable" if record["portable"] else "ragged"
        name = record.get("baseline")
        kind = ("winner" if number in facts.winners else "trial") + (f" (baseline {name})" if name else "")
        for repaired in (True, False):
            if repaired and not facts.result["repairs"].get(str(number), {}).get("used"):
                continue
            found = facts.quality(number, repaired)
            if found is not None:
                label = f"{kind}, {form}{', repaired: as exported' if repaired else ''}"
                out.append((label, number, repaired, found))
    for name, number in facts.result["baselines"].items():
        found = facts.quality(number)
        if found is not None and number not in facts.winners | {facts.number}:
            out.append((f"baseline {name}", number, False, found))
    return sorted(out, key=lambda row: row[3].kl)


def comparison(facts: Facts) -> Table:
    """The trial against the winners and all baselines on the report text, paired by window."""
    rows, strong = list[list[str]](), list[int]()
    by_number = {t["number"]: t for t in facts.result["trials"]}
    for label, number, repaired, found in rivals(facts):
        record = by_number[number]
        kept = [len(m["experts"]) for m in record["candidate"]["layers"]]
        difference = "-"
        if found.windows is not None and facts.own.windows is not None and facts.on_report:
            mean, wide = interval(found.windows - facts.own.windows)
            difference = f"{mean:+.4f}{within(wide)}" if mean else "0"
        if (number, repaired) == (facts.number, facts.repaired):
            strong.append(len(rows))
        scores = record["scores"]
        rows.append([
            label, str(number), f"{found.kl:.4f}{within(half(found))}", difference,
            f"{found.perplexity:.2f}", f"{found.top1:.1%}",
            str(kept[0]) if len(set(kept)) == 1 else f"{min(kept)}-{max(kept)}",
            f"{scores['target_bytes'] / 1e9:.2f}", f"{scores['tokens_per_second']:.1f}",
        ])  # fmt: skip
    header = (
        "config", "trial", "KL (nats/token, 95 %)", "KL above this one (95 %)", "perplexity",
        "top-1 agreement",
        f"experts kept of {facts.source.experts}", "target (GB)", "tokens/s",
    )  # fmt: skip
    return Table(header, rows, strong)


def domains(facts: Facts) -> list[tuple[str, float, float, int]]:
    """(source, KL, half width of 95 %, windows) of the trial by kind of text, worst first."""
    kl, sources = facts.own.windows, facts.sources
    if kl is None or not of_own(facts):
        windows = facts.evidence["windows"]
        kl, sources = np.array(windows["kl"]), tuple(windows["sources"])
    found = {}
    for source in dict.fromkeys(sources):
        some = kl[[s == source for s in sources]]
        found[source] = (*interval(some), len(some))
    return sorted(((s, *v) for s, v in found.items()), key=lambda row: -row[1])


def of_own(facts: Facts) -> bool:
    """Whether damage by kind of text is of the trial as it ships; otherwise it is of its evidence."""
    return facts.on_report and facts.own.windows is not None


def domain_table(facts: Facts) -> Table:
    """Damage by kind of text."""
    rows = [
        [source, f"{kl:.4f}", within(wide).strip() or "-", str(n)] for source, kl, wide, n in domains(facts)
    ]
    return Table(("kind of text", "KL (nats/token)", "95 %", "windows"), rows, (0,))


def bytes_by_role(facts: Facts) -> dict[str, tuple[int, int, int]]:
    """Role to target bytes of (the whole model in BF16, after pruning still in BF16, as compressed)."""
    plan = facts.target_plan
    kept, types, out = dict(plan.kept), dict(plan.types), dict[str, tuple[int, int, int]]()
    for t in facts.target.tensors:
        experts = kept.get(t.layer) if t.layer is not None and t.per_expert else None
        now = types[t.name] if t.quantizable else t.fixed_type
        plain = _BASE_TYPE if t.quantizable else t.fixed_type
        role = role_of(t) if t.quantizable else "norms, router, biases"
        before = out.get(role, (0, 0, 0))
        sizes = t.bytes(plain), t.bytes(plain, experts), t.bytes(now, experts)
        out[role] = (before[0] + sizes[0], before[1] + sizes[1], before[2] + sizes[2])
    return out


def bytes_table(facts: Facts) -> Table:
    """Where the bytes went."""
    rows, plan = [], facts.target_plan
    found = bytes_by_role(facts)
    weights = _weights_by_role(facts)
    for role, (whole, pruned, now) in sorted(found.items(), key=lambda item: -item[1][2]):
        stored = weights[role]
        rows.append([
            role, format_size(whole), format_size(whole - pruned), format_size(pruned - now),
            format_size(now), f"{8 * now / stored:.2f}" if stored else "-",
        ])  # fmt: skip
    whole, pruned, now = (sum(v[i] for v in found.values()) for i in range(3))
    size = facts.target.file_bytes(plan)
    rows.append(["metadata and padding", "", "", "", format_size(size - now), "-"])
    rows.append([
        "file", format_size(whole), format_size(whole - pruned), format_size(pruned - now),
        f"{size:,} bytes", f"{bits_per_weight(facts):.2f}",
    ])  # fmt: skip
    header = ("tensors", "in BF16", "saved by pruning", "saved by types", "left", "bits per weight")
    return Table(header, rows, (len(rows) - 1,))


def bits_per_weight(facts: Facts) -> float:
    """Of the target's stored weights, pruned ones not counted."""
    return 8 * sum(v[2] for v in bytes_by_role(facts).values()) / sum(_weights_by_role(facts).values())


def _weights_by_role(facts: Facts) -> dict[str, int]:
    """Weights of the target that are stored, by role."""
    kept, out = dict(facts.target_plan.kept), dict[str, int]()
    for t in facts.target.tensors:
        experts = kept.get(t.layer) if t.layer is not None and t.per_expert else None
        role = role_of(t) if t.quantizable else "norms, router, biases"
        out[role] = out.get(role, 0) + math.prod(t.kept_shape(experts))
    return out


def tasks_table(facts: Facts) -> Table | None:
    """lm-eval scores beside the base model's, differences paired by item where the run kept them."""
    found = facts.result.get("tasks") or {}
    if not found:
        return None
    rows = []
    for name, scores in found.items():
        label = {"base": "base model", "gguf": "exported GGUF in llama.cpp"}.get(name, f"trial {name}")
        for task, s in scores.items():
            paired = "-"
            if s.get("difference") is not None:
                paired = f"{s['difference']:+.3f}{spread(s['difference_se'])}"
            rows.append([
                f"{label}: {task}", s["metric"], f"{s['value']:.3f}{spread(s['standard_error'])}", paired,
                str(s["items"]),
            ])  # fmt: skip
    return Table(("task", "metric", "score ± SE", "minus base ± SE, paired", "items"), rows)


def layer_table(facts: Facts) -> Table:
    """Experts, top-k, routing and damage of every MoE layer."""
    parts = {(p["kind"], p["name"]): p["kl"] for p in facts.evidence["parts"]}
    routing = {r["layer"]: r for r in facts.evidence["routing"]}
    rows = []
    for m in facts.candidate.layers:
        r = routing[m.layer]
        rows.append([
            str(m.layer), f"{len(m.experts)} of {facts.source.experts}", str(m.top_k),
            f"{r['kept_mass']:.1%}", f"{r['agreement']:.1%}",
            f"{abs(r['entropy_base']):.2f} to {abs(r['entropy']):.2f}",
            f"{parts['layer experts', str(m.layer)]:.4f}", f"{parts['layer types', str(m.layer)]:.4f}",
        ])  # fmt: skip
    header = (
        "layer", "experts kept", "top-k", "routed mass kept", "same experts chosen",
        "gate entropy (nats)", "KL of its experts and top-k alone", "KL of its types alone",
    )  # fmt: skip
    return Table(header, rows)


def best_rows(rows: Sequence[tuple[str, int, bool, Quality]]) -> tuple[str, int, bool, Quality] | None:
    """The best baseline that is a simple way of doing it (not this project's own start)."""
    simple = [r for r in rows if r[0].startswith("baseline ") and "knapsack" not in r[0]]
    return simple[0] if simple else None
