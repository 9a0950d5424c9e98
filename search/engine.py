"""A whole search, stage by stage, from checked options to a finished folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from compression.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from compression.files import write_text
from compression.gguf_export import with_tokenizer
from evaluators.footprint import Footprint
from evaluators.texts import WINDOW, TextSet
from evaluators.throughput import Throughput
from search import finals, pareto, stages
from search.allocator import Allocator
from search.baselines import baselines
from search.console import Stages, comparison_table, console, front_table, problem_table
from search.options import REFERENCE_MODEL, REFERENCE_NAME, SHIPPED_TEXTS, Options
from search.pool import Pool, make_pool, peak_memory
from search.problem import Problem, make_problem
from search.results import VERSION, trial_record, write_winner
from search.sampler import KnapsackSampler, make_sampler
from search.study import TrialRunner, finished, open_storage, open_study, recover
from search.tracking import Tracker
from search.worker import Setup, Worker
from spaces.budget import format_size
from spaces.errors import UserError
from spaces.space import PORTABLE, RAGGED, Space


@dataclass
class Search:
    """One run of `search.run`.

    Attributes:
        options: What was asked for.
        checkpoint: The model that is searched.
        problem: Inventories, budget and device.
    """

    options: Options
    checkpoint: Checkpoint
    problem: Problem

    @classmethod
    def open(cls, options: Options) -> Search:
        """Reads headers only; every option that does not fit the model is refused here."""
        if options.model == REFERENCE_MODEL and not REFERENCE_MODEL.exists():
            raise UserError(f"{REFERENCE_MODEL}: the reference model is not installed; give --model DIR")
        name = REFERENCE_NAME if options.model == REFERENCE_MODEL else None
        checkpoint = open_checkpoint(options.model, name)
        source = with_tokenizer(checkpoint) if options.export else checkpoint.inventory
        problem = make_problem(
            source, options.model, options.target, options.budget, options.device, options.context
        )
        return cls(options, checkpoint, problem)

    @property
    def cache(self) -> Path:
        return self.options.out / "cache"

    def identity(self, texts: dict[str, TextSet]) -> dict[str, Any]:
        """What a study is about; all of it must agree to go on."""
        o = self.options
        return {
            "model": self.checkpoint.fingerprint,
            "target": self.problem.target.name,
            "budget": o.budget,
            "device": f"{o.device.name} {o.device.memory}",
            "context": o.context,
            "runtime": o.runtime,
            "sampler": o.sampler,
            "seed": o.seed,
            "texts": " ".join(text.digest for text in texts.values()),
        }

    def dry_run(self) -> None:
        """Prints inventory, budget and space, from headers alone."""
        console.print(problem_table(self.problem))
        everyone = tuple(range(self.checkpoint.inventory.experts))
        same = dict.fromkeys(self.checkpoint.inventory.moe_layers, everyone)
        space = Space(
            self.checkpoint.inventory, {"reap": same, "mass": same, "paper": same}, self.options.runtime
        )
        target = self.problem.target
        least = self.problem.carry.kept(space.kept_options[0])
        smallest = target.file_bytes(target.uniform_plan("IQ1_S", least))
        console.print(
            f"space           10^{space.log10_size:.0f} configs in {len(space.distributions)} parameters; "
            f"the target takes {format_size(smallest)} to "
            f"{format_size(target.file_bytes(target.uniform_plan('BF16')))}"
        )

    def run(self) -> dict[str, Any]:
        """Everything; returns what result.json holds."""
        o = self.options
        console.print(problem_table(self.problem))
        self._check_tasks()
        o.out.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(self.checkpoint.path)
        texts = stages.prepare_texts(tokenizer, SHIPPED_TEXTS, o.text, o.calibration, self.cache)
        about = {"model": self.checkpoint.fingerprint, **{n: t.digest for n, t in texts.items()}}
        if stages.stale(self.cache, about):
            raise UserError(
                f"{o.out}: holds a study of another model or other texts; give this search another "
                "--study name or --out folder"
            )
        storage = open_storage(o.storage, o.out / "study.journal")
        study = open_study(o.study, storage, self.identity(texts))
        study.set_user_attr("settings", self._settings())
        setup = Setup(
            str(self.checkpoint.path), self.checkpoint.inventory.name, str(self.cache), o.runtime,
            o.tasks, o.limit, str(o.tasks_path.resolve()) if o.tasks_path else None, exportable=o.export,
        )  # fmt: skip
        pool = make_pool(setup, o.workers, o.ray_address)
        try:
            return _Running(self, study, pool, texts, setup).run()
        finally:
            pool.close()

    def _check_tasks(self) -> None:
        """An unknown task is refused before the first stage, not after the last trial."""
        if self.options.tasks:
            from evaluators.harness import Harness

            o = self.options
            tokenizer = load_tokenizer(self.checkpoint.path)
            Harness(tokenizer, o.tasks, limit=o.limit, tasks_path=o.tasks_path, max_length=WINDOW)

    def _settings(self) -> dict[str, Any]:
        """Options as plain values, for `search.export` to rebuild the search from."""
        o = self.options
        plain = {k: v for k, v in vars(o).items() if k != "device"}
        plain |= {"device": vars(o.device), "name": self.checkpoint.inventory.name}
        return json.loads(json.dumps(plain, default=str))


@dataclass
class _Running:
    """The stages of a run, with the pool they share."""

    search: Search
    study: Any
    pool: Pool
    texts: dict[str, TextSet]
    setup: Setup

    def run(self) -> dict[str, Any]:
        o = self.search.options
        self.stages = Stages(lambda: peak_memory(self.pool))
        with self.stages.stage("calibration") as advance:
            stages.calibrate(self.pool, self.search.cache, advance)
        with self.stages.stage("quantization") as advance:
            errors = stages.quantize(self.pool, self.space, self.search.cache, advance)
        with self.stages.stage("option costs") as advance:
            model = stages.measure_costs(self.pool, self.space, errors, self.search.cache, advance)
        problem = self.search.problem
        self.allocator = Allocator(self.space, model, problem.carry, problem.budget.limit)
        self._check_feasible()
        self.study.sampler = make_sampler(o.sampler, self.allocator, o.seed)
        self.tracker = Tracker(self.study, o.tracking_uri, o.out, self._parameters())
        self.runner = TrialRunner(
            self.study, self.allocator, self.pool,
            Footprint(problem.carry, problem.budget),
            Throughput(problem.carry, problem.device, problem.context),
            self.texts["search"].bytes_per_token, WINDOW,
        )  # fmt: skip
        self._trials()
        return self._finish()

    @cached_property
    def space(self) -> Space:
        space: Space = Worker(self.setup).space
        return space

    def _parameters(self) -> dict[str, Any]:
        o, p = self.search.options, self.search.problem
        return {
            "budget_bytes": o.budget, "target": p.target.name, "model": p.source.name,
            "device": p.device.name, "context": o.context, "runtime": o.runtime,
            "sampler": o.sampler, "seed": o.seed, "trials": o.trials,
        }  # fmt: skip

    def _check_feasible(self) -> None:
        smallest, limit = self.allocator.smallest(), self.allocator.limit
        if smallest > limit:
            raise UserError(
                f"--budget {format_size(limit)} is below the smallest possible config of "
                f"{self.search.problem.target.name}, {format_size(smallest)}; raise --budget"
            )

    def _trials(self) -> None:
        """Baselines first, then the sampler, up to --trials."""
        recover(self.study)
        total = self.search.options.trials
        known = {t.user_attrs.get("baseline") for t in self.study.get_trials(deepcopy=False)}
        for name, params in baselines(self.allocator).items():
            if name not in known:
                self.study.enqueue_trial(params, user_attrs={"baseline": name})
        with self.stages.stage("trials") as advance:
            for trial in finished(self.study):
                self.tracker.log_trial(trial, self.space.candidate(trial.params))

            def note(trial: FrozenTrial) -> None:
                self.tracker.log_trial(trial, self.space.candidate(trial.params))
                done = finished(self.study)
                best = min(
                    (t.user_attrs["scores"]["kl"] for t in done if t.state == TrialState.COMPLETE),
                    default=float("nan"),
                )
                advance(len(done), total, f"best KL {best:.4f}")

            advance(len(finished(self.study)), total)
            self.runner.on_trial = note
            self.runner.run(total)

    def _finish(self) -> dict[str, Any]:
        o, problem = self.search.options, self.search.problem
        with self.stages.stage("finalists") as advance:
            chosen = finals.finalists(self.runner)
            candidates = [t for group in chosen.values() for t in group]
            selection = self._score(candidates, "selection", stages.SELECTION_TOKENS, advance)
            won = finals.winners(chosen, selection)
            named = finals.baseline_trials(self.runner)
            by_number = {t.number: t for t in [*candidates, *named.values()]}
            compared = [by_number[n] for n in by_number if n in won.values() or n in
                        {t.number for t in named.values()}]  # fmt: skip
            self.study.set_user_attr("winners", won)
            report = self._score(compared, "report", stages.REPORT_TOKENS, advance)
        records = [
            trial_record(t, self.space.candidate(t.params))
            for t in sorted(finished(self.study), key=lambda t: t.number)
        ]
        complete = [r for r in records if r["state"] == "COMPLETE"]
        points = [
            (r["scores"]["kl"], r["scores"]["target_bytes"], r["scores"]["tokens_per_second"])
            for r in complete
        ]
        front = [complete[i]["number"] for i in pareto.front(points)]
        best = won[PORTABLE] if won[PORTABLE] is not None else won[RAGGED]
        assert best is not None
        result: dict[str, Any] = {
            "version": VERSION, "study": o.study, "budget_bytes": o.budget, "target": problem.target.name,
            "device": problem.device.name, "model": problem.source.name, "sampler": o.sampler, "seed": o.seed,
            "trials": records, "front": front, "winners": won,
            "baselines": {name: t.number for name, t in named.items()},
            "finals": {
                str(n): {
                    k: {m: v for m, v in scores[n].items() if m != "windows_kl"}
                    for k, scores in (("selection", selection), ("report", report)) if n in scores
                } for n in by_number
            },
            "comparison": {
                name: {"trial": t.number, "kl": report[t.number]["kl"],
                       **finals.compare(report[best], report[t.number])}
                for name, t in named.items()
            },
        }  # fmt: skip
        result["tasks"] = self._tasks(won)
        for record in records:
            rows = result["tasks"].get(str(record["number"]), {})
            record["scores"]["tasks"] = {task: row["value"] for task, row in rows.items()}
        result["export"] = self._export(won) if o.export else None
        result["stages"] = self.stages.taken
        title = f"{problem.source.name} for {problem.target.name} at {format_size(o.budget)}"
        pareto.write_html(complete, front, title, o.budget, o.out / "pareto.html")
        pareto.write_png(complete, front, title, o.budget, o.out / "pareto.png")
        write_text(o.out / "result.json", json.dumps(result, indent=1) + "\n")
        self._track(result, report[best])
        self._show(result, report, best, named)
        return result

    def _score(
        self, trials: list[FrozenTrial], text: str, tokens: int, advance: Any
    ) -> dict[int, dict[str, Any]]:
        return finals.score_on(
            self.pool,
            self.runner,
            trials,
            text,
            tokens,
            self.texts[text].bytes_per_token,
            self.search.cache / "scores",
            advance,
        )

    def _candidate(self, number: int) -> Any:
        trial = next(t for t in finished(self.study) if t.number == number)
        return self.space.candidate(trial.params)

    def _tasks(self, won: dict[str, int | None]) -> dict[str, Any]:
        """lm-eval of the base model and the winners."""
        if not self.search.options.tasks:
            return {}
        numbers = [n for n in won.values() if n is not None]
        with self.stages.stage("lm-eval") as advance:
            jobs: list[Any] = [("tasks", (None,))]
            jobs += [("tasks", (self._candidate(n).to_json(),)) for n in numbers]
            done = [0]

            def count(i: int, _: Any) -> None:
                done[0] += 1
                advance(done[0], len(jobs))

            rows = self.pool.run(jobs, count)
        names = ["base", *map(str, numbers)]
        return {
            name: {task: {k: v for k, v in s.items() if k != "correct"} for task, s in row.items()}
            for name, row in zip(names, rows, strict=True)
        }

    def _export(self, won: dict[str, int | None]) -> dict[str, Any] | None:
        """The best portable candidate as GGUF, the best ragged one as a folder, and proof of the former."""
        from search.verify import verify_gguf

        out = self.search.options.out / "winner"
        with self.stages.stage("export") as advance:
            exported: dict[str, Any] | None = None
            if (number := won[RAGGED]) is not None:
                ragged = self._candidate(number)
                self.pool.run([("export", (ragged.to_json(), str(out / "ragged")))])
            number = won[PORTABLE] if won[PORTABLE] is not None else won[RAGGED]
            assert number is not None
            candidate = self._candidate(number)
            criteria = {
                i: str(
                    next(t for t in finished(self.study) if t.number == number).params[f"blk.{i}.criterion"]
                )
                for i in self.space.inventory.moe_layers
            }
            write_winner(candidate, criteria, self.search.problem.carry, out)
            if won[PORTABLE] is not None:
                path = out / "model.gguf"
                size = self.pool.run([("export", (candidate.to_json(), str(path)))])[0]
                predicted = self.search.problem.source.file_bytes(candidate.plan)
                exported = {"path": str(path), "bytes": size, "predicted_bytes": predicted}
                exported["llama_cpp"] = verify_gguf(
                    path, self.pool, candidate, self.texts["report"], self.search.cache
                )
            advance(1, 1)
        return exported

    def _track(self, result: dict[str, Any], best: dict[str, Any]) -> None:
        out = self.search.options.out
        metrics = {"winner_report_kl_nats": best["kl"], "winner_report_perplexity": best["perplexity"]}
        files = [out / "pareto.html", out / "pareto.png", out / "result.json"]
        files += [f for f in (out / "winner").glob("*.json") if self.search.options.export]
        self.tracker.finish(metrics, files)

    def _show(
        self, result: dict[str, Any], report: dict[int, Any], best: int, named: dict[str, FrozenTrial]
    ) -> None:
        from search.summary import show

        by_number = {r["number"]: r for r in result["trials"]}
        rows: list[tuple[str, dict[str, Any], dict[str, float]]] = [
            (f"winner (trial {best})", {**by_number[best]["scores"], **report[best]}, {})
        ]
        ragged = result["winners"][RAGGED]
        if ragged is not None and ragged != best:
            scores = {**by_number[ragged]["scores"], **report[ragged]}
            rows.append(
                (f"best ragged (trial {ragged})", scores, finals.compare(report[best], report[ragged]))
            )
        for name, t in sorted(named.items(), key=lambda item: report[item[1].number]["kl"]):
            scores = {**by_number[t.number]["scores"], **report[t.number]}
            rows.append((name, scores, finals.compare(report[best], report[t.number])))
        console.print(front_table(result["trials"], result["front"]))
        console.print(comparison_table(rows))
        predicted = [(r["predicted_kl"], r["scores"]["kl"]) for r in result["trials"]]
        show(
            result,
            self.search.options,
            self.tracker.uri,
            predicted,
            isinstance(self.study.sampler, KnapsackSampler),
        )
