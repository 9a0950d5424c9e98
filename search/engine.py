"""A whole search, stage by stage, from checked options to a finished folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from compression import ggml
from compression.calibration import Calibration
from compression.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from compression.files import remove_parts
from compression.gguf_export import with_tokenizer
from compression.guards import warnings
from evaluators.footprint import Footprint
from evaluators.texts import TextSet
from evaluators.throughput import Throughput
from search import stages
from search.allocator import Allocator
from search.baselines import baselines
from search.cache_files import same_ingredients, study_identity_of_cache
from search.console import Stages, console, problem_table
from search.costs import LEAN, STREAMED, CostModel
from search.drivers import Crew
from search.locks import alone
from search.memory import Plan, make_plan
from search.options import REFERENCE_MODEL, REFERENCE_NAME, SHIPPED_TEXTS, Options
from search.outcome import finish
from search.pool import Pool, make_pool, peak_memory
from search.problem import Problem, make_problem
from search.runner import RUNGS, TrialRunner
from search.sampler import make_sampler
from search.slope_book import SlopeBook
from search.study import finished, open_storage, open_study
from search.tracking import Tracker, tracking_place, tracking_uri
from search.worker import Setup, Worker
from spaces.budget import format_size
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.space import Space


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
            source,
            options.model,
            options.target,
            options.budget,
            options.device,
            options.context,
            options.types,
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
            "rungs": " ".join(map(str, RUNGS)),
            **({"types": " ".join(o.types)} if o.types else {}),
            "texts": " ".join(text.digest for text in texts.values()),
            "quantizer": ggml.version(),
        }

    def dry_run(self) -> None:
        """Prints inventory, budget and space, from headers alone."""
        console.print(problem_table(self.problem))
        everyone = tuple(range(self.checkpoint.inventory.experts))
        same = dict.fromkeys(self.checkpoint.inventory.moe_layers, everyone)
        space = Space(
            self.checkpoint.inventory,
            {"reap": same, "mass": same, "paper": same},
            self.options.runtime,
            self.options.types,
        )
        target = self.problem.target
        console.print(
            f"space           10^{space.log10_size:.0f} configs in {len(space.distributions)} parameters; "
            f"the target takes {format_size(self.problem.smallest)} to "
            f"{format_size(target.file_bytes(target.uniform_plan('BF16')))}"
        )
        from search.scale.estimate import estimate_lines

        for line in estimate_lines(self.problem, self.options):
            console.print(line, highlight=False, soft_wrap=True)

    def run(self) -> dict[str, Any]:
        """Everything; returns what result.json holds."""
        o = self.options
        console.print(problem_table(self.problem))
        self._check_tasks()
        tokenizer = load_tokenizer(self.checkpoint.path)
        texts = stages.prepare_texts(tokenizer, SHIPPED_TEXTS, o.text, o.calibration)
        about = {"model": self.checkpoint.fingerprint, **{n: t.digest for n, t in texts.items()}}
        if stages.stale(self.cache, about):
            raise UserError(
                f"{o.out}: holds a study of another model or other texts; give this search another "
                "--study name or --out folder"
            )
        plan = self._plan()
        storage = open_storage(o.storage, o.out / "study.journal")
        study = open_study(o.study, storage, self.identity(texts))
        stages.keep_texts(self.cache, texts, about)
        known = study.user_attrs.get("settings")
        if known is not None and known["streamed"] != plan.stream:
            plan = self._plan(known["streamed"])
        # Another driver's folder stands in them, as long as it is there to be opened.
        if known is None or known["out"] == str(o.out) or not Path(known["out"]).exists():
            study.set_user_attr("settings", self._settings() | {"streamed": plan.stream})
        setup = Setup(
            str(self.checkpoint.path), self.checkpoint.inventory.name, str(self.cache), o.runtime,
            o.tasks, o.limit, str(o.tasks_path.resolve()) if o.tasks_path else None, exportable=o.export,
            stream=plan.stream, types=o.types, cache_bytes=plan.cache_bytes,
        )  # fmt: skip
        pool = make_pool(setup, plan.workers, o.ray_address)
        crew = Crew(study, tracking_place(tracking_uri(o.tracking_uri, o.out)))
        try:
            return Running(self, study, pool, texts, setup, crew).run()
        finally:
            crew.close()
            pool.close()

    def _plan(self, begun: bool | None = None) -> Plan:
        o = self.options
        return make_plan(
            self.checkpoint.inventory, o.workers, o.stream, o.types,
            elsewhere=o.ray_address is not None, fewer=o.fewer_workers, begun=begun,
        )  # fmt: skip

    def _check_tasks(self) -> None:
        """An unknown task is refused before the first stage, not after the last trial."""
        if self.options.tasks:
            from evaluators.harness import Harness, task_context

            o = self.options
            tokenizer = load_tokenizer(self.checkpoint.path)
            length = task_context(self.checkpoint.family.config)
            Harness(tokenizer, o.tasks, limit=o.limit, tasks_path=o.tasks_path, max_length=length)

    def _settings(self) -> dict[str, Any]:
        """Options as plain values, for `search.export` to rebuild the search from."""
        o = self.options
        plain = {k: v for k, v in vars(o).items() if k != "device"}
        plain |= {"device": vars(o.device), "name": self.checkpoint.inventory.name}
        return json.loads(json.dumps(plain, default=str))


@dataclass
class Running:
    """The stages of a run, with the pool they share."""

    search: Search
    study: Any
    pool: Pool
    texts: dict[str, TextSet]
    setup: Setup
    crew: Crew

    def run(self) -> dict[str, Any]:
        o = self.search.options
        inventory = self.search.checkpoint.inventory
        self.tracker = Tracker(
            self.study, o.tracking_uri, o.out, self._parameters(), inventory, self.crew.logged_elsewhere
        )
        try:
            return self._run()
        finally:
            self.tracker.close()  # before this driver signs off, as others log what it ran from then on

    def _run(self) -> dict[str, Any]:
        o, cache = self.search.options, self.search.cache
        self.stages = Stages(lambda: peak_memory(self.pool))
        with alone(cache / "stages.lock", "preparing the study"):
            remove_parts(o.out)
            model = self._prepare()
        problem = self.search.problem
        self.allocator = Allocator(self.space, model, problem.carry, problem.budget.limit)
        book = SlopeBook(cache / "slopes")
        self.study.sampler = make_sampler(o.sampler, self.allocator, o.seed, book)
        self.runner = TrialRunner(
            self.study, self.allocator, self.pool,
            Footprint(problem.carry, problem.budget),
            Throughput(problem.carry, problem.device, problem.context),
            self.texts["search"], slopes=not self.setup.stream, crew=self.crew,
        )  # fmt: skip
        self._trials()
        with alone(o.out / "finish.lock", "writing the results"):
            return finish(self)

    def _prepare(self) -> CostModel:
        """Calibration, quantization and option costs, as far as they are missing."""
        o = self.search.options
        with self.stages.stage("calibration") as advance:
            stages.calibrate(self.pool, self.search.cache, advance)
        with self.stages.stage("quantization") as advance:
            errors = stages.quantize(self.pool, self.space, self.search.cache, advance)
        self._check_ingredients()
        self.warnings = warnings(self.calibration, self.space.inventory, errors)
        if o.export:
            self.warnings += self.search.checkpoint.family.approximations()
        for line in self.warnings:
            console.print(f"note: {line}")
        with self.stages.stage("option costs") as advance:
            effort = STREAMED if self.setup.stream else LEAN
            model, _ = stages.measure_costs(self.pool, self.space, errors, self.search.cache, advance, effort)
        return model

    def _check_ingredients(self) -> None:
        """Refuses a study whose experts and types mean something else by this cache."""
        found = study_identity_of_cache(self.search.cache)
        same_ingredients(self.study.user_attrs.get("ingredients"), found, self.study.study_name)
        self.study.set_user_attr("ingredients", found)

    @cached_property
    def calibration(self) -> Calibration:
        return Calibration.load(self.search.cache / "calibration.npz")

    @cached_property
    def space(self) -> Space:
        space: Space = Worker(self.setup).space
        return space

    def _parameters(self) -> dict[str, Any]:
        o, p = self.search.options, self.search.problem
        return {
            "budget_gb": o.budget / 1e9, "target": p.target.name, "model": p.source.name,
            "device": p.device.name, "context_tokens": o.context, "runtime": o.runtime,
            "sampler": o.sampler, "seed": o.seed,
        }  # fmt: skip

    def _trials(self) -> None:
        """Baselines first, then the sampler, up to --trials."""
        total = self.search.options.trials
        trials = self.study.get_trials(deepcopy=False)
        known = {t.user_attrs.get("baseline") for t in trials if t.state != TrialState.FAIL}
        for name, params in baselines(self.allocator).items():
            if name not in known:
                self.study.enqueue_trial(params, user_attrs={"baseline": name})
        with self.stages.stage("trials") as advance:
            self.tracker.log_all(lambda trial: self.space.candidate(trial.params))

            def note(trial: FrozenTrial) -> None:
                rho = self.runner.rank_correlation()
                self.tracker.log_trial(trial, self.space.candidate(trial.params), rho)
                done = finished(self.study)
                best = min(
                    (t.user_attrs["scores"]["kl"] for t in done if t.state == TrialState.COMPLETE),
                    default=float("nan"),
                )
                ranked = "" if rho is None else f", predictor's rank correlation {rho:.2f}"
                advance(len(done), total, f"best KL {best:.4f}{ranked}")

            advance(len(finished(self.study)), total)
            self.runner.on_trial = note
            self.runner.run(total)
            self.tracker.log_all(lambda trial: self.space.candidate(trial.params))

    def candidate(self, number: int) -> Candidate:
        """The candidate of a finished trial."""
        trial = next(t for t in finished(self.study) if t.number == number)
        return self.space.candidate(trial.params)
