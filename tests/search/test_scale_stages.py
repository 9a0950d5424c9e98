from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compression.checkpoint import Checkpoint
from compression.variant_bank import HEADER_BYTES
from evaluators.population import Population
from evaluators.texts import TextSet
from search.pool import Job
from search.runner import RUNGS
from search.scale.estimate import stand_in
from search.scale.rates import measured
from search.scale.stages import Stage, Study, set_trials
from search.scale.work import Model, Work
from search.stages import quantize


@pytest.fixture
def model(tiny: Checkpoint) -> Model:
    return Model(stand_in(tiny.inventory, "any", ()), measured(), False, 10**7, "BF16", 3 * 10**6)


def stage(study: Study, name: str, workers: int = 1) -> Stage:
    return next(s for s in study.stages(workers) if s.name == name)


def test_a_population_goes_through_the_model_as_often(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes that are reckoned with are those that `Population.measure` makes."""
    for settings, hidden in ((1, 7168), (8, 7168), (17, 7168), (150, 256)):
        for tokens in (*RUNGS, 2048):
            calls = 0

            def some(self: Any, distinct: Sequence[Any], windows: Any, states: Any) -> list[Any]:
                nonlocal calls
                calls += 1
                row = torch.zeros(len(windows))
                return [[(row, row, row)] for _ in distinct]

            monkeypatch.setattr(Population, "_some", some)
            windows, length = model.text(tokens, True)
            text = TextSet("t", np.zeros((windows, length), np.int32), ("",) * windows, 1.0)
            inventory = replace(model.inventory, hidden=hidden)
            population = Population(SimpleNamespace(inventory=inventory))  # type: ignore[arg-type]
            population.measure(list(range(settings)), text, np.zeros((windows, 1)))  # type: ignore[arg-type]
            wide = replace(model, space=replace(model.space, inventory=inventory))
            assert wide.passes(windows, length, settings) == calls


class Recorder:
    """A pool that keeps the jobs it is given."""

    size = 1

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def run(self, jobs: Sequence[Job], on_result: Any = None) -> list[Any]:
        self.jobs += jobs
        return []

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        return []


def test_quantization_has_the_jobs_of_the_search(model: Model, tmp_path: Path) -> None:
    pool = Recorder()
    quantize(pool, model.space, tmp_path, lambda done, total: None)  # type: ignore[arg-type]
    (wave,) = stage(Study(model, 8, 0), "quantization").waves
    by_name = model.inventory.by_name
    wanted = [sum(by_name[name].bytes(t) for t in types) for _, (name, types) in pool.jobs]
    assert [job.written for job in wave.jobs] == wanted
    variants = sum(len(types) for _, (_, types) in pool.jobs)
    assert model.bank_bytes() == sum(wanted) + variants * HEADER_BYTES
    # Every job reads its tensor, whichever types it makes.
    read = sum(by_name[name].parameters for _, (name, _) in pool.jobs) / model.weights
    assert sum(job.read for job in wave.jobs) == pytest.approx(read * model.checkpoint)


def test_rounds_are_dealt_to_the_workers_and_wait_for_each_rung(model: Model) -> None:
    def sizes(study: Study, workers: int) -> list[int]:
        return [len(wave.jobs) for wave in stage(study, "trials", workers).waves]

    model = replace(model, rates=replace(model.rates, slopes=0.0))
    study = Study(model, 16, 0, shares=(1.0, 1.0, 1.0))
    assert sizes(study, 3) == [3] * 6, "8 candidates are dealt as 3, 3 and 2"
    assert sizes(study, 8) == sizes(study, 500) == [8] * 6, "a round keeps no more workers busy"
    assert sizes(replace(study, round=16), 500) == [16] * 3
    assert sizes(replace(study, shares=(1.0, 0.0, 0.0)), 8) == [8, 0, 0, 8, 0, 0]
    assert sizes(replace(study, shares=(1.0, 0.0, 0.0), baselines=3), 8) == [8, 3, 3, 8, 0, 0]
    assert sizes(replace(study, round=0), 8) == [16]

    def tokens(study: Study) -> float:
        return stage(study, "trials", 8).work.flop

    rung = Study(model, 16, 0, shares=(1.0, 0.0, 0.0))
    assert tokens(study) > 25 * tokens(rung), "later rungs have 8 and 31 times the tokens of the first"
    assert tokens(replace(study, round=0)) == pytest.approx(tokens(study), rel=0.3)


def test_what_a_streamed_search_reads_and_leaves_out(model: Model) -> None:
    memory, streamed = Study(model, 8, 2), Study(replace(model, stream=True), 8, 2)
    names = [s.name for s in streamed.stages(1)]
    assert "repair" in [s.name for s in memory.stages(1)]
    assert "repair" not in names
    passes = stage(streamed, "calibration").work.read / model.checkpoint
    assert passes == pytest.approx(5), "statistics, sets and three texts"
    assert stage(memory, "calibration").work.read == pytest.approx(model.checkpoint)
    assert stage(streamed, "option costs").work.read >= model.checkpoint * len(
        stage(streamed, "option costs").waves[0].jobs
    )
    assert stage(memory, "option costs").work.flop < stage(streamed, "option costs").work.flop


def test_a_model_twice_as_deep_takes_twice_the_work() -> None:
    from compression.families import family
    from experiments.streaming.make_checkpoint import CONFIG

    def compute(layers: int) -> Work:
        inventory = family({**CONFIG, "num_hidden_layers": layers}, "m").inventory()
        model = Model(stand_in(inventory, "any", ()), measured(), True, 10**9, "BF16", 10**8)
        return model.run(64, 256)

    assert compute(8).seconds == pytest.approx(2 * compute(4).seconds)
    assert compute(8).traffic == pytest.approx(2 * compute(4).traffic)
    # 25 layers of 128 experts, 8 active: 3 * 2048 * 768 weights each, and 37.7 million of attention.
    active = 25 * (8 * 3 * 2048 * 768 + 2 * 2048 * (32 + 4) * 128 + 2 * 128 + 2 * 2048 + 128 * 2048)
    assert compute(25).flop == pytest.approx(2 * 16384 * active, rel=0.01)


def test_rates_lie_between_what_was_measured() -> None:
    rates = replace(measured(), blocks={"100": [[1, 1e9], [100, 4e9]], "10000": [[1, 2e9], [100, 8e9]]})
    assert rates.flops(100, 10) == pytest.approx(2e9)
    assert rates.flops(1000, 10) == pytest.approx(2 * 2**0.5 * 1e9)
    assert rates.flops(10**9, 10**9) == pytest.approx(8e9), "no faster than what was seen"
    assert rates.flops(1, 0.1) == pytest.approx(1e9)


def test_fewer_first_uses_the_more_was_seen(model: Model) -> None:
    first, later = model.first_use(0), model.first_use(20)
    assert first.fetched > 3 * 10**6, "whole variants, with the experts that are pruned"
    assert 0 < later.fetched < first.fetched / 3


def test_sets_tried_are_those_of_the_code(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`set_trials` against the calls of a real layer: at most so many, and not far from it."""
    from compression.expert_sets import eliminate, mend
    from compression.layer_error import LayerError

    layer = tiny_model.inventory.moe_layers[0]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, tiny_model.inventory.hidden, generator=generator)
    with torch.inference_mode():
        error = LayerError(tiny_model, layer, inputs)
        calls = 0
        for name in ("total", "without"):
            plain = getattr(LayerError, name)

            def counted(self: LayerError, *args: Any, plain: Any = plain) -> float:
                nonlocal calls
                calls += 1
                return float(plain(self, *args))

            monkeypatch.setattr(LayerError, name, counted)
        error.local = True
        counts = [4, 6, 8]
        nested = eliminate(error, min(counts), [])
        leaving = calls
        for n in counts[:2]:
            mend(error, nested[n], [])
    # Without groups, leaving asks again for the tokens alone that use an expert: a quarter of them here.
    reckoned = set_trials(tiny_model.inventory, counts) - 2 * 8 * 16
    assert reckoned == leaving / 4
    assert 2 * 8 * 16 >= calls - leaving > 0
