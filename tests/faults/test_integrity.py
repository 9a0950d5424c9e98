"""Bits that flip between two runs of a search are found and named; it ends as if nothing had happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluators.tuning import Recipe
from search.engine import Search
from search.options import parse
from search.rebuild import OpenStudy
from spaces.errors import UserError
from tests.faults.commands import arguments, short_texts, trials, winner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DAMAGED = (
    "calibration.npz", "expert_sets.json", "bank.json", "base-search.npy", "base-report.npy",
    "base-report.json", "scores/*.json", "evidence/*.json", "repairs/*.safetensors",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _short_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluators.tuning.Recipe", lambda: Recipe(steps=4))


def flip(path: Path) -> None:
    """Flips a bit in the middle."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(bytes(raw))


def test_flipped_bits_are_named_and_change_nothing(
    tiny_checkpoint: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    out = tmp_path / "out"
    options = arguments(tiny_checkpoint, short_texts(texts, tmp_path), out, 0, "auto")

    def run() -> str:
        Search.open(parse(options)).run()
        return capsys.readouterr().out.replace("\n", "")

    assert "made anew" not in run()
    before = trials(out), winner(out)
    damaged = [sorted((out / "cache").glob(name))[0] for name in DAMAGED]
    for path in damaged:
        flip(path)
    begun = time.monotonic()
    said = run()
    for path in damaged:
        assert f"{path}: damaged" in said.replace("│", ""), path
    assert (trials(out), winner(out)) == before

    # A variant of the winner, which the export reads.
    study = OpenStudy.open("tiny", str(out / "study.journal"))
    worker = study.worker
    name, type_name = study.candidate(study.trial("best")).types[0]
    variant = worker.bank.path(worker.bank._keys[name, type_name])
    flip(variant)
    with pytest.raises(UserError, match="damaged") as caught:
        run()
    assert str(variant) in str(caught.value)
    assert not variant.exists()
    run()
    assert (trials(out), winner(out)) == before
    fault = {
        "fault": "a bit flipped in a file of the cache",
        "injected": len(damaged) + 1,
        "lost": 0,
        "seconds": round((time.monotonic() - begun) / 3, 1),
    }
    record_property("fault", json.dumps(fault))
