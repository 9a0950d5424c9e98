"""A worker repairs a candidate once, finds it again, and scores and writes it as repaired."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compression.gguf_file import GgufFile
from evaluators.texts import TextSet
from evaluators.tuning import Recipe
from search.cache_files import save_text
from search.worker import Setup, Worker
from spaces.candidate import Candidate
from tests.compression.support import candidate, refused

LENGTH = 32
TOKENS = 4 * LENGTH
SHORT = Recipe(steps=4, windows=2, scale_rate=2e-2, plain_rate=2e-2, warmup=1)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluators.tuning.Recipe", lambda: SHORT)


@pytest.fixture(scope="module")
def worker(
    tiny_checkpoint: Path, tiny_texts: dict[str, TextSet], tmp_path_factory: pytest.TempPathFactory
) -> Worker:
    """With its texts, base states and a bank of two types of every tensor; weights are cached."""
    cache = tmp_path_factory.mktemp("cache")
    for name, source in (("calibration", "calibration"), ("repair", "calibration"), ("search", "search")):
        whole = tiny_texts[source]
        windows = whole.windows[:4, :LENGTH]
        save_text(replace(whole, name=name, windows=windows, sources=("x",) * 4), cache)
    made = Worker(Setup(str(tiny_checkpoint), "tiny", str(cache), cache_bytes=2**28))
    made.calibrate()
    made.base_states("search")
    for tensor in made.inventory.quantizable:
        few = "Q2_K" if tensor.row % 256 == 0 else "IQ4_NL"
        made.register([row[:3] for row in made.quantize(tensor.name, [few, "Q8_0"])])
    return made


def chosen(worker: Worker, top_k: int = 2) -> Candidate:
    types = {t.name: "Q2_K" if t.row % 256 == 0 else "IQ4_NL" for t in worker.inventory.quantizable}
    return candidate(worker.inventory, {1: (0, 2, 6), 2: (1, 4, 5)}, {1: top_k, 2: top_k}, types)


def file_of(worker: Worker, wanted: Candidate) -> Path:
    return worker.cache / "repairs" / f"{wanted.key}.safetensors"


def test_repairs_are_made_once_and_found_again(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = chosen(worker)
    file = file_of(worker, wanted)
    tokens = worker.repair(wanted.to_json())
    once = worker._text("calibration", 10**9).windows.size
    assert tokens == once + 3 * SHORT.steps * SHORT.windows * LENGTH
    before, when = file.read_bytes(), file.stat().st_mtime_ns
    monkeypatch.setattr("evaluators.tuning.Tuner.run", lambda *_: pytest.fail("made again"))
    assert worker.repair(wanted.to_json()) == tokens
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (before, when)
    assert worker.repairs(wanted).candidate == wanted.key


def test_repairs_made_anew_are_the_same(worker: Worker) -> None:
    wanted = chosen(worker)
    worker.repair(wanted.to_json())
    before = file_of(worker, wanted).read_bytes()
    file_of(worker, wanted).unlink()
    worker.score([candidate(worker.inventory, {1: (3, 7)}).to_json()], "search", TOKENS)
    worker.repair(wanted.to_json())
    assert file_of(worker, wanted).read_bytes() == before


def test_scores_with_repairs_are_others_and_lower_and_those_without_stay(worker: Worker) -> None:
    text = chosen(worker).to_json()
    plain = worker.score([text], "search", TOKENS)[0]
    worker.repair(text)
    assert worker.score([text], "search", TOKENS)[0] == plain
    repaired = worker.score_repaired(text, "search", TOKENS)
    assert {k: len(v) for k, v in repaired.items()} == {"kl": 4, "nll": 4, "top1": 4}
    assert np.mean(repaired["kl"]) < 0.99 * np.mean(plain["kl"])
    other = candidate(worker.inventory).to_json()
    expected = worker.score([other], "search", TOKENS)
    assert worker.score_repaired(text, "search", TOKENS) == repaired
    assert worker.score([text], "search", TOKENS)[0] == plain
    assert worker.score([other], "search", TOKENS) == expected
    few = worker.score_repaired(text, "search", 2 * LENGTH)
    np.testing.assert_allclose(few["kl"], repaired["kl"][:2], rtol=1e-4)


@pytest.mark.parametrize("name", ["x.gguf", "folder"])
def test_files_are_as_large_and_hold_the_repaired_bytes(worker: Worker, tmp_path: Path, name: str) -> None:
    wanted = chosen(worker)
    worker.repair(wanted.to_json())
    paths = [tmp_path / which / name for which in ("plain", "repaired")]
    for path in paths:
        path.parent.mkdir()
    plain = worker.export(wanted.to_json(), str(paths[0]))
    assert worker.export(wanted.to_json(), str(paths[1]), repaired=True) == plain
    if name == "folder":
        paths = [p / "moefit.safetensors" for p in paths]
    one, other = (p.read_bytes() for p in paths)
    assert len(one) == len(other) == plain
    assert one != other
    if name == "folder":
        return
    overrides, file = worker.repairs(wanted), GgufFile.open(paths[1])
    for tensor, expected in {**overrides.blocks, **overrides.plain}.items():
        about = worker.inventory.by_name[tensor]
        kept = {1: [0, 2, 6], 2: [1, 4, 5]}.get(about.layer or 0) if about.per_expert else None
        shipped = expected if kept is None else expected[kept]
        assert file.raw(tensor).tobytes() == shipped.tobytes(), tensor


def test_a_candidate_that_was_not_repaired_is_one_line(worker: Worker, tmp_path: Path) -> None:
    wanted = chosen(worker, top_k=1)
    text = wanted.to_json()
    refused(lambda: worker.score_repaired(text, "search", TOKENS), file_of(worker, wanted))
    refused(lambda: worker.export(text, str(tmp_path / "x.gguf"), True), file_of(worker, wanted))
    assert not (tmp_path / "x.gguf").exists()
    assert worker.model.overrides is None


def test_repairs_of_another_candidate_are_not_taken(worker: Worker) -> None:
    wanted, other = chosen(worker), chosen(worker, top_k=1)
    worker.repair(wanted.to_json())
    file_of(worker, other).write_bytes(file_of(worker, wanted).read_bytes())
    try:
        refused(lambda: worker.score_repaired(other.to_json(), "search", TOKENS), "another candidate")
    finally:
        file_of(worker, other).unlink()
