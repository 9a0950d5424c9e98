"""Searches of others on a lab whose KL is a formula: what they spend, offer and promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from evaluators.slopes import Slope
from evaluators.texts import WINDOW
from experiments.baselines import amq, evopress, moefit, optuna_samplers, rco
from experiments.baselines.lab import Lab
from experiments.baselines.method import Unreachable, candidate_of, room, sizes
from experiments.baselines.searches import SEARCHES
from spaces.candidate import Candidate
from spaces.quant_types import QUANT_TYPES
from tests.spaces import tiny

TOKENS, WINDOWS = 90_000, 24
TIGHT, LOOSE = 0.9, 1.5
BITS_ONLY = ("evopress", "amq", "rco")


class FakeLab(Lab):
    """A lab without a model: windows differ by a factor only, so that scores have no noise.

    Args:
        share: Limit over the bytes of the smallest unpruned config; under 1 something must be pruned.
    """

    def __init__(self, share: float = LOOSE, seed: int = 0, tokens: int = TOKENS, **changes: Any) -> None:
        super().__init__(Path("unused"), 0.0, seed, tokens, SimpleNamespace(space=tiny.space(**changes)))  # type: ignore[arg-type]
        rng = np.random.default_rng(7)
        quantizable = self.space.inventory.quantizable
        self.weights = {t.name: float(rng.lognormal()) for t in quantizable}
        self.errors = {
            (t.name, q): 0.0 if q == "BF16" else 4.0 ** -QUANT_TYPES[q].bits_per_weight
            for t in quantizable for q in self.space.ladder(t)
        }  # fmt: skip
        least = {t.name: self.space.ladder(t)[0] for t in quantizable}
        self.limit = int(share * self.size(candidate_of(self, least, self.inventory.experts)))
        self.text = SimpleNamespace(windows=np.zeros((WINDOWS, WINDOW), np.int32))  # type: ignore[assignment]
        self.calls: list[tuple[int, tuple[int, ...]]] = []
        """(candidates, windows) of every `score`."""

    def kl(self, candidate: Candidate) -> float:
        total = sum(self.weights[n] * self.errors[n, t] for n, t in candidate.types)
        for layer in candidate.layers:
            gone = 1 - len(layer.experts) / self.inventory.experts
            total += 0.3 * gone**1.5 + 0.05 * (1 - layer.top_k / self.inventory.top_k)
        return total

    def score(self, candidates: Sequence[Candidate], windows: Sequence[int]) -> list[np.ndarray]:
        self.calls.append((len(candidates), tuple(windows)))
        self.spent += len(candidates) * len(windows) * WINDOW
        factors = np.array([1 + 0.3 * np.sin(w) for w in windows])
        return [self.kl(c) * factors for c in candidates]

    def slopes(
        self, candidate: Candidate | None, windows: Sequence[int], probes: int = 0, seed: int = 0
    ) -> Mapping[tuple[str, str], Slope]:
        assert candidate is not None
        self.spent += len(windows) * WINDOW * (2 + 2 * (1 + probes))
        here = {n: self.errors[n, t] for n, t in candidate.types}
        return {(n, t): Slope(self.weights[n] * (e - here[n]), 0.0) for (n, t), e in self.errors.items()}


@pytest.fixture(scope="module", autouse=True)
def _few_trials_of_the_slow() -> Iterator[None]:
    """The Gaussian process only draws at random, ten times: its proposals take half a minute each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna_samplers, "GP_TRIALS", 10)
        yield


def run(name: str, share: float = LOOSE, seed: int = 0, tokens: int = TOKENS) -> FakeLab:
    lab = FakeLab(share, seed, tokens)
    SEARCHES[name].run(lab)
    return lab


@pytest.fixture(scope="module")
def runs() -> Callable[[str, float, int], FakeLab]:
    """Runs of the whole budget, each made once."""
    done: dict[tuple[str, float, int], FakeLab] = {}

    def get(name: str, share: float, seed: int) -> FakeLab:
        if (name, share, seed) not in done:
            done[name, share, seed] = run(name, share, seed)
        return done[name, share, seed]

    return get


Runs = Callable[[str, float, int], FakeLab]


@pytest.mark.parametrize("share", [TIGHT, LOOSE])
@pytest.mark.parametrize("name", SEARCHES)
def test_spends_at_most_what_it_has_and_offers_what_fits(runs: Runs, name: str, share: float) -> None:
    lab = runs(name, share, 0)
    assert lab.offers
    assert TOKENS // 3 < lab.spent <= TOKENS or name == "gp"
    assert all(lab.fits(o.candidate) and o.tokens <= lab.spent for o in lab.offers)


@pytest.mark.parametrize("tokens", [0, 300, 5_000, 14_000])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_small_purse_is_never_overdrawn(name: str, tokens: int) -> None:
    for share in (TIGHT, LOOSE):
        lab = run(name, share, 0, tokens)
        assert lab.spent <= tokens
        assert lab.offers or SEARCHES[name].levers != "types"  # samplers offer nothing they did not score


