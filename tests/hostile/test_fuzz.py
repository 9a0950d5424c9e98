"""Whatever the input, a function returns or says in one line what is wrong, soon and in little memory."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from tests.hostile.strategies import INPUTS
from tests.hostile.targets import TARGETS, Judge, spoilt_seeds

MANY = 100_000
BATCH = 50  # inputs of an example; hypothesis takes a millisecond for one, whatever is in it
ROOT = Path(__file__).parents[2]
NAMES = sorted(TARGETS)


def test_every_target_has_inputs_and_takes_its_seeds(tmp_path: Path) -> None:
    assert set(INPUTS) == set(TARGETS)
    for name, target in TARGETS.items():
        judge = Judge(target, tmp_path)
        for raw in target.seeds:
            if name == "index":  # the shards it names
                for shard in ("m-1.safetensors", "m-2.safetensors"):
                    (tmp_path / shard).touch()
            judge(raw)
        assert judge.accepted == len(target.seeds), name


def fuzzed(name: str, folder: Path, inputs: int, repeatable: bool) -> Judge:
    judge = Judge(TARGETS[name], folder)

    @settings(
        max_examples=inputs // BATCH, deadline=None, database=None, derandomize=repeatable,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(st.lists(INPUTS[name], min_size=BATCH, max_size=BATCH))
    def run(batch: list[bytes]) -> None:
        for raw in batch:
            try:
                judge(raw)
            except BaseException:
                note(f"the input: {raw!r}")
                raise

    run()
    return judge


def told(name: str, engine: str, inputs: int) -> str:
    """What the page of results shows; a fault would have ended the test before."""
    return json.dumps({"target": name, "engine": engine, "inputs": inputs, "faults": 0})


@pytest.mark.parametrize("name", NAMES)
def test_some_inputs(name: str, tmp_path: Path) -> None:
    judge = fuzzed(name, tmp_path, 300, repeatable=True)
    assert judge.inputs >= 300


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_many_inputs(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    judge = fuzzed(name, tmp_path, MANY, repeatable=False)
    assert judge.inputs >= MANY
    assert name == "index" or judge.accepted > MANY / 1000  # or nothing behind the first check was reached
    record_property("fuzz", told(name, "hypothesis", judge.inputs))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs moefit[fuzz]")
@pytest.mark.parametrize("name", NAMES)
def test_inputs_led_by_coverage(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    corpus, scratch = tmp_path / "corpus", tmp_path / "scratch"
    corpus.mkdir()
    scratch.mkdir()
    for number, raw in enumerate(spoilt_seeds(TARGETS[name])):
        (corpus / str(number)).write_bytes(raw)
    longest = max(map(len, TARGETS[name].seeds)) + 256
    command = [
        sys.executable, "-m", "tests.hostile.atheris_targets", name, str(scratch), str(corpus),
        f"-runs={MANY}", f"-max_len={longest}", "-len_control=0", "-timeout=10", "-rss_limit_mb=4096",
        "-print_final_stats=1", f"-artifact_prefix={tmp_path}/", "-max_total_time=1500",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    assert executed is not None
    assert int(executed[1]) >= MANY
    record_property("fuzz", told(name, "atheris", int(executed[1])))
