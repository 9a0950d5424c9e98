"""What is wrong with a trial, in words: what costs most, which failure it shows, what to try next.

Signs of failure are those the paper names (arXiv 2509.25689): accuracy collapses from
over-pruning or from too few bits, or the model is too slow for the device, or does not
fit. Here they are read off measured contributions, not guessed from ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

from search.report.checks import READING
from search.report.facts import Facts
from search.report.tables import bytes_by_role
from spaces.budget import format_size

_COLLAPSE = 1.0  # nats: the perplexity of a text is then about e times the base model's
_DAMAGED = 0.2
_LITTLE_MASS = 0.75
_INTERACTION = 0.25  # of the whole damage


@dataclass(frozen=True)
class Finding:
    """One sentence of a diagnosis; `sign` is the failure it shows, or empty."""

    text: str
    sign: str = ""


def findings(facts: Facts) -> list[Finding]:
    """The diagnosis of a trial."""
    return [*_cost(facts), *_failures(facts), *_routing(facts), *_next(facts)]


def _parts(facts: Facts) -> dict[tuple[str, str], float]:
    return {(p["kind"], p["name"]): float(p["kl"]) for p in facts.evidence["parts"]}


def _levers(facts: Facts) -> dict[str, float]:
    """KL of each lever: the mean of what it costs alone and of what it costs on top of the others."""
    parts = _parts(facts)
    whole = parts["all", ""]
    names = [name for kind, name in parts if kind == "only"]
    return {n: max(0.0, (parts["only", n] + whole - parts["without", n]) / 2) for n in names}


_NAMES = {"experts": "pruning", "top-k": "fewer active experts", "types": "quantization"}


def _cost(facts: Facts) -> list[Finding]:
    """What costs most, in which role and layer."""
    parts, levers = _parts(facts), _levers(facts)
    whole = parts["all", ""]
    if whole <= 0:
        return [Finding("Nothing is damaged: the trial is the base model.")]
    total = sum(levers.values()) or 1.0
    first = max(levers, key=lambda n: levers[n])
    shares = ", ".join(
        f"{_NAMES[n]} {100 * v / total:.0f} %"
        for n, v in sorted(levers.items(), key=lambda i: -i[1])
        if v > 0
    )
    out = [Finding(f"{_NAMES[first].capitalize()} costs most. Shares of the damage: {shares}.")]
    roles = {n: v for (k, n), v in parts.items() if k == "role"}
    types = {n: v for (k, n), v in parts.items() if k == "layer types"}
    pruning = {n: v for (k, n), v in parts.items() if k == "layer experts"}
    role, layer = max(roles, key=lambda n: roles[n]), max(types, key=lambda n: types[n])
    out.append(
        Finding(
            f"Of the types, those of the {role} cost most ({roles[role]:.4f} nats alone), and those of layer "
            f"{layer} ({types[layer]:.4f} nats alone)."
        )
    )
    worst = max(pruning, key=lambda n: pruning[n])
    if pruning[worst] > 0:
        kept = {str(m.layer): len(m.experts) for m in facts.candidate.layers}[worst]
        out.append(
            Finding(
                f"Of the pruned layers, layer {worst} costs most ({pruning[worst]:.4f} nats alone, {kept} of "
                f"{facts.source.experts} experts kept)."
            )
        )
    both = whole - sum(parts["only", n] for n in levers)
    if abs(both) > _INTERACTION * whole:
        out.append(
            Finding(
                f"The levers {'make each other worse' if both > 0 else 'overlap'}: together they cost "
                f"{whole:.4f} nats, one by one {whole - both:.4f}."
            )
        )
    return out


def _failures(facts: Facts) -> list[Finding]:
    """Which failure it shows."""
    out, levers = [], _levers(facts)
    kl, scores = facts.own.kl, facts.trial["scores"]
    first = max(levers, key=lambda n: levers[n])
    cause = {
        "experts": ("collapse from over-pruning", "too many experts are gone"),
        "top-k": ("collapse from too few active experts", "tokens reach too few experts"),
        "types": ("collapse from too few bits", "weights have too few bits"),
    }[first]
    if kl >= _COLLAPSE:
        out.append(Finding(f"Accuracy collapses (KL {kl:.2f} nats): {cause[1]}.", cause[0]))
    elif kl >= _DAMAGED:
        out.append(
            Finding(
                f"Accuracy is damaged (KL {kl:.2f} nats) but has not collapsed; the way to collapse would be "
                f"that {cause[1]}."
            )
        )
    else:
        out.append(Finding(f"No sign of collapse (KL {kl:.3f} nats)."))
    budget, device = facts.problem.budget, facts.problem.device
    need = scores["target_bytes"] + budget.overhead
    if scores["target_bytes"] > budget.limit or need > device.memory:
        out.append(
            Finding(
                f"It does not fit {device.title}: {format_size(need)} of {format_size(device.memory)}, "
                "KV cache and reserve counted.",
                "does not fit",
            )
        )
    speed = scores["tokens_per_second"]
    if speed < READING:
        out.append(
            Finding(
                f"It is too slow for {device.title}: {speed:.1f} tokens/s are predicted, people read at "
                f"{READING:g}.",
                "too slow",
            )
        )
    return out


def _routing(facts: Facts) -> list[Finding]:
    """Layers whose router lost much of what it chose."""
    rows = facts.evidence["routing"]
    worst = min(rows, key=lambda r: r["kept_mass"])
    text = (
        f"Routing: layer {worst['layer']} lost most, {worst['kept_mass']:.0%} of the base model's gates "
        "go to "
        f"experts still there, and {worst['agreement']:.0%} of its choices are made again."
    )
    return [Finding(text, "router starved" if worst["kept_mass"] < _LITTLE_MASS else "")]


def _next(facts: Facts) -> list[Finding]:
    """What to try: bytes from the lever where they are dear to the one where they are cheap."""
    levers = _levers(facts)
    sizes = bytes_by_role(facts)
    whole, pruned, now = (sum(v[i] for v in sizes.values()) for i in range(3))
    out = []
    saved = {"experts": whole - pruned, "types": pruned - now}
    rate = {n: levers[n] / (b / 1e9) for n, b in saved.items() if b > 0}
    if len(rate) == 2:
        dear, cheap = sorted(rate, key=lambda n: -rate[n])
        if rate[dear] > 1.5 * rate[cheap]:
            advice = {
                "experts": "keep more experts and pay with fewer bits",
                "types": "give more bits and pay with more pruning",
            }[dear]
            out.append(
                Finding(
                    f"Next: on average a GB saved by {_NAMES[dear]} costs {rate[dear] / rate[cheap]:.1f} "
                    "x what one "
                    f"saved by {_NAMES[cheap]} does, so {advice}, in the layers named above first; more "
                    "trials "
                    "look for that on their own."
                )
            )
    elif "experts" not in rate:
        out.append(Finding("Next: nothing is pruned here; with a smaller budget pruning would begin to pay."))
    out.append(_other_budgets(facts))
    if facts.number in facts.winners and not facts.repaired:
        out.append(
            Finding("Next: repairs are off or did not pay; --repair auto re-fits scales, norms and routers.")
        )
    return out


def _other_budgets(facts: Facts) -> Finding:
    """What other budgets would give, by the additive model over the whole space."""
    from search.allocator import Allocator
    from spaces.allocation import InfeasibleError

    limit, model = facts.problem.budget.limit, facts.costs
    found = []
    for share in (0.85, 1.0, 1.15, 1.3):
        try:
            allocator = Allocator(facts.space, model, facts.problem.carry, int(limit * share))
            params = allocator.draw(
                model.costs, facts.form if facts.form in facts.space.forms else facts.space.forms[0]
            )
        except InfeasibleError:
            continue
        found.append((limit * share, model.predict(params)))
    here = dict(found).get(limit * 1.0)
    if not here:
        return Finding("Next: no other budget near this one could be predicted.")
    others = ", ".join(f"{format_size(b)} {k / here:.2f} x" for b, k in found if b != limit * 1.0)
    return Finding(
        f"Other budgets, the least KL the additive model predicts there, over that at this budget: {others}."
    )
