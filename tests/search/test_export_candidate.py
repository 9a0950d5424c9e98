"""The command that compresses a GGUF file: what it writes, and one line with code 2 for everything wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compression.gguf_file import GgufFile
from compression.gguf_inventory import describe_gguf
from evaluators.llama_cpp import probe_file
from search import export
from tests.compression import tiny_gguf
from tests.compression.support import refused
from tests.compression.test_gguf_inventory import write_imatrix

STACK = "blk.0.ffn_up_exps.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("model") / "model.gguf", "qwen3moe")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def call(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        export.main()

    return call


def start(run, model: Path, folder: Path) -> dict:  # type: ignore[no-untyped-def, type-arg]
    run("--model", model, "--uniform", "Q8_0", "--out", folder / "start.json")
    data: dict = json.loads((folder / "start.json").read_text())  # type: ignore[type-arg]
    return data


def test_from_a_uniform_start_to_a_pruned_model(run, model: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    data = start(run, model, tmp_path)
    inventory = describe_gguf(GgufFile.open(model))
    assert list(data["types"]) == [t.name for t in inventory.quantizable]
    for layer in data["layers"]:
        layer.update(experts=[0, 1, 4, 6, 7], top_k=1)
    # Another order, and one tensor left out.
    types = dict(reversed(data["types"].items()))
    del types["output.weight"]
    types[STACK] = "IQ2_XS"
    file, out = tmp_path / "candidate.json", tmp_path / "new" / "out.gguf"
    file.write_text(json.dumps({**data, "types": types}))
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", {STACK: np.ones((8, 256))}, {STACK: np.ones((8, 1))})
    capsys.readouterr()
    run("--model", model, "--candidate", file, "--imatrix", imatrix, "--out", out, "--threads", "1")
    text = capsys.readouterr().out
    assert f"{out}: " in text
    assert f"({out.stat().st_size:,} bytes)" in text
    made = GgufFile.open(out)
    types_made = {n: t.type_name for n, t in made.tensors.items()}
    assert (types_made[STACK], types_made["output.weight"]) == ("IQ2_XS", "F32")
    assert types_made["blk.1.ffn_down_exps.weight"] == "Q8_0"
    assert made.tensors[STACK].shape == (5, 256, 256)
    assert (describe_gguf(made).experts, describe_gguf(made).top_k) == (5, 1)
    assert len(probe_file(out, [1, 2, 3], generate=2).generated) == 2
    # Once more from what was made: its 2 bits are the best there is, so a person is told.
    run("--model", out, "--uniform", "Q6_K", "--out", tmp_path / "again.gguf")
    assert "warning: 1 tensors are quantized a second time (from IQ2_XS)" in capsys.readouterr().out


def test_a_candidate_of_another_model_is_refused(run, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data, file = start(run, model, tmp_path), tmp_path / "candidate.json"
    out = tmp_path / "out.gguf"

    def check(changed: dict, *parts: str) -> None:  # type: ignore[type-arg]
        file.write_text(json.dumps({**data, **changed}))
        refused(lambda: run("--model", model, "--candidate", file, "--out", out), file, *parts)
        assert not out.exists()

    check({"version": 2}, "version must be 1")
    check({"layers": data["layers"][:1]}, "layers must be")
    check({"layers": [{**m, "top_k": 9} for m in data["layers"]]}, "top_k must be within")
    check({"types": {"blk.0.attn_w.weight": "Q8_0"}}, "unknown tensor", "'blk.0.attn_")
    check({"types": {"output_norm.weight": "Q8_0"}}, "output_norm.weight stays F32")
    check({"types": {STACK: "Q9"}}, STACK, "Q9")
    check({"types": {STACK: "IQ1_S"}}, STACK, "--imatrix FILE")
    file.write_text("{")
    refused(lambda: run("--model", model, "--candidate", file, "--out", out), file, "not a candidate")
    gone = tmp_path / "gone.json"
    refused(lambda: run("--model", model, "--candidate", gone, "--out", out), gone, "cannot be read")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ([], "give --study NAME"),
        (["--study", "a", "--model", "b"], "not both"),
        (["--study", "a", "--candidate", "b"], "--candidate does not go with --study"),
        (["--study", "a", "--uniform", "b"], "--uniform does not go with --study"),
        (["--study", "a", "--imatrix", "b"], "--imatrix does not go with --study"),
        (["--study", "a", "--threads", "1"], "--threads does not go with --study"),
        (["--study", "../a"], "--study '../a'"),
        (["--model", "a", "--trial", "1"], "--trial does not go with --model"),
        (["--model", "a", "--storage", "b"], "--storage does not go with --model"),
        (["--model", "a", "--out", "b.gguf"], "--candidate FILE and --uniform TYPE"),
        (["--model", "a", "--out", "b.gguf", "--candidate", "c", "--uniform", "d"], "--model needs one of"),
        (["--model", "a", "--candidate", "c"], "needs --out"),
        (["--model", "a", "--candidate", "c", "--out", "b.json"], "must end in .gguf"),
        (["--model", "a", "--uniform", "c", "--out", "b"], "must end in .gguf or .json"),
        (
            ["--model", "a", "--uniform", "c", "--out", "b.gguf", "--threads", "0"],
            "--threads must be at least 1",
        ),
        (["--model", "a", "--frobnicate"], "--frobnicate"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], rule: str) -> None:
    refused(lambda: export.parse(arguments), rule)


def test_bad_files_end_with_one_line_and_code_2(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:3000])
    child = subprocess.run(
        [sys.executable, "-m", "search.export", "--model", broken, "--uniform", "Q8_0", "--out",
         tmp_path / "out.gguf"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 2
    assert child.stderr.startswith(f"error: {broken}: ")
    assert child.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["broken.gguf"]


def test_an_unknown_uniform_type_names_the_nearest(run, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused(
        lambda: run("--model", model, "--uniform", "Q4_K_M", "--out", tmp_path / "a.gguf"),
        "--uniform", "did you mean 'Q4_K'",
    )  # fmt: skip
