"""Every family: checkpoints are read as transformers reads them, and llama.cpp computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compression.checkpoint import load_model, open_checkpoint
from compression.families import FAMILIES
from compression.shell import Shell
from evaluators.llama_cpp import file_logits
from experiments import zoo

WINDOWS = np.random.default_rng(0).integers(1, 8192, (2, 48))


def test_every_family_is_in_the_zoo() -> None:
    assert set(zoo.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("name", sorted(zoo.FAMILIES))
def test_float_file_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    model = zoo.make(name)
    checkpoint = open_checkpoint(zoo.save(model, tmp_path / name))
    expected = zoo.logits(model, WINDOWS)
    assert np.array_equal(zoo.logits(load_model(checkpoint), WINDOWS), expected)
    assert checkpoint.family.refusals() == []
    file = zoo.write_float(checkpoint, tmp_path / "float.gguf")
    found = file_logits(file, WINDOWS, tmp_path / "logits.npy")
    assert np.abs(found - expected).max() <= 1e-3


@pytest.mark.parametrize("name", sorted(zoo.FAMILIES))
def test_pruned_router_computes_what_the_pruned_file_computes(name: str, tmp_path: Path) -> None:
    model = zoo.make(name)
    checkpoint = open_checkpoint(zoo.save(model, tmp_path / name))
    family = checkpoint.family
    kept, top_k = zoo.uneven(family), family.config.num_experts_per_tok - 1
    assert len(set(map(tuple, kept.values()))) > 1
    assert max(map(len, kept.values())) < family.expert_count
    shell = Shell(family)
    for part in family.parts:
        shell.fill(part, checkpoint.weights)
    for layer, experts in kept.items():
        shell.router(layer).keep(experts, top_k)
    found = zoo.logits(shell.model, WINDOWS)
    file = zoo.write_float(checkpoint, tmp_path / "pruned.gguf", kept, top_k)
    assert np.abs(file_logits(file, WINDOWS, tmp_path / "logits.npy") - found).max() <= 1e-3
    for layer in kept:
        shell.router(layer).keep(None, family.config.num_experts_per_tok)
    assert np.array_equal(zoo.logits(shell.model, WINDOWS), zoo.logits(model, WINDOWS))


@pytest.mark.parametrize("name", sorted(zoo.FAMILIES))
def test_newest_names_on_disk_are_read_like_the_publishers(name: str, tmp_path: Path) -> None:
    # In the original format experts lie one by one (but gpt-oss' and Granite's), in the other stacked.
    model = zoo.make(name)
    checkpoint = open_checkpoint(zoo.save(model, tmp_path / name, save_original_format=False))
    names = set(checkpoint.weights.entries)  # type: ignore[attr-defined]
    assert names == {p.path for p in checkpoint.family.parts}
    assert np.array_equal(zoo.logits(load_model(checkpoint), WINDOWS), zoo.logits(model, WINDOWS))
