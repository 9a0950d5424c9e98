"""Every case of the table of bad inputs ends as the table says: one line, code 2, nothing written."""

from __future__ import annotations

import fnmatch
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.bad_inputs.case import Case, World
from experiments.bad_inputs.page import page
from experiments.bad_inputs.table import CASES
from search import export, options
from search.report import __main__ as report
from tests.compression import tiny_gguf

ROOT = Path(__file__).parents[2]
# A module that a test has imported is run anew here, which is what is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")

APART = (
    "a budget without a unit",
    "a GGUF file of 2^63 tensors",
    "a candidate with an expert out of range",
    "a config of an unknown architecture",
    "a picture as a tracking database",
    "a text without end",
    "a tokenizer cut short",
    "nothing to export",
    "tasks made of a picture",
)
"""Cases that are also tried as processes of their own, warnings of libraries and all."""

LONGEST = 500
"""Characters that the line has to stay below."""

Tree = dict[str, tuple[int, ...]]


def tree(folder: Path) -> Tree:
    """Everything below a folder and behind its links: kind, size, time of change, place on the disk."""
    found: Tree = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        for name in (*folders, *files):
            path = Path(place, name)
            status = path.stat() if path.exists() else path.lstat()  # a link to nothing, or to itself
            # A folder's size and time of change follow from what is in it.
            about = () if path.is_dir() else (status.st_size, status.st_mtime_ns, status.st_ino)
            found[str(path.relative_to(folder))] = (status.st_mode, *about)
    return found


def changed(before: Tree, after: Tree, case: Case) -> list[str]:
    """Names that came, went or differ, but for what the case may leave."""
    names = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
    return sorted(n for n in names if not any(fnmatch.fnmatch(n, p) for p in case.leaves))


def check(case: Case, code: object, errors: str) -> None:
    """The rules of every case."""
    assert code == 2, errors[-3000:]
    line = errors.removesuffix("\n")
    assert line.startswith("error: ")
    assert line.isprintable(), "must be one line without control codes"
    assert len(line) < LONGEST
    position = 0
    for part in case.says:
        found = line.find(part, position)
        assert found >= 0, f"{part!r} is not in {line!r}, or not at its place"
        position = found + len(part)


def cases(of_a_study: bool) -> list[object]:
    """The table's cases with or without a study, as pytest's parameters."""
    return [
        pytest.param(c, id=c.wrong, marks=[pytest.mark.slow] * c.slow)
        for c in CASES
        if c.of_a_study == of_a_study
    ]


@pytest.fixture(scope="session")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "model.gguf", "qwen3moe")


@pytest.fixture
def world(tiny_checkpoint: Path, small_gguf: Path, texts: tuple[Path, Path], tmp_path: Path) -> World:
    return World(tmp_path, tiny_checkpoint, small_gguf, texts)


def walk(
    case: Case, world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Runs the case's module as `python -m` would, in this process."""
    world.furnish()
    if case.make is not None:
        case.make(world)
    before = tree(world.folder)
    monkeypatch.chdir(world.folder)
    monkeypatch.setattr(sys, "argv", [case.command, *case.argv])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(case.command, run_name="__main__", alter_sys=True)
    errors = capfd.readouterr().err
    check(case, ended.value.code, errors)
    assert not changed(before, tree(world.folder), case)


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize("case", cases(of_a_study=False))
def test_bad_input(
    case: Case, world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    walk(case, world, monkeypatch, capfd)


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize("case", cases(of_a_study=True))
def test_bad_input_of_a_study(
    case: Case,
    world: World,
    finished: tuple[list[str], Path, dict],  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    walk(case, World(**{**vars(world), "run": finished[1]}), monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", [c for c in CASES if c.wrong in APART], ids=lambda c: c.wrong)
def test_bad_input_of_a_process(case: Case, world: World) -> None:
    world.furnish()
    if case.make is not None:
        case.make(world)
    before = tree(world.folder)
    process = subprocess.run(
        [sys.executable, "-m", case.command, *case.argv], cwd=world.folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=100, check=False,
    )  # fmt: skip
    check(case, process.returncode, process.stderr)
    assert not changed(before, tree(world.folder), case)


def test_the_table_has_no_case_twice_and_all_that_run_apart() -> None:
    names = [c.wrong for c in CASES]
    assert len(names) == len(set(names))
    assert set(APART) <= set(names)


@pytest.mark.parametrize(
    ("command", "parser"),
    [("search.run", options.parser), ("search.export", export.parser), ("search.report", report.parser)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_option_has_a_case(command: str, parser: Callable[[], options.Parser]) -> None:
    given = {word.split("=")[0] for c in CASES if c.command == command for word in c.arguments}
    known = {o for a in parser()._actions for o in a.option_strings if a.nargs != 0}
    assert not known - given


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs" / "bad-inputs.md").read_text("utf-8") == page(), (
        "run python -m experiments.bad_inputs docs/bad-inputs.md"
    )
