"""The stages of a search as jobs: which run together, and what each of them takes.

Follows `search.stages`, `search.runner`, `search.finals` and `search.outcome`; a wave is what one call of the
pool is given, and the next begins when its last job is done.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from compression.expert_sets import TOKENS as SET_TOKENS
from compression.layer_error import DIMENSIONS
from evaluators.texts import WINDOW
from evaluators.tuning import Recipe
from search import stages
from search.costs import LEAN, STREAMED, Option, count_probes, ranking_probes, type_probes
from search.evidence_jobs import DETAIL_TOKENS, PART_TOKENS
from search.finals import FINALISTS
from search.runner import ROUND, RUNGS, SLOPE_PROBES, SLOPE_TOKENS
from search.scale.work import Model, Work
from search.verify import VERIFY_TOKENS
from spaces.inventory import Inventory

_ONE_TYPE = 2**18  # weights from which on every type is a job of its own, `search.stages.quantize`
_TOGETHER = 16  # options of a job, `search.stages`
_VALUES = 2**26  # projected outputs of experts that are looked at, `compression.expert_sets`
_SWAPS, _PAIRS = 8, 16  # tried for a set, at most
_ROLES = 6  # of tensors, in the evidence
_PASS = 2**14  # tokens of lm-eval that a streamed model is read for


@dataclass(frozen=True)
class Wave:
    """Jobs that may run at once, after so many CPU seconds of the driver alone."""

    jobs: tuple[Work, ...]
    driver: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A stage by its name in `result.json`."""

    name: str
    waves: tuple[Wave, ...]

    @property
    def work(self) -> Work:
        """All jobs together."""
        return sum((job for wave in self.waves for job in wave.jobs), Work())


