"""From finished trials to a finished folder: finalists, winners, result.json, the model, the pictures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from compression.files import write_text
from search import finals, pareto, stages
from search.console import comparison_table, console, front_table
from search.pareto_html import write_html
from search.pareto_png import write_png
from search.rebuild import OpenStudy
from search.report.build import write as write_report
from search.report.facts import Facts
from search.results import VERSION, trial_record, write_winner
from search.sampler import KnapsackSampler
from search.study import finished, window_scores
from search.summary import show
from search.tracking_outcome import track
from search.verify import verify_gguf
from search.worker import Worker
from spaces.space import PORTABLE, RAGGED

if TYPE_CHECKING:
    from search.engine import Running

Rescored = dict[int, dict[str, Any]]
"""Trial number to its scores on a text."""


@dataclass
class Verdict:
    """What the finals decided.

    Attributes:
        chosen: Finalists and baselines by number.
        named: Baseline name to trial.
        won: Form to the winner's number, None where a form has no complete trial.
        selection, report: Scores on the two texts.
        repairs: Trial number to what re-fitting did: scores before and after, and whether it is used.
        base: The uncompressed model on the report text.
    """

    chosen: dict[int, FrozenTrial]
    named: dict[str, FrozenTrial]
    won: dict[str, int | None]
    selection: Rescored
    report: Rescored
    repairs: dict[int, dict[str, Any]] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)

    def repaired(self, number: int | None) -> bool:
        """Whether a winner ships with its repairs."""
        return number is not None and bool(self.repairs.get(number, {}).get("used"))

    @property
    def best(self) -> int:
        """The portable winner, or the ragged one where nothing portable finished."""
        number = self.won[PORTABLE] if self.won[PORTABLE] is not None else self.won[RAGGED]
        assert number is not None
        return number


def finish(run: Running) -> dict[str, Any]:
    """Does everything after the last trial; returns what result.json holds."""
    options = run.search.options
    verdict = _decide(run)
    run.study.set_user_attr("repaired", [])
    if options.repair == "auto" and not run.setup.stream:
        verdict.repairs = _repair(run, verdict)
    _explain(run, verdict)
    result = _result(run, verdict)
    result["export"] = _export(run, verdict) if options.export else None
    result["tasks"] = _tasks(run, verdict, result["export"])
    for record in result["trials"]:
        row = result["tasks"].get(str(record["number"]), {})
        record["scores"]["tasks"] = {task: score["value"] for task, score in row.items()}
    result["stages"] = dict(run.stages.taken)
    _draw(run, result)
    write_text(options.out / "result.json", json.dumps(result, indent=1) + "\n")
    _report(run, result, verdict)
    track(run, verdict)
    _show(run, result, verdict)
    return result


def _decide(run: Running) -> Verdict:
    """Selects on the selection text, then scores winners and baselines on the report text."""
    with run.stages.stage("finalists") as advance:
        groups = finals.finalists(run.runner)
        candidates = [t for group in groups.values() for t in group]
        selection = _score(run, candidates, "selection", stages.SELECTION_TOKENS, advance)
        won = finals.winners(groups, selection)
        run.study.set_user_attr("winners", won)
        named = finals.baseline_trials(run.runner)
        chosen = {t.number: t for t in [*candidates, *named.values()]}
        compared = {*won.values(), *(t.number for t in named.values())}
        trials = [t for n, t in chosen.items() if n in compared]
        report = _score(run, trials, "report", stages.REPORT_TOKENS, advance)
    return Verdict(chosen, named, won, selection, report)


def _repair(run: Running, verdict: Verdict) -> dict[int, dict[str, Any]]:
    """Re-fits the winners; what does not pay on the selection text is not used."""
    numbers = sorted({n for n in verdict.won.values() if n is not None})
    texts = {n: run.candidate(n).to_json() for n in numbers}
    with run.stages.stage("repair") as advance:
        advance(0, len(numbers))
        tokens = run.pool.run(
            [("repair", (texts[n],)) for n in numbers], lambda i, _: advance(i + 1, len(numbers))
        )
        names = {"selection": stages.SELECTION_TOKENS, "report": stages.REPORT_TOKENS}
        jobs: list[Any] = [
            ("score_repaired", (texts[n], name, size)) for n in numbers for name, size in names.items()
        ]
        found = iter(run.pool.run(jobs))
        out = {}
        for n, spent in zip(numbers, tokens, strict=True):
            rows = {name: next(found) for name in names}
            scores = {
                name: window_scores(
                    rows[name], run.texts[name].bytes_per_token, int(run.texts[name].windows.size)
                )
                | {"windows_kl": _rounded(rows[name]["kl"])}
                for name in names
            }
            used = scores["selection"]["kl"] < verdict.selection[n]["kl"]
            out[n] = {"used": used, "tokens": spent, **scores}
        run.study.set_user_attr("repaired", [run.candidate(n).key for n in numbers if out[n]["used"]])
    return out


def _explain(run: Running, verdict: Verdict) -> None:
    """Evidence of the winners, for the report."""
    with run.stages.stage("evidence") as advance:
        numbers = sorted({n for n in verdict.won.values() if n is not None})
        advance(0, len(numbers))
        jobs: list[Any] = [("evidence", (run.candidate(n).to_json(), verdict.repaired(n))) for n in numbers]
        run.pool.run(jobs, lambda i, _: advance(i + 1, len(numbers)))
        (columns,) = run.pool.run([("base_scores", ("report",))])
        text = run.texts["report"]
        verdict.base = window_scores(columns, text.bytes_per_token, int(text.windows.size))


def _score(run: Running, trials: list[FrozenTrial], text: str, tokens: int, advance: Any) -> Rescored:
    scores = run.search.cache / "scores"
    rate = run.texts[text].bytes_per_token
    return finals.score_on(run.pool, run.runner, trials, text, tokens, rate, scores, advance)


def _result(run: Running, verdict: Verdict) -> dict[str, Any]:
    """result.json but for tasks, export and stages."""
    options, problem = run.search.options, run.search.problem
    done = sorted(finished(run.study), key=lambda t: t.number)
    records = [trial_record(t, run.space.candidate(t.params)) for t in done]
    best = verdict.report[verdict.best]
    return {
        "version": VERSION,
        "study": options.study,
        "budget_bytes": options.budget,
        "target": problem.target.name,
        "device": problem.device.name,
        "model": problem.source.name,
        "sampler": options.sampler,
        "seed": options.seed,
        "notes": run.warnings,
        "trials": records,
        "front": pareto.front_of(records),
        "winners": verdict.won,
        "baselines": {name: t.number for name, t in verdict.named.items()},
        "base": {"report": verdict.base},
        "finals": {
            str(n): {"selection": _plain(verdict.selection, n), "report": _plain(verdict.report, n)}
            for n in verdict.chosen
        },
        "trial_stage": {
            "tokens": run.runner.spent,
            "seconds": round(run.runner.seconds, 2),
            "evaluation_seconds": round(run.runner.scoring, 2),
            "rank_correlation": run.runner.rank_correlation(),
        },
        "repairs": {str(n): repair for n, repair in verdict.repairs.items()},
        "comparison": {
            name: {
                "trial": t.number,
                "kl": verdict.report[t.number]["kl"],
                **finals.compare(best, verdict.report[t.number]),
            }
            for name, t in verdict.named.items()
        },
    }


def _plain(scores: Rescored, number: int) -> dict[str, Any] | None:
    """Scores, KL of windows rounded; None where a text was not scored."""
    if number not in scores:
        return None
    return scores[number] | {"windows_kl": _rounded(scores[number]["windows_kl"])}


def _rounded(values: list[float]) -> list[float]:
    return [round(v, 6) for v in values]


def _tasks(run: Running, verdict: Verdict, exported: dict[str, Any] | None) -> dict[str, Any]:
    """lm-eval of the base model, the winners and the exported file, all but the first against the first."""
    if not run.search.options.tasks:
        return {}
    numbers = [n for n in verdict.won.values() if n is not None]
    with run.stages.stage("lm-eval") as advance:
        jobs: list[Any] = [("tasks", (None,))]
        jobs += [("tasks", (run.candidate(n).to_json(), verdict.repaired(n))) for n in numbers]
        if exported:
            jobs.append(("tasks_of_file", (exported["path"],)))
        done = [0]

        def count(i: int, _: Any) -> None:
            done[0] += 1
            advance(done[0], len(jobs))

        rows = run.pool.run(jobs, count)
    names = ["base", *map(str, numbers), *(["gguf"] if exported else [])]
    return {
        name: {task: _row(score, rows[0][task], name) for task, score in row.items()}
        for name, row in zip(names, rows, strict=True)
    }


def _row(score: dict[str, Any], base: dict[str, Any], name: str) -> dict[str, Any]:
    """A task's score as result.json has it."""
    from evaluators.harness import TaskScore, paired_difference

    row = {k: v for k, v in score.items() if k not in ("correct", "ids")}
    if name != "base" and score["correct"] and base["correct"]:
        row["difference"], row["difference_se"] = paired_difference(TaskScore(**base), TaskScore(**score))
    # JSON has no infinity.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _export(run: Running, verdict: Verdict) -> dict[str, Any] | None:
    """The portable winner as GGUF with proof of it, the ragged one as a folder, the target's recipe."""
    out = run.search.options.out / "winner"
    with run.stages.stage("export") as advance:
        ragged, portable = verdict.won[RAGGED], verdict.won[PORTABLE]
        if ragged is not None:
            job = (run.candidate(ragged).to_json(), str(out / "ragged"), verdict.repaired(ragged))
            run.pool.run([("export", job)])
        advance(1, 3)
        candidate = run.candidate(verdict.best)
        params = verdict.chosen[verdict.best].params
        criteria = {i: str(params[f"blk.{i}.criterion"]) for i in run.space.inventory.moe_layers}
        write_winner(candidate, criteria, run.search.problem.carry, out)
        exported: dict[str, Any] | None = None
        if portable is not None:
            path = out / "model.gguf"
            repaired = verdict.repaired(portable)
            size = run.pool.run([("export", (candidate.to_json(), str(path), repaired))])[0]
            advance(2, 3)
            predicted = run.search.problem.source.file_bytes(candidate.plan)
            proof = verify_gguf(
                path, run.pool, candidate, run.texts["report"], run.search.cache, repaired=repaired
            )
            exported = {"path": str(path), "bytes": size, "predicted_bytes": predicted, "llama_cpp": proof}
        advance(3, 3)
    return exported