@pytest.mark.parametrize("name", SEARCHES)
def test_a_seed_decides_everything(runs: Runs, name: str) -> None:
    once, twice = runs(name, LOOSE, 0), run(name, LOOSE, 0)
    assert [(o.tokens, o.candidate) for o in once.offers] == [(o.tokens, o.candidate) for o in twice.offers]
    assert once.calls == twice.calls


@pytest.mark.parametrize("name", SEARCHES)
def test_other_seeds_search_otherwise(runs: Runs, name: str) -> None:
    assert runs(name, LOOSE, 0).offers != runs(name, LOOSE, 1).offers


@pytest.mark.parametrize("share", [TIGHT, LOOSE])
@pytest.mark.parametrize("name", SEARCHES)
def test_offers_get_better_where_scores_have_no_noise(runs: Runs, name: str, share: float) -> None:
    lab = runs(name, share, 0)
    kl = [lab.kl(o.candidate) for o in lab.offers]
    assert kl == sorted(kl, reverse=True)


@pytest.mark.parametrize("name", SEARCHES)
def test_searching_beats_where_it_began(runs: Runs, name: str) -> None:
    lab = runs(name, LOOSE, 0)
    assert lab.kl(lab.offers[-1].candidate) < lab.kl(lab.offers[0].candidate)


@pytest.mark.parametrize("name", BITS_ONLY)
def test_bits_only_methods_prune_nothing_that_they_need_not(runs: Runs, name: str) -> None:
    assert all(len(m.experts) == 8 for o in runs(name, LOOSE, 0).offers for m in o.candidate.layers)
    kept = {len(m.experts) for o in runs(name, TIGHT, 0).offers for m in o.candidate.layers}
    assert len(kept) == 1
    assert kept < set(runs(name, TIGHT, 0).counts_that_fit())


@pytest.mark.parametrize("name", SEARCHES)
def test_what_nothing_fits_is_unreachable(name: str) -> None:
    with pytest.raises(Unreachable):
        run(name, 0.2)


def test_a_portable_space_keeps_one_count() -> None:
    lab = FakeLab(TIGHT, runtime="llama.cpp")
    evopress.evopress_joint(lab)
    assert lab.offers
    assert all(o.candidate.portable for o in lab.offers)


def test_a_search_of_ones_own_forbids_what_it_says_and_nothing_else() -> None:
    lab = FakeLab()
    plain = lab.space
    sets = {
        i: {n: tuple(range(n)) for n in plain.kept_options if n < plain.inventory.experts}
        for i in plain.inventory.moe_layers
    }
    lab.worker.space = replace(plain, sets=sets)
    whole = lab.space
    free = moefit.restricted(lab)
    assert (free.criteria, free.kept_options, free.top_k_options) == (
        whole.criteria, whole.kept_options, whole.top_k_options,
    )  # fmt: skip
    assert all(free.ladder(t) == whole.ladder(t) for t in whole.inventory.quantizable)
    bound = moefit.restricted(lab, prune=False, activate=False, one="Q4_K")
    assert bound.kept_options == (whole.inventory.experts,)
    assert bound.top_k_options == (whole.inventory.top_k,)
    for tensor in whole.inventory.quantizable:
        (only,) = bound.ladder(tensor)
        # What the bank of the whole space holds, so that it can be scored.
        assert only in whole.ladder(tensor)
        assert only == "Q4_K" or "Q4_K" not in whole.ladder(tensor)


def test_the_count_is_the_one_of_least_kl() -> None:
    lab = FakeLab(TIGHT)
    genome = evopress.pruned(lab)
    assert lab.calls == [(len(lab.counts_that_fit()), tuple(range(4)))]
    assert genome.fixed["kept"] in lab.counts_that_fit()
    assert evopress.pruned(FakeLab(LOOSE)).fixed["kept"] == 8


