from __future__ import annotations

import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import scale_check
from search.options import Options, parse
from search.problem import Problem, make_problem
from search.scale import estimate as module
from search.scale.estimate import checkpoint_bytes, estimate, estimate_lines, stand_in
from search.scale.rates import measured

Usage = namedtuple("Usage", "total used free")


def asked(arguments: list[str]) -> tuple[Problem, Options]:
    from compression.checkpoint import open_checkpoint

    o = parse(arguments)
    source = open_checkpoint(o.model).inventory
    return make_problem(source, o.model, o.target, o.budget, o.device, o.context, o.types), o


def test_bank_and_memory_are_those_of_a_finished_run(finished: tuple[list[str], Path, dict]) -> None:
    arguments, out, result = finished
    found = estimate(*asked(arguments))
    files = (out / "cache" / "bank").rglob("*.q")
    assert found.bank == sum(f.stat().st_size for f in files)
    peak = max(stage["peak_memory_bytes"] for stage in result["stages"].values())
    assert 0.5 < found.memory / peak < 2
    assert list(found.seconds) == [s for s in result["stages"] if s != "report"]
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_the_reference_search_takes_what_is_reckoned() -> None:
    """Against every job of a run that was timed, and the README's run of 160 trials with two workers."""
    trace, rates = scale_check.read("scale_trace.json"), measured()
    stages = scale_check.by_stage(trace, rates)
    reckoned, timed = (sum(column) for column in zip(*stages.values(), strict=True))
    assert 0.5 < reckoned / timed < 2
    for name, (ours, theirs) in stages.items():
        if theirs > 0.1 * timed:
            assert 0.5 < ours / theirs < 2, name
    found = estimate(*asked(["--budget", "103GB", "--workers", "2"]))
    assert 0.5 < sum(found.seconds.values()) / 897 < 2


def test_a_disk_that_is_too_small_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, o = asked(["--budget", "103GB", "--workers", "0", "--out", str(tmp_path / "not" / "yet")])
    assert not any("warning" in line for line in estimate_lines(problem, o))
    looked: list[Any] = []

    def usage(path: Any) -> Usage:
        looked.append(path)
        return Usage(10**9, 0, 10**8)

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    (line,) = [line for line in estimate_lines(problem, o) if "warning" in line]
    assert "--out" in line
    assert "--types" in line
    assert looked == [tmp_path], "the nearest folder that is there"
    fewer, o = asked(["--budget", "103GB", "--workers", "0", "--out", str(tmp_path), "--types", "IQ1_S,Q2_K"])
    assert not any("warning" in line for line in estimate_lines(fewer, o))


def test_memory_that_is_too_small_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, o = asked(["--budget", "103GB", "--workers", "2"])
    monkeypatch.setattr("search.memory.free_memory", lambda: 10**9)
    lines = estimate_lines(problem, o)
    assert any(line.startswith("warning: --workers 2") for line in lines)


def test_a_model_of_the_real_size_is_reckoned_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compression.checkpoint import open_target

    problem, o = asked(["--budget", "103GB", "--workers", "0", "--stream", "yes"])
    real = open_target("deepseek-v3")
    monkeypatch.setattr(module, "checkpoint_bytes", lambda path: 688 * 10**9)
    begun = time.process_time()
    found = estimate(replace(problem, source=real, target=real), o)
    assert time.process_time() - begun < 3
    assert found.bank > 5e12
    assert any("--types" in line for line in found.warnings)
    assert sum(found.seconds.values()) > 30 * 86400


def test_fewer_types_and_float8_are_noticed(tmp_path: Path) -> None:
    problem, o = asked(["--budget", "103GB", "--workers", "0"])
    half = module.make_study(problem, o, False, problem.source.parameters(), measured())
    whole = module.make_study(problem, o, False, 2 * problem.source.parameters(), measured())
    assert half.model.kind == "F8_E4M3"
    assert whole.model.kind == "BF16"
    assert half.model.read().seconds > whole.model.read().seconds
    for name in ("a.safetensors", "b.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"0" * 10)
    assert checkpoint_bytes(tmp_path) == 20


def test_the_stand_in_has_as_many_options_as_a_real_space(tiny: Any) -> None:
    space = stand_in(tiny.inventory, "any", ())
    assert len(space.criteria) == 4
    layer = tiny.inventory.moe_layers[0]
    half = tiny.inventory.experts // 2
    assert len({space.experts(layer, half, c) for c in space.criteria}) == 4, "no two rankings agree"