def _draw(run: Running, result: dict[str, Any]) -> None:
    out = run.search.options.out
    write_html(result, out / "pareto.html")
    write_png(result, out / "pareto.png")


def _report(run: Running, result: dict[str, Any], verdict: Verdict) -> None:
    """The page about the winner."""
    worker = Worker(run.setup)
    with run.stages.stage("report"):
        opened = OpenStudy(run.study, run.study.user_attrs["settings"], worker)
        write_report(Facts(opened, result, verdict.best), run.search.options.out / "report.html")


def _show(run: Running, result: dict[str, Any], verdict: Verdict) -> None:
    """The tables and the last lines."""
    by_number = {r["number"]: r for r in result["trials"]}
    best, report = verdict.best, verdict.report

    def row(label: str, number: int) -> tuple[str, dict[str, Any], dict[str, float]]:
        scores = {**by_number[number]["scores"], **report[number]}
        return label, scores, finals.compare(report[best], report[number]) if number != best else {}

    rows = [row(f"winner (trial {best})", best)]
    ragged = verdict.won[RAGGED]
    if ragged is not None and ragged != best:
        rows.append(row(f"best ragged (trial {ragged})", ragged))
    for n in {best, ragged} & verdict.repairs.keys():
        if n is not None and verdict.repaired(n):
            scores = {**by_number[n]["scores"], **verdict.repairs[n]["report"]}
            rows.append((f"trial {n} re-fitted, as exported", scores, {}))
    ordered = sorted(verdict.named.items(), key=lambda item: report[item[1].number]["kl"])
    rows += [row(name, t.number) for name, t in ordered]
    console.print(front_table(result["trials"], result["front"]))
    console.print(comparison_table(rows))
    predicted = [(r["predicted_kl"], r["scores"]["kl"]) for r in result["trials"]]
    knapsack = isinstance(run.study.sampler, KnapsackSampler)
    show(result, run.search.options, run.tracker.uri, predicted, knapsack)
