"""lm-eval in a run: refused before anything is done, and in the result beside the base model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from search.engine import Search
from search.options import parse
from search.outcome import _row

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_scores_the_winners_and_the_exported_file_against_the_base(
    finished: tuple[list[str], Path, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out, _ = finished
    at = arguments.index("--tasks")
    asked = [*arguments[:at], "--tasks", "bb_agreement,local_lastword", "--limit", "40", *arguments[at + 2 :]]
    result = Search.open(parse(asked)).run()
    tasks = result["tasks"]
    shown = capsys.readouterr().out
    winners = [str(n) for n in result["winners"].values() if n is not None]
    assert list(tasks) == ["base", *winners, "gguf"]
    fields = {"metric", "value", "standard_error", "items"}
    for name, row in tasks.items():
        assert list(row) == ["bb_agreement", "local_lastword"]
        for task, score in row.items():
            assert score.keys() == (fields if name == "base" else {*fields, "difference", "difference_se"})
            assert (score["metric"], score["items"]) == ("acc", 40)
            if name != "base":
                assert score["difference"] == pytest.approx(score["value"] - tasks["base"][task]["value"])
    # The file is the portable winner, give or take llama.cpp's rounding of activations.
    portable = tasks[str(result["winners"]["portable"])]["bb_agreement"]["value"]
    assert abs(tasks["gguf"]["bb_agreement"]["value"] - portable) <= 2 / 40
    assert json.loads((out / "result.json").read_text())["tasks"] == tasks
    summary = " ".join(shown[shown.index("lm-eval base") :].split())
    for name in (*(f"trial {n}" for n in winners), "llama.cpp"):
        score = tasks[name.removeprefix("trial ").replace("llama.cpp", "gguf")]["bb_agreement"]
        assert (
            f"lm-eval {name} bb_agreement {score['value']:.3f} ± {score['standard_error']:.3f} "
            f"({score['difference']:+.3f} ± {score['difference_se']:.3f})"
        ) in summary


def test_a_difference_is_given_where_items_are_right_or_wrong() -> None:
    base = {
        "metric": "acc", "value": 0.5, "standard_error": 0.5, "items": 2, "ids": (3, 1), "correct": (1, 0)
    }  # fmt: skip
    other = {**base, "value": 1.0, "standard_error": 0.0, "correct": (1, 1)}
    plain = {"metric": "acc", "value": 1.0, "standard_error": 0.0, "items": 2}
    assert _row(other, base, "7") == {**plain, "difference": 0.5, "difference_se": 0.5}
    assert _row(other, base, "base") == plain
    assert _row({**other, "correct": ()}, {**base, "correct": ()}, "7") == plain


def test_a_hub_task_offline_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "search.run", "--budget", "103GB", "--workers", "1", "--limit", "200",
        "--tasks", "local_cloze,hellaswag", "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: task 'hellaswag' needs the Hugging Face hub")
    assert "tasks that need no hub: bb_agreement" in line
    assert "calibration" not in done.stdout
    assert not out.exists()
