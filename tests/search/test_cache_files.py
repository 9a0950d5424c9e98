"""The cache's files are used for what they were made of, and removed with a line when they are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from compression import ggml, sealed
from compression.calibration import STATISTICS, Calibration
from compression.files import write_text
from evaluators.texts import TextSet
from search.cache_files import (
    bank_index,
    load_text,
    material,
    same_ingredients,
    save_bank_index,
    save_text,
    study_identity_of_cache,
    sweep,
)
from search.slope_book import SlopeBook
from search.stages import CostFile
from tests.compression.support import refused

TEXT = TextSet("search", np.arange(64, dtype=np.int32).reshape(2, 32), ("a", "b"), 4.0)
SLOPES = {("a.weight", "Q4_K"): (0.5, 0.25)}
INDEX = {("a.weight", "Q4_K"): ("0" * 40, 0.125)}


def calibrate(cache: Path, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    routing = {name: rng.random((2, 4)) for name in STATISTICS}
    Calibration({"a.weight": rng.random(32)}, routing, 64, "text").save(cache / "calibration.npz")
    sealed.seal(cache / "calibration.npz", {"model": "m"})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """What an earlier run left."""
    out = tmp_path / "cache"
    out.mkdir()
    write_text(out / "identity.json", json.dumps({"model": "m"}))
    save_text(TEXT, out)
    calibrate(out)
    sealed.write(out / "expert_sets.json", "{}", {"model": "m", "calibration": material(out)["calibration"]})
    save_bank_index(out, INDEX)
    SlopeBook(out / "slopes").put("key", SLOPES)
    sealed.write(out / "scores" / "one.json", "[1]", material(out, "search"))
    return out


def derived(cache: Path) -> set[str]:
    return {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and p.suffix != ".seal"}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_a_sound_cache_stays_as_it_is(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = derived(cache)
    sweep(cache)
    assert derived(cache) == before
    assert not said(capsys)
    assert bank_index(cache) == INDEX
    assert SlopeBook(cache / "slopes").get("key") == SLOPES
    assert np.array_equal(load_text("search", cache).windows, TEXT.windows)


@pytest.mark.parametrize(
    "name", ["calibration.npz", "expert_sets.json", "bank.json", "slopes/key.json", "scores/one.json"]
)
def test_a_damaged_file_is_named_and_removed_and_no_other(
    cache: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = derived(cache)
    raw = bytearray((cache / name).read_bytes())
    raw[len(raw) // 2] ^= 8
    (cache / name).write_bytes(bytes(raw))
    sweep(cache)
    assert derived(cache) == before - {name}
    (line,) = said(capsys).splitlines()
    assert str(cache / name) in line
    assert "damaged" in line


def test_every_damaged_file_is_named(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("calibration.npz", "bank.json", "scores/one.json")
    for name in names:
        (cache / name).write_bytes(b"x" * (cache / name).stat().st_size)
    sweep(cache)
    out = said(capsys)
    assert all(f"{cache / name}: damaged" in out for name in names)


def test_another_quantizer_takes_what_was_made_with_the_old_one(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = CostFile(cache / "option_costs.jsonl", material(cache, "search"))
    costs.append([("a.weight", "Q4_K", 512, 0.5)])
    monkeypatch.setattr(ggml, "version", lambda: "ggml 2")
    refused(lambda: bank_index(cache), cache / "bank.json", "quantizer", "now ggml 2")
    changed = CostFile(cache / "option_costs.jsonl", material(cache, "search"))
    assert changed.read() == ({}, {})
    assert changed.unsound == 1
    sweep(cache)
    assert derived(cache) == {
        "identity.json", "windows-search.npz", "calibration.npz", "expert_sets.json", "option_costs.jsonl"
    }  # fmt: skip
    assert said(capsys).count("of another quantizer") == 3


def test_another_calibration_takes_what_hangs_on_it(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = CostFile(cache / "option_costs.jsonl", material(cache, "search"))
    costs.append([("a.weight", "Q4_K", 512, 0.5)])
    assert costs.read()[0] == {(("a.weight", "Q4_K"), 512): 0.5}
    calibrate(cache, seed=1)
    assert SlopeBook(cache / "slopes").get("key") is None
    assert "slopes/key.json" in said(capsys)
    assert CostFile(cache / "option_costs.jsonl", material(cache, "search")).read() == ({}, {})
    sweep(cache)
    assert derived(cache) == {"identity.json", "windows-search.npz", "calibration.npz", "option_costs.jsonl"}


def test_a_cache_of_another_model_is_not_used(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(cache / "identity.json", json.dumps({"model": "other"}))
    sweep(cache)
    assert "calibration.npz" not in derived(cache)
    assert "another model (m, now other)" in said(capsys)


def test_files_of_a_version_without_seals_are_made_anew(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seal in cache.rglob("*.seal"):
        seal.unlink()
    sweep(cache)
    assert derived(cache) == {"identity.json"}
    assert "made by an earlier version" in said(capsys)


def test_a_flipped_digit_of_a_cost_is_not_used(tmp_path: Path) -> None:
    file = CostFile(tmp_path / "costs.jsonl", {"model": "m"})
    file.append([("a.weight", "Q4_K", 512, 0.5), ("a.weight", "Q5_K", 512, 0.25)])
    file.file.write_text(file.file.read_text().replace("0.25", "0.35"))
    assert file.read()[0] == {(("a.weight", "Q4_K"), 512): 0.5}
    assert file.unsound == 1


def test_a_study_belongs_to_a_calibration_and_a_quantizer(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = study_identity_of_cache(cache)
    same_ingredients(None, first, "s")
    same_ingredients(first, first, "s")
    calibrate(cache, seed=1)
    refused(lambda: same_ingredients(first, study_identity_of_cache(cache), "s"), "'s'", "calibration")
    calibrate(cache)
    assert study_identity_of_cache(cache) == first
    (cache / "expert_sets.json").write_text('{"layers": {}}')
    refused(lambda: same_ingredients(first, study_identity_of_cache(cache), "s"), "calibration")
    (cache / "expert_sets.json").write_text("{}")
    monkeypatch.setattr(ggml, "version", lambda: "ggml 2")
    refused(lambda: same_ingredients(first, study_identity_of_cache(cache), "s"), "quantizer", "ggml 2")


def test_the_quantizer_goes_by_what_is_in_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "library.so").write_bytes(content)
        monkeypatch.setattr(ggml, "_library_file", lambda: tmp_path / "library.so")
        named.append(ggml.version.__wrapped__())
    assert named[0] == named[2] != named[1]
