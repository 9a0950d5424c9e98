"""What is wrong with a trial, in words: what costs most, which failure it shows, what to try next.

Signs of failure are those the paper names (arXiv 2509.25689): accuracy collapses from
over-pruning or from too few bits, or the model is too slow for the device, or does not
fit. Here they are read off measured contributions, not guessed from ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

from search.report.checks import READING
from search.report.facts import Facts
from search.report.tables import bits_per_weight
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
        m = next(m for m in facts.candidate.layers if str(m.layer) == worst)
        out.append(
            Finding(
                f"Of what was done to experts, layer {worst} costs most ({pruning[worst]:.4f} nats alone: "
                f"{len(m.experts)} of {facts.source.experts} experts kept, {m.top_k} of "
                f"{facts.source.top_k} active)."
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
        f"Routing: layer {worst['layer']} lost most, {worst['kept_mass']:.0%} of the base model's gates go "
        f"to experts still there, and {worst['agreement']:.0%} of its choices are made again."
    )
    return [Finding(text, "router starved" if worst["kept_mass"] < _LITTLE_MASS else "")]


def _next(facts: Facts) -> list[Finding]:
    """What to try: what the winner does otherwise, and what other budgets would give."""
    out = [_beside_winner(facts), _other_budgets(facts)]
    if facts.number in facts.winners and facts.opened.settings.get("repair") == "none":
        out.append(Finding("Next: --repair auto re-fits scales, norms and routers at no bytes."))
    return [f for f in out if f is not None]


def _beside_winner(facts: Facts) -> Finding | None:
    """How a trial differs from the winner of its form; None where it is the winner."""
    number = facts.result["winners"].get(facts.form)
    if number is None or number == facts.number:
        return None
    winner = Facts(facts.opened, facts.result, number)
    own, theirs = (_shape(f) for f in (facts, winner))
    kl = winner.quality(number)
    return Finding(
        f"Next: the {facts.form} winner, trial {number}, keeps {theirs[0]:.1f} experts per layer (this one "
        f"{own[0]:.1f}), activates {theirs[1]:.1f} ({own[1]:.1f}) and has {theirs[2]:.2f} bits per weight "
        f"({own[2]:.2f})" + (f"; its KL is {kl.kl:.4f}, before repairs." if kl else ".")
    )


def _shape(facts: Facts) -> tuple[float, float, float]:
    """Means over layers of experts kept and active, and bits per stored weight."""
    layers = facts.candidate.layers
    kept = sum(len(m.experts) for m in layers) / len(layers)
    return kept, sum(m.top_k for m in layers) / len(layers), bits_per_weight(facts)


def _other_budgets(facts: Facts) -> Finding | None:
    """What other budgets would give, by the additive model over the whole space."""
    from search.allocator import Allocator
    from spaces.allocation import InfeasibleError

    budget, model = facts.problem.budget, facts.costs
    form = facts.form if facts.form in facts.space.forms else facts.space.forms[0]
    most = min(
        facts.problem.device.memory - budget.overhead,
        facts.target.file_bytes(facts.target.uniform_plan("BF16")),
    )
    found = {}
    for share in (1.0, 0.85, 1.15, 1.3):
        limit = int(budget.limit * share)
        if limit > max(most, budget.limit):
            continue
        try:
            allocator = Allocator(facts.space, model, facts.problem.carry, limit)
            found[limit] = model.predict(allocator.draw(model.costs, form))
        except InfeasibleError:
            continue
    here = found.pop(budget.limit, None)
    if not here or not found:
        return None
    others = ", ".join(f"{format_size(b)} {k / here:.2f} x" for b, k in sorted(found.items()))
    return Finding(
        f"Other budgets, the least KL the additive model predicts there, over that at this budget: {others}."
    )