def test_evopress_has_the_stages_it_states(runs: Runs) -> None:
    lab = runs("evopress", LOOSE, 0)
    assert lab.calls[0][0] <= evopress.STARTS
    stages = [(n, len(w) * WINDOW) for n, w in lab.calls[1:]]
    assert stages[:3] == [(16, 256), (4, 1024), (3, 4096)]
    assert stages == stages[:3] * (len(stages) // 3)
    drawn = [w for _, w in lab.calls[1:]]
    assert len(set(drawn)) > len(drawn) // 2  # fresh windows, not the first ones again and again


def test_a_child_keeps_to_bytes_and_few_moves() -> None:
    lab = FakeLab(LOOSE)
    genome, rng = evopress.pruned(lab), np.random.default_rng(0)
    parent = genome.lowered(genome.uniforms()[-1][1], rng)
    children = evopress.brood(genome, parent, rng)
    assert len(children) == len(set(children)) == evopress.CHILDREN
    for child in children:
        assert child != parent
        assert genome.size(child) <= lab.limit
        assert np.abs(np.subtract(child, parent)).sum() <= 10


def test_joint_genes_move_every_lever() -> None:
    lab = FakeLab(TIGHT)
    genome = evopress.Genome(lab, {"form": "ragged", "kept": 8, "top_k": 2})
    assert sum(genome.free) == 2 * len(lab.inventory.moe_layers)
    start = genome.lowered(genome.uniforms()[3][1], lab.rng)
    children = [c for _ in range(400) if (c := genome.child(start, lab.rng))]
    assert all(genome.size(c) <= lab.limit for c in children)
    moved = {genome.names[g] for c in children for g in np.flatnonzero(np.subtract(c, start))}
    for lever in (".kept", ".top_k", ".criterion", ".weight"):
        assert any(name.endswith(lever) for name in moved)


def test_amq_ranks_unseen_configs_better_with_more_data() -> None:
    lab = FakeLab(LOOSE)
    rng = np.random.default_rng(0)
    x = rng.random((400, len(lab.weights)))
    y = np.exp(-2 * x) @ np.array(list(lab.weights.values()))
    rank = [float(spearmanr(amq.fit_predictor(x[:n], y[:n])(x[300:]), y[300:]).statistic) for n in (20, 300)]
    assert rank[0] < rank[1]
    assert rank[1] > 0.9


def test_amq_says_how_well_it_predicted() -> None:
    lab = FakeLab(LOOSE, tokens=150_000)
    search = amq.Amq(lab)
    search.run()
    assert len(search.agreement) >= 3
    assert all(-1 <= value <= 1 for pair in search.agreement for value in pair)
    assert len(search.archive) == lab.spent // amq.TOKENS


def test_a_predictor_bears_one_point_and_idle_genes() -> None:
    assert amq.fit_predictor(np.zeros((1, 3)), np.array([2.0]))(np.ones((2, 3))) == pytest.approx([2, 2])
    x = np.array([[0.0, 0.5], [1.0, 0.5], [0.5, 0.5]])
    assert amq.fit_predictor(x, x[:, 0])(x) == pytest.approx(x[:, 0], abs=0.01)


def test_nsga2_finds_the_front_within_its_constraint() -> None:
    def evaluate(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = points.sum(1).astype(float)
        return np.column_stack([(4 - points).sum(1) * 1.0, size]), np.maximum(size - 12, 4 - size)

    last = amq.nsga2(evaluate, np.zeros((1, 6), int), np.full(6, 5), np.random.default_rng(0))
    objectives, outside = evaluate(last)
    assert (outside <= 0).all()
    assert set(objectives[:, 1]) == set(range(4, 13))


def test_fronts_rank_by_dominance() -> None:
    rank, crowding = amq.fronts(np.array([[0, 2], [1, 1], [2, 0], [2, 2], [0, 0]]), np.array([0, 0, 0, 0, 1]))
    assert rank.tolist() == [0, 0, 0, 1, 2]
    assert np.isinf(crowding[[0, 2]]).all()
    assert np.isfinite(crowding[1])


def test_spread_fills_the_widest_gap() -> None:
    assert amq.spread(np.array([1.0, 5.0, 9.0]), np.array([0.0, 10.0]), 1) == [1]


@pytest.mark.parametrize("share", [TIGHT, LOOSE, 3.0])
def test_rco_holds_expected_bytes_at_the_budget(share: float) -> None:
    lab = FakeLab(share)
    manifold = rco.Manifold.of(lab, evopress.pruned(lab))
    rng = np.random.default_rng(0)
    for _ in range(10):
        alpha = manifold.retract(5 * rng.standard_normal(manifold.bytes.shape))
        assert manifold.expected(alpha) == pytest.approx(manifold.budget, rel=1e-6)
        assert manifold.bytes[np.arange(len(alpha)), manifold.choose(alpha)].sum() <= manifold.budget
        moved = manifold.tangent(alpha, rng.standard_normal(alpha.shape))
        change = manifold.expected(alpha + 1e-5 * moved) - manifold.expected(alpha)
        assert abs(change) < 1e-6 * manifold.budget


def test_rco_without_tokens_offers_its_start_and_beyond_all_types_it_offers_the_largest() -> None:
    assert len(run("rco", LOOSE, 0, 100).offers) == 1
    lab = FakeLab(100.0)
    rco.rco(lab)
    assert set(dict(lab.offers[-1].candidate.types).values()) == {"BF16"}


def test_bytes_of_bits_only_genomes_add_up() -> None:
    lab = FakeLab(LOOSE)
    genome, rng = evopress.pruned(lab), np.random.default_rng(0)
    table = sizes(lab, 8)
    for _ in range(10):
        point = [int(rng.integers(len(o))) for o in genome.options]
        added = sum(int(table[n][i]) for n, i in zip(genome.names, point, strict=True))
        assert genome.size(point) == lab.limit - room(lab, 8) + added


def test_gp_ends_after_its_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna_samplers, "GP_TRIALS", 6)
    assert run("gp").spent == 6 * optuna_samplers.TOKENS
