"""Re-fitting costs no byte, changes no choice and lowers the divergence; the file is what was scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compression import load
from compression.block_scales import SCALED
from compression.candidate_model import CandidateModel
from compression.checkpoint import open_checkpoint
from compression.checkpoint_export import export_checkpoint
from compression.gguf_export import export_gguf
from compression.guards import check_file
from compression.overrides import Overrides
from compression.stored_model import StoredModel
from compression.variant_bank import VariantBank
from evaluators.divergence import Divergence, base_states, compare, measure
from evaluators.texts import TextSet
from evaluators.tuning import Recipe, Tuner
from experiments import zoo
from spaces.candidate import Candidate
from spaces.inventory import Inventory
from tests.compression.support import candidate, logits, provide

PRUNED = {1: (0, 2, 3, 6, 7), 2: (1, 2, 4, 5, 7)}
RECIPE = Recipe(steps=16, windows=4, scale_rate=1e-2, plain_rate=1e-2, warmup=2)
FIXED = "blk.1.attn_output.weight"


def low(inventory: Inventory) -> dict[str, str]:
    """Few bits, one tensor without scales."""
    types = {t.name: "Q2_K" if t.row % 256 == 0 else "IQ4_NL" for t in inventory.quantizable}
    return types | {FIXED: "BF16"}


@pytest.fixture(scope="module")
def model(_shared_model: CandidateModel) -> CandidateModel:
    _shared_model.model.set_experts_implementation("eager")
    return _shared_model


@pytest.fixture(scope="module")
def wanted(model: CandidateModel) -> Candidate:
    return provide(model, candidate(model.inventory, PRUNED, None, low(model.inventory)))


@pytest.fixture(scope="module")
def text(tiny_texts: dict[str, TextSet]) -> TextSet:
    whole = tiny_texts["calibration"]
    return replace(whole, windows=whole.windows[:8, :32], sources=("x",) * 8)


@pytest.fixture(scope="module")
def states(model: CandidateModel, text: TextSet, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    file = tmp_path_factory.mktemp("states") / "states.npy"
    model.reset()
    base_states(model, text, file)
    found: np.ndarray = np.load(file)
    return found


@pytest.fixture(scope="module")
def before(model: CandidateModel, wanted: Candidate, text: TextSet, states: np.ndarray) -> Divergence:
    model.apply(wanted)
    return measure(model, text, states)


@pytest.fixture(scope="module")
def seen() -> list[tuple[int, int, float]]:
    return []


@pytest.fixture(scope="module")
def overrides(
    model: CandidateModel, wanted: Candidate, text: TextSet, before: Divergence, seen: list[Any]
) -> Overrides:
    return Tuner(model, wanted, RECIPE).run(text, lambda *progress: seen.append(progress))


@pytest.fixture
def tuned(model: CandidateModel, wanted: Candidate, overrides: Overrides) -> Iterator[CandidateModel]:
    """The model as the repaired candidate."""
    model.apply(wanted)
    model.use(overrides)
    yield model
    model.use(None)
    model.reset()


def test_the_divergence_falls_by_a_tenth_or_more(
    tuned: CandidateModel, text: TextSet, states: np.ndarray, before: Divergence
) -> None:
    after = measure(tuned, text, states)
    assert before.mean_kl > 0.2
    assert after.mean_kl < 0.9 * before.mean_kl
    assert (after.kl < before.kl).all()


def test_it_falls_on_text_of_its_kind_that_was_not_fitted(
    tuned: CandidateModel,
    wanted: Candidate,
    overrides: Overrides,
    tiny_texts: dict[str, TextSet],
    tmp_path: Path,
) -> None:
    other = tiny_texts["search"].head(4 * 64)
    tuned.use(None)
    tuned.reset()
    base_states(tuned, other, tmp_path / "x.npy")
    states = np.load(tmp_path / "x.npy")
    tuned.apply(wanted)
    plain = measure(tuned, other, states).mean_kl
    tuned.use(overrides)
    assert measure(tuned, other, states).mean_kl < plain


def test_progress_tells_of_every_step_and_begins_at_the_candidates_divergence(
    overrides: Overrides, seen: list[tuple[int, int, float]], before: Divergence
) -> None:
    assert [step[:2] for step in seen] == [(i + 1, RECIPE.steps) for i in range(RECIPE.steps)]
    # Two steps of four windows see all eight; in between the first small update is made.
    assert np.mean([kl for *_, kl in seen[:2]]) == pytest.approx(before.mean_kl, rel=0.05)


def test_the_model_is_left_as_the_candidate_without_repairs(
    model: CandidateModel, wanted: Candidate, text: TextSet, states: np.ndarray, before: Divergence
) -> None:
    expected = (before.kl.tolist(), before.nll.tolist(), before.top1.tolist())
    Tuner(model, wanted, replace(RECIPE, steps=2)).run(text)
    for _ in range(2):
        found = measure(model, text, states)
        model.reset()
        model.apply(wanted)
        assert (found.kl.tolist(), found.nll.tolist(), found.top1.tolist()) == expected
    assert model.overrides is None
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())
    model.reset()
    assert abs(measure(model, text, states).mean_kl) < 1e-6


def test_a_run_that_fails_leaves_the_candidate_too(
    model: CandidateModel, wanted: Candidate, text: TextSet, states: np.ndarray, before: Divergence
) -> None:
    def stop(done: int, total: int, kl: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tuner(model, wanted, RECIPE).run(text, stop)
    assert measure(model, text, states).kl.tolist() == before.kl.tolist()


def test_repairs_are_of_the_candidate_in_its_types_and_bytes(
    model: CandidateModel, wanted: Candidate, overrides: Overrides
) -> None:
    types = dict(wanted.types)
    assert overrides.candidate == wanted.key
    assert set(overrides.blocks) == {n for n, t in wanted.types if t in SCALED} - {FIXED}
    assert set(overrides.plain) == {
        t.name for t in model.inventory.tensors if not t.quantizable and t.role != "exp_probs_b"
    }
    for name, found in overrides.blocks.items():
        given = model.bank.blocks(model.inventory.by_name[name], types[name])
        assert (found.dtype, found.shape) == (given.dtype, given.shape)
        assert not np.array_equal(found, given), name
    for name, values in overrides.plain.items():
        assert (values.dtype, values.shape) == (np.float32, model.plain(name).shape)
        assert not np.array_equal(values, model.plain(name)), name


def test_the_integers_inside_blocks_stay(
    model: CandidateModel, wanted: Candidate, overrides: Overrides
) -> None:
    for name, found in overrides.blocks.items():
        given = model.bank.blocks(model.inventory.by_name[name], dict(wanted.types)[name])
        size, scales = (84, slice(80, 84)) if dict(wanted.types)[name] == "Q2_K" else (18, slice(0, 2))
        changed = (found != given).reshape(-1, size).any(0)
        assert changed[scales].any()
        changed[scales] = False
        assert not changed.any(), name


def test_pruned_experts_keep_their_rows_and_blocks(
    model: CandidateModel, wanted: Candidate, overrides: Overrides
) -> None:
    for layer, kept in PRUNED.items():
        pruned = [e for e in range(8) if e not in kept]
        name = f"blk.{layer}.ffn_gate_inp.weight"
        assert np.array_equal(overrides.plain[name][pruned], model.plain(name)[pruned])
        assert (overrides.plain[name][list(kept)] != model.plain(name)[list(kept)]).any(1).all()
        for role in ("gate", "up", "down"):
            tensor = model.inventory.by_name[f"blk.{layer}.ffn_{role}_exps.weight"]
            given = model.bank.blocks(tensor, dict(wanted.types)[tensor.name])
            assert np.array_equal(overrides.blocks[tensor.name][pruned], given[pruned])
            assert (overrides.blocks[tensor.name][list(kept)] != given[list(kept)]).any()


def test_the_files_score_as_the_repaired_model(
    tuned: CandidateModel, wanted: Candidate, overrides: Overrides, text: TextSet, states: np.ndarray,
    before: Divergence, tmp_path: Path,
) -> None:  # fmt: skip
    stored = StoredModel(tuned.checkpoint, tuned.inventory, tuned.bank)
    sizes = [export_checkpoint(stored, wanted, stored.checkpoint, tmp_path / "plain")]
    stored.overrides = overrides
    sizes += [export_checkpoint(stored, wanted, stored.checkpoint, tmp_path / "repaired")]
    assert sizes[0] == sizes[1]
    assert export_gguf(stored, wanted, tmp_path / "x.gguf") == stored.inventory.file_bytes(wanted.plan)
    check_file(tmp_path / "x.gguf", stored, wanted)
    base = torch.from_numpy(states) @ tuned.base_output.T
    windows = torch.from_numpy(text.windows.astype(np.int64))
    loaded, plain = (
        compare(base, torch.from_numpy(logits(load(tmp_path / name), text.windows)), windows)[0].numpy()
        for name in ("repaired", "plain")
    )
    assert np.abs(loaded - measure(tuned, text, states).kl).max() <= 1e-4
    assert np.abs(plain - before.kl).max() <= 1e-4
    assert np.abs(plain - loaded).max() > 1e-2


def same(one: Overrides, other: Overrides) -> bool:
    pairs = [(one.blocks, other.blocks), (one.plain, other.plain)]
    return all(set(a) == set(b) and all(np.array_equal(a[n], b[n]) for n in a) for a, b in pairs)


def test_the_same_run_gives_the_same_repairs(model: CandidateModel, wanted: Candidate, text: TextSet) -> None:
    short = replace(RECIPE, steps=3)
    first = Tuner(model, wanted, short).run(text)
    model.reset()
    model.restrict(1, (0, 1), 1)
    assert same(Tuner(model, wanted, short).run(text), first)
    assert not same(Tuner(model, wanted, replace(RECIPE, steps=2)).run(text), first)
    model.reset()


def test_a_run_goes_on_from_other_repairs(
    model: CandidateModel, wanted: Candidate, overrides: Overrides, text: TextSet, before: Divergence
) -> None:
    kls: list[float] = []
    none = replace(RECIPE, steps=2, scale_rate=0, plain_rate=0)
    found = Tuner(model, wanted, none).run(text, lambda *progress: kls.append(progress[2]), overrides)
    assert same(found, overrides)
    assert np.mean(kls) < 0.95 * before.mean_kl
    assert model.overrides is None
    assert same(Tuner(model, wanted, RECIPE).run(text), overrides)  # nothing of the others stayed


def test_a_streamed_model_is_refused(model: CandidateModel, wanted: Candidate) -> None:
    streamed = CandidateModel(model.checkpoint, model.inventory, model.bank, stream=True)
    with pytest.raises(ValueError, match="memory"):
        Tuner(streamed, wanted)


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "qwen3_next"])
def test_biases_of_experts_tied_embeddings_and_shifted_norms_are_fitted(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(zoo.save(zoo.make(name), tmp_path / name))
    inventory = checkpoint.inventory
    model = CandidateModel(checkpoint, inventory, VariantBank(tmp_path / "bank"))
    kept = {layer: tuple(experts) for layer, experts in zoo.uneven(checkpoint.family).items()}
    types = {t.name: "Q2_K" if t.row % 256 == 0 else "IQ4_NL" for t in inventory.quantizable}
    chosen = provide(model, candidate(inventory, kept, None, types))
    windows = np.random.default_rng(0).integers(1, 8192, (4, 16)).astype(np.int32)
    text = TextSet("x", windows, ("x",) * 4, 1.0)
    base_states(model, text, tmp_path / "x.npy")
    states = np.load(tmp_path / "x.npy")
    model.apply(chosen)
    before = measure(model, text, states)
    overrides = Tuner(model, chosen, replace(RECIPE, steps=6)).run(text)
    assert measure(model, text, states).kl.tolist() == before.kl.tolist()
    model.use(overrides)
    assert measure(model, text, states).mean_kl < 0.97 * before.mean_kl
    for n, values in overrides.plain.items():
        tensor = inventory.by_name[n]
        assert not np.array_equal(values, model.weights.read(model.family.by_name[n])), n
        if tensor.per_expert and tensor.layer is not None:
            pruned = [e for e in range(8) if e not in kept[tensor.layer]]
            assert np.array_equal(values[pruned], model.weights.read(model.family.by_name[n])[pruned]), n


def test_a_step_changes_no_number_by_more_than_its_rate(tmp_path: Path) -> None:
    """Nor where two tensors of the file are one parameter, as the biases of gates and ups."""
    checkpoint = open_checkpoint(zoo.save(zoo.make("gpt_oss"), tmp_path / "gpt_oss"))
    model = CandidateModel(checkpoint, checkpoint.inventory, VariantBank(tmp_path / "bank"))
    chosen = provide(model, candidate(checkpoint.inventory))
    windows = np.random.default_rng(0).integers(1, 8192, (1, 16)).astype(np.int32)
    recipe = Recipe(steps=1, windows=1, warmup=1)
    overrides = Tuner(model, chosen, recipe).run(TextSet("x", windows, ("x",), 1.0))
    for name, values in overrides.plain.items():
        part = model.family.by_name[name]
        size = float(model.shell.parameter(part).square().mean().sqrt())
        change = np.abs(values - model.weights.read(part)).max()
        assert change == pytest.approx(recipe.plain_rate * size, rel=1e-3), name
