"""The summary of a report, in sentences."""

from __future__ import annotations

from search.report.facts import Facts
from search.report.tables import best_rows, bits_per_weight, domains, half, interval, of_own, rivals, within
from spaces.budget import format_size


def summary(facts: Facts) -> list[str]:
    """Paragraphs: what it is, whether it is better, what it costs, whether to trust it."""
    return [text for text in (_what(facts), _better(facts), _where(facts), _trust(facts)) if text]


def _what(facts: Facts) -> str:
    plan, scores = facts.target_plan, facts.trial["scores"]
    kept, top_k = [n for _, n in plan.kept], [k for _, k in plan.top_k]
    return (
        f"Trial {facts.number} ({facts.kind}) is {facts.target.name} in {scores['target_bytes']:,} bytes "
        f"({format_size(scores['target_bytes'])}, {format_size(facts.problem.budget.limit)} allowed): "
        f"{_span(kept)} of {facts.target.experts} experts kept per layer, {_span(top_k)} of "
        f"{facts.target.top_k} active per token, {bits_per_weight(facts):.2f} bits per stored weight. On "
        f"{facts.problem.device.title} it needs {format_size(scores['device_memory_bytes'])} of "
        f"{format_size(facts.problem.device.memory)} and is predicted to decode "
        f"{scores['tokens_per_second']:.1f} tokens/s at {facts.problem.context} tokens of context."
    )


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _better(facts: Facts) -> str:
    own = facts.own
    text = "report text, which nothing was chosen on" if facts.on_report else "search text, which trials saw"
    said = (
        f"KL to the base model is {own.kl:.4f}{within(half(own))} nats per token on the {text}; "
        f"perplexity {own.perplexity:.2f}"
    )
    base = (facts.result.get("base") or {}).get("report")
    if base and facts.on_report:
        said += f" where the base model has {base['perplexity']:.2f}"
    said += f"; the most likely token is the base model's {own.top1:.1%} of the time."
    nearest = best_rows(rivals(facts))
    if nearest is None or not facts.on_report:
        return said + " There is no simple baseline with scores on the report text to compare it with."
    name, _, _, other = nearest
    if own.windows is None or other.windows is None:
        return f"{said} The best simple way, {name}, has {other.kl:.4f}."
    mean, wide = interval(other.windows - own.windows)
    verdict = "better" if mean > wide else "worse" if mean < -wide else "not told apart"
    plain = facts.quality(facts.number)
    repaired = f" (repaired; before that {plain.kl:.4f})" if facts.repaired and plain else ""
    return (
        f"{said} The best simple way, {name}, has {other.kl:.4f}: this is {verdict}{repaired}, "
        f"{own.kl / other.kl:.2f} x its KL, {mean:+.4f}{within(wide)} nats apart (paired by window, 95 %)."
    )


def _where(facts: Facts) -> str:
    rows = domains(facts)
    if len(rows) < 2:
        return ""
    worst, best = rows[0], rows[-1]
    when = "" if of_own(facts) else "before repairs "
    return (
        f"Damage {when}is not even: {worst[0]} suffers most ({worst[1]:.4f} nats), {best[0]} least "
        f"({best[1]:.4f} nats)."
    )


def _trust(facts: Facts) -> str:
    out = []
    export = facts.result.get("export")
    if export and facts.number in facts.winners and facts.form == "portable":
        check = export["llama_cpp"]
        out.append(
            f"The exported file has {export['bytes']:,} bytes, predicted were {export['predicted_bytes']:,}; "
            f"llama.cpp loads it and scores perplexity {check['perplexity']:.3f} where the evaluator has "
            f"{check['evaluator_perplexity']:.3f} on the same tokens."
        )
    elif facts.form != "portable":
        out.append(
            "Its layers differ in expert count or top-k, which stock llama.cpp does not run: such a config "
            "becomes a folder that compression.load opens in transformers."
        )
    rho = facts.result["trial_stage"].get("rank_correlation")
    if rho is not None:
        out.append(
            f"The predictor ranked the newest trials with Spearman {rho:.2f} against what was measured."
        )
    if facts.target.name != facts.source.name:
        out.append(
            f"Bytes, memory and tokens/s are {facts.target.name}'s; quality is that of "
            f"{facts.source.name}, on which the decisions were searched."
        )
    out.append("tokens/s are predicted from the device's published bandwidth, not measured.")
    out += facts.result.get("notes") or []
    return " ".join(out)
