"""The commands, end to end, on a small random checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluators.tuning import Recipe
from search import export, run
from search.engine import Search
from search.options import parse
from spaces.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _short_repairs() -> Iterator[None]:
    """Repairs of a few steps: whether they pay is not what is tested here."""
    short = Recipe(steps=4, windows=2, warmup=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluators.tuning.Recipe", lambda: short)
        yield


def test_every_finished_trial_fits_the_budget(finished: tuple[list[str], Path, dict]) -> None:
    result = finished[2]
    assert len(result["trials"]) == 14
    assert all(0 < t["scores"]["target_bytes"] <= 3_000_000 for t in result["trials"])


def test_result_file_holds_what_the_run_returned(finished: tuple[list[str], Path, dict]) -> None:
    _, out, result = finished
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    assert {"trials", "front", "winners", "baselines", "stages", "target", "device", "model"} <= result.keys()
    numbers = {t["number"] for t in result["trials"]}
    assert set(result["front"]) <= numbers
    assert set(result["baselines"].values()) <= numbers
    assert {"knapsack", "paper-rules"} <= result["baselines"].keys()


def test_result_file_says_what_repairs_did_and_which_are_used(
    finished: tuple[list[str], Path, dict],
) -> None:
    result = finished[2]
    assert result["repairs"].keys() == {str(n) for n in result["winners"].values() if n is not None}
    for number, repair in result["repairs"].items():
        before = result["finals"][number]["selection"]["kl"]
        assert repair["used"] == (repair["selection"]["kl"] < before)
        assert repair["tokens"] > 0
        assert repair["report"]["kl"] > 0


def test_result_file_says_what_the_trials_took(finished: tuple[list[str], Path, dict]) -> None:
    result = finished[2]
    took, tokens = result["trial_stage"], sum(t["scores"]["tokens"] for t in result["trials"])
    assert took["tokens"] >= tokens > 0
    assert 0 < took["evaluation_seconds"] <= took["seconds"]


def test_winner_is_not_worse_than_any_baseline_on_the_text_it_was_chosen_on(
    finished: tuple[list[str], Path, dict],
) -> None:
    result = finished[2]
    kl = {t["number"]: t["scores"]["kl"] for t in result["trials"]}
    portable = {t["number"] for t in result["trials"] if t["portable"]}
    best = min(kl[n] for n in portable)
    simple = [kl[n] for n in result["baselines"].values() if n in portable]
    assert best <= min(simple)


def test_emitted_file_has_the_predicted_size_and_runs(finished: tuple[list[str], Path, dict]) -> None:
    _, out, result = finished
    exported = result["export"]
    assert (out / "winner/model.gguf").stat().st_size == exported["bytes"] == exported["predicted_bytes"]
    check = exported["llama_cpp"]
    assert len(check["generated"]) > 0
    assert abs(check["relative_difference"]) < 0.005


def test_winner_folder_holds_candidate_recipe_and_type_file(finished: tuple[list[str], Path, dict]) -> None:
    _, out, result = finished
    recipe = json.loads((out / "winner/recipe.json").read_text())
    lines = (out / "winner/tensor-types.txt").read_text().splitlines()
    assert recipe["file_bytes"] == result["export"]["bytes"]
    assert len(lines) == len(recipe["types"])
    assert (out / "winner/candidate.json").exists()
    assert (out / "pareto.html").stat().st_size > 10_000
    assert (out / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_running_again_adds_no_trial_and_gives_the_same_winner(
    finished: tuple[list[str], Path, dict],
) -> None:
    arguments, _, result = finished
    again = Search.open(parse(arguments)).run()
    assert [t["scores"] for t in again["trials"]] == [t["scores"] for t in result["trials"]]
    assert again["winners"] == result["winners"]


def test_running_again_with_more_trials_goes_on(finished: tuple[list[str], Path, dict]) -> None:
    arguments, _, result = finished
    more = [a if a != "14" else "16" for a in arguments]
    again = Search.open(parse(more)).run()
    assert len(again["trials"]) == 16
    assert [t["params"] for t in again["trials"][:14]] == [t["params"] for t in result["trials"]]


def test_study_of_another_budget_under_the_same_name_is_refused(
    finished: tuple[list[str], Path, dict],
) -> None:
    other = [a if a != "3MB" else "4MB" for a in finished[0]]
    with pytest.raises(UserError, match="another budget"):
        Search.open(parse(other)).run()


def test_study_of_another_model_under_the_same_folder_is_refused(
    finished: tuple[list[str], Path, dict], tmp_path: Path
) -> None:
    arguments = finished[0]
    copy = tmp_path / "other"
    shutil.copytree(arguments[arguments.index("--model") + 1], copy)
    config = json.loads((copy / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (copy / "config.json").write_text(json.dumps(config))
    other = list(arguments)
    other[other.index("--model") + 1] = str(copy)
    with pytest.raises(UserError, match="another model"):
        Search.open(parse(other)).run()


def test_export_writes_the_recorded_trial(
    finished: tuple[list[str], Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = finished[1]
    target = tmp_path / "best.gguf"
    argv = ["export", "--study", "tiny", "--storage", str(out / "study.journal"), "--out", str(target)]
    monkeypatch.setattr(sys, "argv", argv)
    export.main()
    assert target.read_bytes() == (out / "winner/model.gguf").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trial", "99999"], "99999"),
        (["--trial", "worst"], "best or a trial's number"),
        (["--study", "../etc"], "--study"),
        (["--storage", "/no/such.journal"], "no such journal"),
    ],
)
def test_bad_export_is_one_line(
    finished: tuple[list[str], Path, dict], arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["export", "--study", "tiny", "--storage", str(finished[1] / "study.journal")]
    monkeypatch.setattr(sys, "argv", base + arguments)
    with pytest.raises(UserError, match=says) as caught:
        export.main()
    assert "\n" not in str(caught.value)


BAD = [
    (["--budget", "103"], "--budget"),
    (["--budget", "-5GB"], "--budget"),
    (["--budget", "0GB"], "--budget"),
    (["--budget", "3TB"], "above the whole model"),
    (["--budget", "103GB", "--target", "deepseek-v9"], "did you mean 'deepseek-v3'"),
    (["--budget", "103GB", "--device", "ryzen"], "--device"),
    (["--budget", "103GB", "--device-memory", "64GB"], "does not fit the device"),
    (["--budget", "103GB", "--context", "0"], "--context"),
    (["--budget", "103GB", "--context", "10000000"], "does not fit the device"),
    (["--budget", "103GB", "--sampler", "tpee"], "did you mean 'tpe'"),
    (["--budget", "103GB", "--runtime", "ollama"], "--runtime"),
    (["--budget", "103GB", "--trials", "-1"], "--trials"),
    (["--budget", "103GB", "--trials", "many"], "--trials"),
    (["--budget", "103GB", "--workers", "-2"], "--workers"),
    (["--budget", "103GB", "--limit", "0"], "--limit"),
    (["--budget", "103GB", "--seed", "-1"], "--seed"),
    (["--budget", "103GB", "--repair", "maybe"], "--repair"),
    (["--budget", "103GB", "--study", "../x"], "--study"),
    (["--budget", "103GB", "--model", "/no/such/model"], "no such model folder"),
    (["--budget", "103GB", "--tasks-path", "/no/such/folder"], "--tasks-path"),
    (["--budget", "103GB", "--frobnicate"], "--help"),
    ([], "--budget"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_command_line_is_one_line_that_names_the_option(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", *arguments, *([] if "--study" in arguments else ["--dry-run"])])
    with pytest.raises(UserError) as caught:
        run.main()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "local_clozee"], "local_cloze"),
        (["--text", "/no/such.txt"], "--text"),
        (["--ray-address", "127.0.0.1:1"], "--ray-address"),
        (["--storage", "postgresql://nobody@127.0.0.1:1/none"], "--storage"),
    ],
)
def test_bad_input_found_later_is_one_line_too(arguments: list[str], says: str, tmp_path: Path) -> None:
    options = parse(["--budget", "103GB", "--workers", "1", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(UserError) as caught:
        Search.open(options).run()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_budget_below_the_smallest_config_names_it(
    tiny_checkpoint: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = [
        "--budget", "300KB", "--model", str(tiny_checkpoint), "--workers", "0", "--text", str(texts[0]),
        "--calibration", str(texts[1]), "--tasks", "none", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="below the smallest possible config"):
        Search.open(parse(arguments)).run()


def test_process_exits_with_2_and_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "search.run", "--budget", "103GB", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_dry_run_reads_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "experiments/reference_model/checkpoint", model)
    Search.open(parse(["--budget", "20MB", "--model", str(model), "--dry-run"])).dry_run()
    shown = capsys.readouterr().out
    assert "MoE layers of 16 experts" in " ".join(shown.split())
    assert list(tmp_path.iterdir()) == [model]
