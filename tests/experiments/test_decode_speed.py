"""The profile that is fitted to times, and the files that are timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compression.gguf_file import GgufFile
from evaluators.throughput import Throughput
from experiments.decode_files import Files, inventory
from experiments.decode_speed import CONTEXT, MIXED_TOP_K, TOP_K, Clock, fit, mixed, predictions, uniform
from spaces.carry import Carry
from spaces.devices import Device
from spaces.errors import UserError

MODEL = inventory(1)
RATES = {"IQ3_S": 2e9, "Q4_K": 8e9, "BF16": 3e9}
BLANK = Device("this-machine", "This machine", 0, 0.0, "test")


def test_a_fit_finds_the_profile_that_made_the_times() -> None:
    # BF16 is bound by memory here: 10e9 * 0.5 bytes are 2.5e9 weights a second.
    made_by = replace(BLANK, bandwidth=10e9, efficiency=0.5, overhead=2e-3, rates=RATES)
    throughput = Throughput(Carry(MODEL, MODEL), made_by, CONTEXT)
    times = {(t, k): throughput.seconds(uniform(MODEL, t, k).plan) for t in RATES for k in TOP_K}
    found = fit(MODEL, times, 8e9, BLANK)
    assert found.overhead == pytest.approx(2e-3, rel=0.02)
    assert found.bandwidth * found.efficiency == pytest.approx(5e9, rel=0.01)
    assert found.rates == pytest.approx({**RATES, "BF16": 2.5e9}, rel=0.01)
    types = tuple(
        (name, ("IQ3_S", "Q4_K")[i % 2]) for i, (name, _) in enumerate(uniform(MODEL, "Q4_K", 2).types)
    )
    other = {"mixed": replace(uniform(MODEL, "Q4_K", 5), types=types)}
    assert predictions(MODEL, found, other) == pytest.approx(predictions(MODEL, made_by, other), rel=0.01)


def test_the_candidates_to_predict_are_valid_and_differ() -> None:
    found = mixed(MODEL)
    assert len(found) == len(MIXED_TOP_K) >= 6
    assert {c.layers[0].top_k for c in found.values()} == set(MIXED_TOP_K)
    for candidate in found.values():
        candidate.validate(MODEL)
        assert len({t for _, t in candidate.types}) > 2
    assert len({c.types for c in found.values()}) == len(found)


def test_a_file_has_the_size_that_is_predicted(tmp_path: Path) -> None:
    plan = uniform(MODEL, "Q4_0", 2).plan
    path = Files(MODEL, tmp_path).write("small", plan)
    file = GgufFile.open(path)
    assert sum(info.size for info in MODEL.infos(plan)) <= path.stat().st_size
    assert {t.name for t in MODEL.tensors} == set(file.tensors)


def test_times_are_kept_and_not_mixed_with_those_of_other_settings(tmp_path: Path) -> None:
    files = Files(MODEL, tmp_path)
    candidates = {"a": uniform(MODEL, "Q4_0", 2), "b": uniform(MODEL, "Q4_0", 8)}
    times = Clock.open(files, 1, 1).measure(candidates)
    assert 0 < times["a"] < times["b"]
    assert not list(tmp_path.glob("*.gguf"))
    again = Clock.open(files, 1, 1)
    assert again.measure(candidates) == times
    assert not list(tmp_path.glob("*.gguf"))
    with pytest.raises(UserError, match="another folder"):
        Clock.open(files, 2, 1)
