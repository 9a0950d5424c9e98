"""Sets chosen by output error lose least: recomputed by the model's own blocks, and by trying every set."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compression.calibration import Calibration
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint, open_checkpoint
from compression.expert_pruning import protected, rankings
from compression.expert_sets import Sets, _some, choose, eliminate, expert_sets, mend, read_sets, write_sets
from compression.layer_error import LayerError
from compression.variant_bank import VariantBank
from evaluators.texts import TextSet
from experiments import zoo
from search.cache_files import save_text
from search.pool import LocalPool
from search.stages import calibrate
from search.worker import Setup
from spaces.space import SET, pick
from tests.compression.support import EVERY, logits, refused

COUNTS = (2, 3, 4, 5, 6, 7)
WIDE = ("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "olmoe", "qwen2_moe")
"""In groups; or gates, or what a selection bias is added to, are a softmax over all experts."""

NOBODY: list[tuple[int, ...]] = [(), ()]


@pytest.fixture(scope="module")
def windows(tiny_texts: dict[str, TextSet]) -> np.ndarray:
    return tiny_texts["calibration"].windows


@pytest.fixture(scope="module")
def found(tiny: Checkpoint, windows: np.ndarray) -> Sets:
    return expert_sets(resident(tiny), windows, COUNTS, NOBODY)


def resident(checkpoint: Checkpoint) -> CandidateModel:
    return CandidateModel(checkpoint, checkpoint.inventory, VariantBank(Path("unused")))


class Blocks:
    """The MoE blocks of a model by their own code, on what they are given without pruning."""

    def __init__(self, model: CandidateModel, windows: np.ndarray) -> None:
        self.model = model
        self.inputs: dict[int, torch.Tensor] = {}
        model.reset()
        with _recorded(self), torch.inference_mode():
            logits(model, windows)
        self.base = {layer: self._run(layer) for layer in self.inputs}

    def block(self, layer: int) -> Any:
        path = self.model.family.router.rpartition(".")[0]
        return self.model.shell.body.layers[layer].get_submodule(path)

    def _run(self, layer: int) -> torch.Tensor:
        with torch.inference_mode():
            out = self.block(layer)(self.inputs[layer])
        return out[0] if isinstance(out, tuple) else out

    def error(self, layer: int, kept: Sequence[int]) -> float:
        self.model.restrict(layer, tuple(kept))
        difference = self._run(layer) - self.base[layer]
        self.model.restrict(layer)
        return float(difference.double().square().sum())


@contextmanager
def _recorded(blocks: Blocks) -> Iterator[None]:
    def keep(layer: int) -> Any:
        return lambda module, args: blocks.inputs.update({layer: args[0]})

    layers = blocks.model.inventory.moe_layers
    handles = [blocks.block(i).register_forward_pre_hook(keep(i)) for i in layers]
    yield
    for handle in handles:
        handle.remove()


def layer_error(blocks: Blocks, layer: int) -> LayerError:
    with torch.inference_mode():
        return LayerError(blocks.model, layer, blocks.inputs[layer].flatten(0, -2))


@pytest.fixture(scope="module")
def blocks(tiny: Checkpoint, windows: np.ndarray) -> Blocks:
    return Blocks(resident(tiny), windows)


@pytest.fixture(scope="module")
def layer_one(blocks: Blocks) -> LayerError:
    return layer_error(blocks, 1)


@pytest.mark.parametrize("layer", [1, 2])
def test_no_ranking_loses_less(
    blocks: Blocks, found: Sets, tiny_calibration: Calibration, layer: int
) -> None:
    ranked = rankings(tiny_calibration, (1, 2))
    for count in COUNTS:
        own = blocks.error(layer, found[layer][count])
        others = [blocks.error(layer, pick(order[layer], count, 1)) for order in ranked.values()]
        assert 0 < own <= min(others) * (1 + 1e-6), count
    worst = max(blocks.error(layer, pick(ranked["reap"][layer], n, 1)) for n in COUNTS)
    assert blocks.error(layer, found[layer][4]) < worst


@pytest.mark.parametrize("count", [6, 4, 3])
@pytest.mark.parametrize("layer", [1, 2])
def test_the_best_of_all_sets_is_found(blocks: Blocks, found: Sets, layer: int, count: int) -> None:
    best = min(blocks.error(layer, kept) for kept in itertools.combinations(EVERY, count))
    assert blocks.error(layer, found[layer][count]) <= 1.02 * best


def test_sets_are_nested_before_they_are_mended(layer_one: LayerError) -> None:
    nested = eliminate(layer_one, 2, ())
    assert sorted(nested) == [2, 3, 4, 5, 6, 7, 8]
    for count in range(2, 8):
        assert set(nested[count]) < set(nested[count + 1])
        assert len(nested[count]) == count


def test_each_expert_that_goes_costs_least(layer_one: LayerError) -> None:
    nested = eliminate(layer_one, 5, ())
    for count in (7, 6, 5):
        larger = nested[count + 1]
        errors = [layer_one.total([e for e in larger if e != gone]) for gone in larger]
        assert layer_one.total(nested[count]) == pytest.approx(min(errors), rel=1e-5)


def test_swaps_mend_a_bad_set(layer_one: LayerError) -> None:
    sets = sorted(itertools.combinations(EVERY, 4), key=layer_one.total)
    mended = mend(layer_one, sets[-1], ())
    assert len(mended) == 4
    assert layer_one.total(mended) < layer_one.total(sets[len(sets) // 4])
    assert mend(layer_one, sets[0], ()) == sets[0]


def test_protected_experts_stay_while_there_is_room(layer_one: LayerError) -> None:
    free = choose(layer_one, (3, 6), ())
    unwanted = tuple(e for e in EVERY if e not in free[6])
    held = choose(layer_one, (2, 3, 6), unwanted)
    assert set(unwanted) <= set(held[3])
    assert set(unwanted) <= set(held[6])
    assert set(held[2]) == set(unwanted)
    crowded = choose(layer_one, (2,), (0, 1, 2, 3))[2]
    assert set(crowded) < {0, 1, 2, 3}


@pytest.mark.parametrize("name", sorted(zoo.FAMILIES))
def test_errors_are_those_of_every_familys_own_block(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compression.layer_error.DIMENSIONS", 256)  # nothing is projected
    model = resident(open_checkpoint(zoo.save(zoo.make(name), tmp_path / name)))
    blocks = Blocks(model, np.random.default_rng(0).integers(1, 8192, (2, 48)))
    layer = model.inventory.moe_layers[-1]
    errors = layer_error(blocks, layer)
    assert errors.local == (name not in WIDE)
    kept = (0, 1, 3, 4, 6, 7)
    with torch.inference_mode():
        state = errors.state(kept)
        assert state.total == pytest.approx(blocks.error(layer, kept), rel=1e-4)
        assert errors.total(kept) == pytest.approx(state.total, rel=1e-6)
        for gone in ([1, 4], [0, 7]):
            fewer = [e for e in kept if e not in gone]
            assert errors.without(state, gone) == pytest.approx(blocks.error(layer, fewer), rel=1e-4)
        assert errors.total(EVERY) == pytest.approx(0, abs=1e-6 * state.total)


def test_a_projection_keeps_errors(blocks: Blocks, layer_one: LayerError) -> None:
    assert layer_one.outputs.shape == (1024, 8, 128)
    for kept in ((0, 1, 2), (2, 4, 5, 6, 7), (0, 3)):
        assert layer_one.total(kept) == pytest.approx(blocks.error(1, kept), rel=0.05)


def test_groups_keep_as_many_experts_each(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(zoo.save(zoo.make("deepseek_v3", topk_group=2), tmp_path / "model"))
    tokens = np.random.default_rng(0).integers(1, 8192, (8, 48))
    blocks = Blocks(resident(checkpoint), tokens)
    layers = checkpoint.inventory.moe_layers
    sets = expert_sets(blocks.model, tokens, (4, 6), [(5,)] * len(layers))
    for layer in layers:
        for count, kept in sets[layer].items():
            assert [sum(e // 4 == g for e in kept) for g in (0, 1)] == [count // 2] * 2
            assert 5 in kept
            halves = (itertools.combinations(range(4 * g, 4 * g + 4), count // 2) for g in (0, 1))
            every = [a + b for a, b in itertools.product(*halves) if 5 in b]
            best = min(blocks.error(layer, s) for s in every)
            assert blocks.error(layer, kept) <= 1.05 * best


def test_a_streamed_model_chooses_the_same_and_is_left_alone(
    tiny: Checkpoint, windows: np.ndarray, found: Sets
) -> None:
    streamed = CandidateModel(tiny, tiny.inventory, VariantBank(Path("unused")), stream=True)
    before = logits(streamed, windows[:2])
    streamed.restrict(1, (0, 1, 2))
    assert expert_sets(streamed, windows, COUNTS, NOBODY) == found
    assert all(v.is_meta for n, v in streamed.model.named_parameters() if ".layers." in n)
    assert np.array_equal(logits(streamed, windows[:2]), before)


@pytest.mark.parametrize("counts", [(1, 4), (4, 9)])
def test_counts_that_no_router_takes_are_refused(
    tiny_model: CandidateModel, windows: np.ndarray, counts: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"within 2\.\.8, got"):
        expert_sets(tiny_model, windows, counts, NOBODY)


def test_tokens_are_capped_and_spread(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.repeat(np.arange(100)[:, None], 64, axis=1)
    assert _some(rows, tiny.inventory)[:, 0].tolist() == [int(x) for x in np.linspace(0, 99, 64)]
    assert len(_some(rows[:5], tiny.inventory)) == 5
    monkeypatch.setattr("compression.expert_sets._VALUES", 8 * 128 * 200)
    assert _some(rows, tiny.inventory)[:, 0].tolist() == [0, 49, 99]
    monkeypatch.setattr("compression.expert_sets._VALUES", 1)
    assert len(_some(rows, tiny.inventory)) == 1


def test_sets_are_read_back(tiny: Checkpoint, found: Sets, tmp_path: Path) -> None:
    path = tmp_path / "sets.json"
    write_sets(found, path)
    assert read_sets(path, tiny.inventory) == found


GOOD = {"1": {"4": [0, 1, 2, 3]}, "2": {"4": [0, 2, 4, 7]}}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", '{"version": 1}', "\xff", "[" * 100_000,
        json.dumps({"version": 2, "layers": GOOD}),
        json.dumps({"version": 1, "layers": []}),
        json.dumps({"version": 1, "layers": {}}),
        json.dumps({"version": 1, "layers": GOOD, "more": 1}),
        *(
            json.dumps({"version": 1, "layers": {**GOOD, **bad}})
            for bad in (
                {"0": {}}, {"01": {}}, {"2": []}, {"2": {"4": None}}, {"2": {"4": "0123"}},
                {"2": {"x": [0]}}, {"2": {"4": [0, 1, 2]}}, {"2": {"4": [0, 1, 2, 8]}},
                {"2": {"4": [-1, 1, 2, 3]}}, {"2": {"4": [0, 1, 1, 2]}}, {"2": {"4": [3, 2, 1, 0]}},
                {"2": {"4": [0, 1, 2, 3.0]}}, {"2": {"4": [0, True, 2, 3]}}, {"2": {"4": [0, 1, 2, [3]]}},
                {"2": {" 4": [0, 1, 2, 3]}}, {"2": {"9" * 5000: [0, 1, 2, 3]}}, {"2": {"4": [0, 1, 2, "3"]}},
            )
        ),
    ],
)  # fmt: skip
def test_what_is_no_table_of_sets_is_one_line(tiny: Checkpoint, tmp_path: Path, text: str) -> None:
    path = tmp_path / "sets.json"
    path.write_bytes(text.encode("latin-1"))
    assert len(refused(lambda: read_sets(path, tiny.inventory), path, "run the search again")) < 500


def test_a_table_that_is_not_there_is_one_line(tiny: Checkpoint, tmp_path: Path) -> None:
    refused(lambda: read_sets(tmp_path, tiny.inventory), tmp_path)
    refused(lambda: read_sets(tmp_path / "none", tiny.inventory), "none")


def test_sets_unlike_between_groups_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(zoo.save(zoo.make("deepseek_v3"), tmp_path / "model"))
    sets = {i: {4: (0, 1, 4, 5)} for i in checkpoint.inventory.moe_layers}
    write_sets(sets, tmp_path / "sets.json")
    assert read_sets(tmp_path / "sets.json", checkpoint.inventory) == sets
    write_sets({**sets, 2: {4: (0, 1, 2, 5)}}, tmp_path / "sets.json")
    refused(lambda: read_sets(tmp_path / "sets.json", checkpoint.inventory), "per group")


def test_a_search_chooses_sets_once_and_before_its_space(
    tiny_checkpoint: Path, tiny_texts: dict[str, TextSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("calibration", "search", "selection", "report"):
        text = tiny_texts["calibration" if name == "calibration" else "search"]
        save_text(TextSet(name, text.windows, text.sources, text.bytes_per_token), tmp_path)
    pool = LocalPool(Setup(str(tiny_checkpoint), "tiny", str(tmp_path)))
    seen: list[tuple[int, int]] = []
    calibrate(pool, tmp_path, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    space = pool.worker.space
    assert space.criteria[-1] == SET
    assert sorted(space.sets) == [1, 2]
    supers = protected(pool.worker.calibration)
    windows = tiny_texts["calibration"].windows
    expected = expert_sets(pool.worker.model, windows, space.kept_options, supers)
    assert space.sets == expected
    monkeypatch.setattr(pool, "run", lambda jobs, *rest: pytest.fail("run again") if jobs else [])
    calibrate(pool, tmp_path, lambda done, total: None)
