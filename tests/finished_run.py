"""A finished search of a small random model, made once for every test that looks at one."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluators.tuning import Recipe
from search.engine import Search
from search.options import SHIPPED_TEXTS, parse


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text of some 9,000 tokens and a calibration text of some 2,000."""
    folder = tmp_path_factory.mktemp("texts")
    lines = (SHIPPED_TEXTS / "search.jsonl").read_text("utf-8").splitlines()
    text, calibration = folder / "text.jsonl", folder / "calibration.jsonl"
    text.write_text("\n".join(lines[::10][:16]), "utf-8")
    calibration.write_text("\n".join(lines[5::40][:3]), "utf-8")
    return text, calibration


@pytest.fixture(scope="session")
def finished(
    tiny_checkpoint: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path, dict]:
    """Arguments, folder and result of a finished search of the small model, in this process."""
    out = tmp_path_factory.mktemp("run") / "study"
    plan = Search.open(parse(["--budget", "100GB", "--workers", "0"])).problem.target
    assert plan.name == "deepseek-v3"
    arguments = [
        "--budget", "3MB", "--model", str(tiny_checkpoint), "--workers", "0", "--trials", "14",
        "--text", str(texts[0]), "--calibration", str(texts[1]), "--tasks", "none",
        "--study", "tiny", "--out", str(out), "--device", "raspberry-pi-5-16",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluators.tuning.Recipe", lambda: Recipe(steps=6))
        result = Search.open(parse(arguments)).run()
    return arguments, out, result