@dataclass(frozen=True)
class Study:
    """What is to be done with a model.

    Attributes:
        model: What is searched.
        trials: In all.
        baselines: Those of them that are not stopped early.
        items: lm-eval items of a model.
        repair, export: Whether winners are repaired, and written.
        round: Trials that are asked and told together; 0: no trial waits for another.
        shares: Of trials, those that reach each rung; () as measured.
    """

    model: Model
    trials: int
    baselines: int
    items: int = 0
    repair: bool = True
    export: bool = True
    round: int = ROUND
    shares: tuple[float, ...] = field(default=())

    @property
    def winners(self) -> int:
        return len(self.model.space.forms)

    def stages(self, workers: int, seed: int = 0) -> list[Stage]:
        """All stages in order, for so many workers."""
        out = [
            Stage("calibration", tuple(_calibration(self.model))),
            Stage("quantization", (Wave(tuple(_quantization(self.model))),)),
            Stage("option costs", tuple(_costs(self.model))),
            Stage("trials", tuple(self._trials(workers, random.Random(seed)))),
            Stage("finalists", tuple(self._finals())),
        ]
        if self.repair and not self.model.stream:
            out.append(Stage("repair", tuple(self._repair())))
        out.append(Stage("evidence", (Wave((_evidence(self.model),) * self.winners),)))
        if self.export:
            out.append(Stage("export", tuple(self._export())))
        if self.items:
            models = 1 + self.winners + self.export
            out.append(Stage("lm-eval", (Wave((_tasks(self.model, self.items),) * models),)))
        return out

    def _trials(self, workers: int, rng: random.Random) -> Iterator[Wave]:
        """Rung after rung of round after round; without rounds, every trial on its own."""
        model, shares = self.model, self.shares or self.model.rates.shares
        # A baseline is stopped by nothing.
        drawn = [-1.0 if i < self.baselines else rng.random() for i in range(self.trials)]
        reached = [sum(x < share for share in shares) for x in drawn]
        if not self.round:
            alone = [
                sum((_score(model, 1, t, True, i // workers) for t in RUNGS[:n]), Work())
                for i, n in enumerate(reached)
            ]
            yield Wave(tuple(alone), driver=model.rates.trial)
            return
        for start in range(0, self.trials, self.round):
            some = reached[start : start + self.round]
            driver = model.rates.trial * len(some)
            if not model.stream and rng.random() < model.rates.slopes * len(some):
                yield Wave((_slopes(model, SLOPE_TOKENS, SLOPE_PROBES + 1),))
            for rung, tokens in enumerate(RUNGS):
                alive = sum(n > rung for n in some)
                share = -(-alive // workers)
                sizes = [min(share, alive - i) for i in range(0, alive, share)] if alive else []
                before = start // max(1, min(workers, self.round))
                yield Wave(tuple(_score(model, n, tokens, True, before) for n in sizes), driver)
                driver = 0.0

    def _finals(self) -> Iterator[Wave]:
        model = self.model
        yield Wave((_score(model, 1, stages.SELECTION_TOKENS, False, 99),) * (self.winners * FINALISTS))
        compared = self.winners + self.baselines
        yield Wave((_score(model, 1, stages.REPORT_TOKENS, False, 99),) * compared)

    def _repair(self) -> Iterator[Wave]:
        model, recipe = self.model, Recipe()
        step = model.run(recipe.windows, WINDOW) + model.compare(recipe.windows * WINDOW)
        # A backward pass takes as long as two forward.
        fit = step * (3 * recipe.steps) + model.run(*model.text(stages.REPAIR_TOKENS, False))
        quantized = Work(model.weights * model.rates.repair)
        yield Wave((fit + quantized + model.become(),) * self.winners)
        scores = [_score(model, 1, t, False, 99) for t in (stages.SELECTION_TOKENS, stages.REPORT_TOKENS)]
        yield Wave((*scores,) * self.winners)

    def _export(self) -> Iterator[Wave]:
        size = self.model.candidate
        for _ in range(self.winners):
            yield Wave((Work(size / self.model.rates.hash, read=size, written=size),))
        # llama.cpp scores it, then the evaluator does.
        yield Wave((_score(self.model, 1, VERIFY_TOKENS, False, 99) * 2,))


def _calibration(model: Model) -> Iterator[Wave]:
    """Statistics, then expert sets, then the base model's states on three texts."""
    start = model.read()
    yield Wave((start + model.run(*model.text(stages.CALIBRATION_TOKENS, False)),))
    yield Wave((model.begin() + _sets(model),))
    row = 4 * model.inventory.hidden
    tokens = (stages.SEARCH_TOKENS, stages.SELECTION_TOKENS, stages.REPORT_TOKENS)
    yield Wave(
        tuple(model.begin() + model.run(*model.text(n, False)) + Work(written=n * row) for n in tokens)
    )


def _sets(model: Model) -> Work:
    """Every expert on the tokens looked at, and the sets that are tried."""
    inventory = model.inventory
    outputs = inventory.experts * min(inventory.hidden, DIMENSIONS)
    windows, length = model.text(min(SET_TOKENS, _VALUES // outputs), False)
    tokens = windows * length
    every = 2 * model.experts * tokens
    tried = tokens * set_trials(inventory, model.space.kept_options) * inventory.hidden * inventory.experts
    flop = every + 2 * tried * len(inventory.moe_layers)
    return model.run(windows, length) + Work(flop / model.rates.flops(model.matrix, 256), flop)


def set_trials(inventory: Inventory, counts: Sequence[int]) -> float:
    """Sets of a layer whose error is computed on all tokens, where every one asks the router anew.

    Experts leave one by one, of every group at once and twice over where there are groups; without groups
    only tokens that use an expert are asked again. Then every set is mended.
    """
    experts, groups, least = inventory.experts, inventory.groups, min(counts)
    steps = range(least, experts, groups)
    leaving = float(sum(n + groups for n in steps))
    leaving *= 2 if groups > 1 else inventory.top_k / experts
    return leaving + _SWAPS * _PAIRS * sum(n < experts for n in counts)


def _quantization(model: Model) -> Iterator[Work]:
    """A job for every type of a tensor; of all types for small ones."""
    rates = model.rates
    for tensor in sorted(model.inventory.quantizable, key=lambda t: -t.parameters):
        types, source = model.space.ladder(tensor), model.read(tensor.parameters)
        jobs = [
            Work(
                tensor.parameters * rates.types[kind]["quantize"],
                written=tensor.bytes(kind),
                weights=tensor.parameters,
            )
            for kind in types
        ]
        if tensor.parameters < _ONE_TYPE:
            yield sum(jobs, source)
        else:
            yield from (source + job for job in jobs)


def _costs(model: Model) -> Iterator[Wave]:
    """Gradients where the model is in memory; options one at a time."""
    effort = STREAMED if model.stream else LEAN
    if effort.slope_tokens:
        yield Wave((_slopes(model, effort.slope_tokens, effort.slope_probes),))
    first = [*ranking_probes(model.space, effort), *type_probes(model.space, effort)]
    counts = count_probes(model.space, effort, dict.fromkeys(first, 1.0))
    for probes in (first, counts):
        jobs = []
        for tokens in dict.fromkeys(t for _, t in probes):
            options = [o for o, t in probes if t == tokens]
            jobs += [
                _options(model, options[i : i + _TOGETHER], tokens) for i in range(0, len(options), _TOGETHER)
            ]
        yield Wave(tuple(jobs))


def _options(model: Model, options: Sequence[Option], tokens: int) -> Work:
    """Options one at a time: what lies before the one that differs is run once."""
    windows, length = model.text(tokens, True)
    passes = model.passes(windows, length, len(options) + 1)
    sizes = [model.inventory.by_name[d].parameters for d, _ in options if d in model.inventory.by_name]
    changed = sum(sizes)  # dequantized, and put back as it was
    variants = Work(changed * model.dequantizing, weights=changed) + model.read(changed)
    run = model.run(windows, length, (len(options) + 1) / 2)
    return (model.begin() + variants) * passes + run + model.compare(windows * length, len(options))


def _slopes(model: Model, tokens: int, backward: int) -> Work:
    """Two passes forward, a backward one (as much as two) for each draw, every type against the gradient."""
    windows, length = model.text(tokens, True)
    run = (model.run(windows, length) + model.compare(windows * length)) * (2 + 2 * backward)
    types = sum(t.parameters * len(model.space.ladder(t)) for t in model.inventory.quantizable)
    projected = model.rates.gradient * model.weights * windows * backward
    return run + Work(types * model.dequantizing + projected, weights=types)


def _score(model: Model, settings: int, tokens: int, spread: bool, before: int) -> Work:
    """Candidates on a text, together.

    Args:
        model: The model.
        settings: How many.
        tokens: Of the text.
        spread: Whether a few tokens are the starts of many windows.
        before: Candidates that the worker saw.
    """
    windows, length = model.text(tokens, spread)
    passes = model.passes(windows, length, settings)
    run = model.run(windows, length, settings) + model.compare(windows * length, settings)
    return run + (model.become() * passes + model.first_use(before)) * settings


def _evidence(model: Model) -> Work:
    """Levers of a candidate alone and taken away, and its roles and layers alone."""
    layers = model.inventory.layers + len(model.inventory.moe_layers)
    whole = _score(model, 7, PART_TOKENS, True, 99)
    windows, length = model.text(DETAIL_TOKENS, True)
    count = _ROLES + layers
    passes = model.passes(windows, length, count)
    details = model.run(windows, length, count / 2) + model.compare(windows * length, count)
    report = model.run(*model.text(stages.REPORT_TOKENS, False)) + model.compare(stages.REPORT_TOKENS)
    return whole + details + (model.begin() + model.become()) * passes + (model.begin() + report) * 0.5


def _tasks(model: Model, items: int) -> Work:
    tokens = int(items * model.rates.task_tokens)
    passes = -(-tokens // _PASS) if model.stream else 1
    windows, length = model.text(tokens, False)
    return model.become() * passes + model.run(windows, length) + model.compare(tokens)
