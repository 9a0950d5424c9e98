"""The house rules that no reviewer should have to check by eye."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("spaces", "compression", "evaluators", "search")


def _imports(file: Path) -> set[str]:
    """Top-level packages a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", LAYERS)
def test_imports_flow_one_way(package: str) -> None:
    above = {*LAYERS[LAYERS.index(package) + 1 :], "experiments", "tests"}
    for file in (ROOT / package).rglob("*.py"):
        assert not _imports(file) & above, f"{file} imports {_imports(file) & above}"


def test_spaces_need_no_torch() -> None:
    for file in (ROOT / "spaces").rglob("*.py"):
        assert not _imports(file) & {"torch", "transformers", "ray", "mlflow"}, file


def test_no_file_is_longer_than_400_lines() -> None:
    for package in (*LAYERS, "experiments", "tests"):
        for file in (ROOT / package).rglob("*.py"):
            assert len(file.read_text("utf-8").splitlines()) <= 400, file
