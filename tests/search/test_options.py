"""A wrong command line is refused in one line that names the option; a right one is read as meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from search.options import REFERENCE_MODEL, parse, study_name
from search.sampler_names import SAMPLERS
from spaces.devices import DEFAULT_DEVICE
from spaces.errors import UserError

GOOD = ["--budget", "103GB"]


def test_a_budget_is_all_that_must_be_given() -> None:
    options = parse(GOOD)
    assert options.budget == 103 * 10**9
    assert options.model == REFERENCE_MODEL
    assert options.target == "deepseek-v3"
    assert options.device.name == DEFAULT_DEVICE
    assert (options.sampler, options.runtime) == ("knapsack", "any")
    assert options.out.parent == (Path("runs")).resolve()
    assert options.export
    assert options.repair == "auto"
    assert not options.dry_run


def test_options_are_read_as_given(tmp_path: Path) -> None:
    options = parse(
        [
            "--budget", "4 GiB", "--model", str(tmp_path), "--device", "rtx-5090", "--device-memory", "24GiB",
            "--context", "1", "--runtime", "llama.cpp", "--trials", "7", "--workers", "0", "--sampler", "tpe",
            "--tasks", "a, b", "--limit", "3", "--seed", "5", "--study", "s.1", "--out", str(tmp_path / "o"),
            "--no-export", "--repair", "none", "--dry-run",
        ]
    )  # fmt: skip
    assert (options.budget, options.device.memory, options.context) == (4 * 2**30, 24 * 2**30, 1)
    assert options.device.bandwidth == 1792e9
    assert (options.model, options.target) == (tmp_path, str(tmp_path))
    assert (options.runtime, options.trials, options.workers) == ("llama.cpp", 7, 0)
    assert (options.sampler, options.tasks, options.limit, options.seed) == ("tpe", ("a", "b"), 3, 5)
    assert (options.study, options.out) == ("s.1", tmp_path / "o")
    assert options.dry_run
    assert not options.export
    assert options.repair == "none"


@pytest.mark.parametrize("text", ["none", ""])
def test_tasks_can_be_left_out(text: str) -> None:
    assert parse([*GOOD, "--tasks", text]).tasks == ()


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ([], "--budget"),
        (["--budget"], "--budget"),
        (["--budget", "103"], "--budget"),
        (["--budget", "-1GB"], "--budget"),
        (["--budget", "lots"], "--budget"),
        ([*GOOD, "--device", "toaster"], "--device"),
        ([*GOOD, "--device", ""], "--device"),
        ([*GOOD, "--device-memory", "96"], "--device-memory"),
        ([*GOOD, "--device-memory", ""], "--device-memory"),
        ([*GOOD, "--context", "0"], "--context"),
        ([*GOOD, "--context", "-1"], "--context"),
        ([*GOOD, "--context", "4k"], "--context"),
        ([*GOOD, "--runtime", "vllm"], "--runtime"),
        ([*GOOD, "--trials", "0"], "--trials"),
        ([*GOOD, "--trials", "1.5"], "--trials"),
        ([*GOOD, "--trials", "many"], "--trials"),
        ([*GOOD, "--trials"], "--trials"),
        ([*GOOD, "--workers", "-1"], "--workers"),
        ([*GOOD, "--workers", "two"], "--workers"),
        ([*GOOD, "--sampler", "cmaes"], "--sampler"),
        ([*GOOD, "--sampler", "Knapsack"], "--sampler"),
        ([*GOOD, "--limit", "0"], "--limit"),
        ([*GOOD, "--repair", "always"], "--repair"),
        ([*GOOD, "--repair", ""], "--repair"),
        ([*GOOD, "--repair"], "--repair"),
        ([*GOOD, "--seed", "-1"], "--seed"),
        ([*GOOD, "--seed", "x"], "--seed"),
        ([*GOOD, "--tasks-path", "/no/such/folder"], "--tasks-path"),
        ([*GOOD, "--study", "a b"], "--study"),
        ([*GOOD, "--dry-run=yes"], "--dry-run"),
        ([*GOOD, "--bugdet", "1GB"], "--bugdet"),
        ([*GOOD, "more"], "more"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else value,
)
def test_a_wrong_option_is_named_in_one_line(arguments: list[str], option: str) -> None:
    with pytest.raises(UserError) as error:
        parse(arguments)
    assert option in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "given_name", "meant"),
    [
        ("--sampler", "knapsak", "knapsack"),
        ("--device", "dgx-sparc", "dgx-spark"),
        ("--runtime", "llamacpp", "llama.cpp"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(option: str, given_name: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        parse([*GOOD, option, given_name])


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_named(name: str) -> None:
    assert parse([*GOOD, "--sampler", name]).sampler == name


NAMES = st.one_of(st.text(max_size=12), st.text("./\\-_aZ0~\n\x00 ", max_size=12))


@given(NAMES)
@example("..")
@example("../../etc/passwd")
@example("a/../..")
@example("/tmp/x")
@example("a\n")
@example("a" * 101)
@example("~")
@example("-rf")
def test_a_study_stays_in_its_folder(name: str) -> None:
    runs = Path("runs").resolve()
    try:
        study_name(name)
    except UserError as error:
        message = str(error)
        assert "--study" in message
        assert "\n" not in message
    else:
        assert (runs / name).resolve().parent == runs
        assert parse([*GOOD, f"--study={name}"]).out == runs / name


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "x" * 100])
def test_a_plain_study_name_is_taken(name: str) -> None:
    assert study_name(name) == name


@pytest.mark.parametrize("folder", ["m", "my model", "a/b/c", "Qwen(3)", "x" * 150])
def test_a_default_study_name_can_always_be_a_folders(folder: str) -> None:
    options = parse([*GOOD, "--model", folder])
    assert study_name(options.study) == options.study
    assert options.out == Path("runs").resolve() / options.study


@pytest.mark.parametrize("folder", [".hidden", "модель", "_old", "/"])
def test_a_default_study_name_is_made_of_any_folder(folder: str) -> None:
    options = parse([*GOOD, "--model", folder])
    assert study_name(options.study) == options.study


def test_budgets_models_and_targets_have_studies_of_their_own() -> None:
    lines: tuple[list[str], ...] = (
        [], ["--model", "m"], ["--model", "n"], ["--model", "m", "--target", "deepseek-v3"],
        ["--target", "n"],
    )  # fmt: skip
    names = {parse([*GOOD, *line]).study for line in lines} | {parse(["--budget", "96GB"]).study}
    assert len(names) == 6


@pytest.mark.parametrize("tasks", [",", "a,,b", "a,"])
def test_an_empty_task_name_is_refused_or_dropped(tasks: str) -> None:
    try:
        assert all(parse([*GOOD, "--tasks", tasks]).tasks)
    except UserError as error:
        assert "--tasks" in str(error)  # noqa: PT017


def test_a_seed_no_sampler_takes_is_refused() -> None:
    with pytest.raises(UserError, match="--seed"):
        parse([*GOOD, "--seed", str(2**32), "--sampler", "tpe"])


@pytest.mark.parametrize("option", ["--budget", "--model", "--study", "--types", "--out"])
def test_dashes_are_no_value(option: str) -> None:
    """argparse itself would make an empty list of them."""
    with pytest.raises(UserError, match=f"argument {option}: expected one argument"):
        parse(["--budget", "1GB", f"{option}=--"])
