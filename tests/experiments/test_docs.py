"""The docs say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments import evidence
from experiments.cli_reference import reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_command_reference_is_the_parsers_own() -> None:
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == reference(), (
        "run python -m experiments.cli_reference docs/cli.md"
    )


def test_the_evidence_is_what_the_committed_results_say() -> None:
    assert (ROOT / "docs" / "evidence.md").read_text("utf-8") == evidence.page(), (
        "run python -m experiments.evidence docs/evidence.md"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_and_picture_of_a_page_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_of_a_page_is_a_module(page: Path) -> None:
    for module in re.findall(r"python -m ((?:search|experiments)[\w.]*)", page.read_text("utf-8")):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name}: {module}"
