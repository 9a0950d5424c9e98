"""A study's outcome in MLflow: finalists' scores, the winner's figures and files, the registered model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from search.registry import register, sha256
from search.tracking_view import TRAINING, view_link
from search.trial_row import FINAL, metrics
from spaces.budget import format_size
from spaces.space import PORTABLE

if TYPE_CHECKING:
    from search.engine import Running
    from search.outcome import Verdict

_PICTURES = ("pareto.html", "pareto.png", "result.json", "report.html", "report.md")
_WINNER = ("candidate.json", "recipe.json", "tensor-types.txt")
_STATIC = ("target_bytes", "model_bytes", "device_memory_bytes", "tokens_per_second")


def track(run: Running, verdict: Verdict) -> None:
    """Writes all that is known once the run's folder is finished."""
    options, tracker = run.search.options, run.tracker
    for number, trial in verdict.chosen.items():
        tracker.log_report(trial, *_finals(verdict, number))
    best = verdict.best
    quality = verdict.repairs[best]["report"] if verdict.repaired(best) else verdict.report[best]
    static = verdict.chosen[best].user_attrs["scores"]
    figures = metrics(quality, "winner_report_", FINAL) | metrics(static, "winner_", _STATIC)
    form = PORTABLE if verdict.won[PORTABLE] is not None else "ragged"
    note = (
        f"**{run.search.problem.source.name} for {run.search.problem.target.name} at "
        f"{format_size(options.budget)}** on {options.device.name}. Winner: trial {best} ({form}"
        f"{', repaired' if verdict.repaired(best) else ''}), KL {quality['kl']:.4f} nats per token and "
        f"perplexity {quality['perplexity']:.2f} on the report text, "
        f"{format_size(static['target_bytes'])}, {static['tokens_per_second']:.1f} tokens/s predicted."
    )
    home = f"#/experiments/{tracker.experiment}/runs/{tracker.parent}/artifacts"
    front = f"[Pareto front]({home}/pareto.html?{TRAINING})"
    links = f"[Complete trials by KL]({view_link(tracker.experiment)}) | {front}"
    winner = [options.out / "winner" / name for name in _WINNER] if options.export else []
    files = {
        "": [options.out / name for name in _PICTURES],
        "report_pictures": sorted((options.out / "report_pictures").glob("*")),
        "winner": winner,
    }
    tracker.finish(figures, files, f"{note}\n\n{links}")
    if options.export:
        model = options.out / "winner" / ("model.gguf" if form == PORTABLE else "ragged")
        size = sum(f.stat().st_size for f in ([model] if model.is_file() else model.iterdir()))
        tags = {
            "candidate": run.candidate(best).key,
            "trial": str(best),
            "form": form,
            "repaired": str(verdict.repaired(best)).lower(),
            "bytes": str(size),
            "sha256": sha256(model) or "",
            **{name: f"{value:.6g}" for name, value in figures.items()},
        }
        with tracker.told("was lost"):
            register(tracker.client, options.study, model, tracker.parent, tags, note)


def _finals(verdict: Verdict, number: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and report.json of a finalist or baseline."""
    scores = {"selection": verdict.selection.get(number), "report": verdict.report.get(number)}
    repairs = verdict.repairs.get(number)
    if repairs is not None:
        scores |= {f"repaired_{text}": repairs[text] for text in ("selection", "report")}
    found = {name: row for name, row in scores.items() if row is not None}
    figures: dict[str, float] = {}
    for name, row in found.items():
        figures |= metrics(row, f"{name}_", FINAL)
    return figures, found
