"""The methods of others: each offers what its rule says, within the bytes, for the tokens it says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from evaluators.texts import WINDOW
from experiments.baselines import (
    error_knapsack,
    greedy_damage,
    kl_knapsack,
    llama_mixes,
    mc_moe,
    method,
    simple,
)
from experiments.baselines.lab import Lab
from experiments.baselines.method import Unreachable, candidate_of, room, sizes
from experiments.baselines.published import PUBLISHED
from spaces.candidate import Candidate
from spaces.gguf_layout import padded
from spaces.inventory import Tensor
from spaces.quant_types import LADDER, quant_type
from spaces.space import Space
from tests.spaces import tiny as small

if TYPE_CHECKING:
    from compression.calibration import Calibration
    from compression.checkpoint import Checkpoint

TIGHT, LOOSE, AMPLE = "tight", "loose", "ample"
EXPERTS = 16


class FakeLab(Lab):
    """A lab without a model: KL is a sum over tensors and layers."""

    def __init__(self, budget: str = LOOSE, experts: int = EXPERTS, seed: int = 0) -> None:
        space = small.space(n_routed_experts=experts, num_experts_per_tok=4)
        super().__init__(Path("unused"), 0.0, seed, 250_000, self._worker(space))
        rng = np.random.default_rng(1)
        self.errors = {
            (t.name, q): 0.0 if q == "BF16" else 4.0 ** -quant_type(q).bits_per_weight
            for t in space.inventory.quantizable
            for q in space.ladder(t)
        }
        self.weights = {t.name: float(rng.lognormal()) for t in space.inventory.quantizable}
        least = {t.name: space.ladder(t)[0] for t in space.inventory.quantizable}
        whole = self.size(candidate_of(self, least, experts))
        half = self.size(candidate_of(self, least, experts // 2))
        self.limit = {TIGHT: (half + whole) // 2, LOOSE: int(1.6 * whole), AMPLE: 20 * whole}[budget]

    @staticmethod
    def _worker(space: Space) -> Any:
        rng = np.random.default_rng(2)
        shape = (len(space.inventory.moe_layers), space.inventory.experts)
        routing = {name: rng.lognormal(size=shape) for name in ("tokens", "mass", "reap")}
        return SimpleNamespace(space=space, calibration=SimpleNamespace(routing=routing))

    def kl(self, candidate: Candidate) -> float:
        types = sum(self.weights[n] * self.errors[n, t] for n, t in candidate.types)
        experts, top_k = self.inventory.experts, self.inventory.top_k
        pruned = sum(
            (1 - len(m.experts) / experts) ** 1.5 + 0.1 * (1 - m.top_k / top_k) for m in candidate.layers
        )
        return types + 4 * pruned

    def score(self, candidates: Sequence[Candidate], windows: Sequence[int]) -> list[np.ndarray]:
        self.spent += len(candidates) * len(windows) * WINDOW
        return [np.full(len(windows), self.kl(c)) for c in candidates]

    def costs(self, options: Sequence[tuple[str, Any]], tokens: int) -> dict[tuple[str, Any], float]:
        self.spent += len(options) * max(1, tokens // WINDOW) * WINDOW
        return {(n, t): self.weights[n] * self.errors[n, t] for n, t in options}


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of single experts come from weights, which a fake lab has not."""

    def scattered(lab: Lab, tensor: Tensor, type_name: str) -> np.ndarray:
        spread = np.random.default_rng(len(tensor.name)).lognormal(size=tensor.shape[0])
        return lab.errors[tensor.name, type_name] * spread

    monkeypatch.setattr(mc_moe, "relative_errors", scattered)


def result(name: str, lab: FakeLab) -> Candidate:
    """What a method offers last."""
    PUBLISHED[name].run(lab)
    return lab.offers[-1].candidate


def by_role(lab: Lab, candidate: Candidate, role: str) -> list[str]:
    """Types of a role's tensors by layer."""
    return [t for n, t in candidate.types if lab.inventory.by_name[n].role == role]


def grid_tokens(lab: FakeLab) -> int:
    return simple.GRID_TOKENS * len(lab.counts_that_fit())


def expected_tokens(name: str, lab: FakeLab) -> int:
    """What the module's documentation says."""
    pruned = 0 if lab.inventory.experts in lab.counts_that_fit() else grid_tokens(lab)
    return {
        "reap-grid": grid_tokens(lab),
        "kl-knapsack": pruned + kl_knapsack.COST_TOKENS * len(kl_knapsack.measured_options(lab)),
        "greedy-damage": pruned + greedy_damage.COST_TOKENS * (len(LADDER) + len(lab.inventory.quantizable)),
        "mc-moe": pruned,
    }.get(name, 0)


@pytest.mark.parametrize("budget", [TIGHT, LOOSE, AMPLE])
@pytest.mark.parametrize("name", PUBLISHED)
def test_result_fits_is_valid_and_repeats_for_the_tokens_it_says(name: str, budget: str) -> None:
    labs = [FakeLab(budget), FakeLab(budget)]
    if name == "uniform" and budget == TIGHT:
        with pytest.raises(Unreachable, match="all experts"):
            PUBLISHED[name].run(labs[0])
        return
    first, second = (result(name, lab) for lab in labs)
    first.validate(labs[0].inventory)
    assert labs[0].size(first) <= labs[0].limit
    assert first == second
    assert labs[0].spent == labs[1].spent == expected_tokens(name, FakeLab(budget))
    assert len({len(m.experts) for m in first.layers}) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_too_small_for_any_model_is_unreachable(name: str) -> None:
    lab = FakeLab()
    lab.limit = 1000
    with pytest.raises(Unreachable):
        PUBLISHED[name].run(lab)
    assert not lab.offers


def test_names_are_those_of_the_registry() -> None:
    assert all(m.name == name and m.source and m.published for name, m in PUBLISHED.items())
    assert not issubclass(method.Unreachable, AssertionError)


def test_uniform_is_the_largest_type_that_fits() -> None:
    lab = FakeLab()
    types = dict(result("uniform", lab).types)
    whole = {t for n, t in types.items() if lab.inventory.by_name[n].row % 256 == 0}
    assert len(whole) == 1
    (kind,) = whole
    assert all(types[t.name] == lab.space.nearest(t, kind) for t in lab.inventory.quantizable)
    for other in LADDER:
        larger = quant_type(other).bits_per_weight > quant_type(kind).bits_per_weight
        assert not (larger and lab.fits(candidate_of(lab, simple.uniform_types(lab.space, other), EXPERTS)))


def test_reap_grid_offers_the_best_of_all_counts_that_fit() -> None:
    lab = FakeLab(TIGHT)
    best = result("reap-grid", lab)
    everyone = [simple.largest_uniform(lab, kept) for kept in lab.counts_that_fit()]
    assert lab.kl(best) == min(lab.kl(c) for c in everyone if c is not None)
    assert best not in (everyone[0], everyone[-1])
    reap = lab.space.rankings["reap"][1][: len(best.layers[0].experts)]
    assert set(best.layers[0].experts) == set(reap)


def test_paper_rules_follow_depth_and_role() -> None:
    lab = FakeLab()
    found, ladder = result("paper-rules", lab), simple.ladder_of(lab)
    assert {(len(m.experts), m.top_k) for m in found.layers} == {(12, 3)}
    assert set(found.layers[0].experts) == set(lab.space.rankings["paper"][1][:12])
    steps = [ladder.index(t) for t in by_role(lab, found, "ffn_up_exps")]
    base = ladder.index(by_role(lab, found, "ffn_gate")[0])
    assert steps == [base - 1, base - 1, base + 1]  # MoE layers 1 to 3 of 4
    for role, least in simple.PAPER_LEAST.items():
        for name, kind in found.types:
            tensor = lab.inventory.by_name[name]
            if tensor.role == role and tensor.row % 256 == 0:
                assert ladder.index(kind) == max(base, ladder.index(least))


def test_paper_rules_back_off_to_the_largest_count_that_fits() -> None:
    lab = FakeLab(TIGHT)
    lab.limit = lab.limit * 4 // 5
    found = result("paper-rules", lab)
    kept = len(found.layers[0].experts)
    assert kept < 12
    assert found.layers[0].top_k == -(-4 * kept // EXPERTS)
    ladder = simple.ladder_of(lab)
    for more in (n for n in lab.space.kept_options if kept < n <= 12):
        assert not lab.fits(
            candidate_of(lab, simple.paper_types(lab.space, ladder, 0, False), more, "paper", 1)
        )


def roles_of(mix: str, experts: int, layers: int = 4) -> dict[str, list[str]]:
    """Types of each role by layer in a mix."""
    space = small.space(n_routed_experts=experts, num_hidden_layers=layers)
    types, out = llama_mixes.mix_types(space, mix, experts), {}
    for t in space.inventory.quantizable:
        out.setdefault(t.role, []).append(types[t.name])
    return out


def test_mixes_are_those_of_llama_quantize() -> None:
    medium = roles_of("Q4_K_M", 16, 16)
    more = [i in (0, 1, 4, 7, 10, 13, 14, 15) for i in range(16)]
    assert medium["attn_v_b"] == ["Q6_K" if m else "Q4_K" for m in more]
    assert medium["ffn_down"] + medium["ffn_down_exps"] == medium["attn_v_b"]
    assert medium["ffn_down_shexp"] == medium["ffn_down_exps"]
    assert (medium["output"], medium["token_embd"]) == (["Q6_K"], ["Q4_K"])
    assert set(medium["attn_output"] + medium["ffn_up_exps"] + medium["attn_q_b"]) == {"Q4_K"}
    tiny_mix = roles_of("IQ1_S", 16, 16)
    assert (tiny_mix["output"], tiny_mix["token_embd"]) == (["Q5_K"], ["Q2_K"])
    assert set(tiny_mix["attn_output"]) == {"IQ2_XXS"}
    assert set(tiny_mix["attn_v_b"]) == {"Q4_K"}
    # The first two ffn_down tensors in file order, of which a MoE layer has two.
    assert (tiny_mix["ffn_down"], tiny_mix["ffn_down_exps"][:2]) == (["Q2_K"], ["Q2_K", "IQ1_S"])
    assert set(roles_of("Q2_K", 16)["ffn_down_exps"] + roles_of("Q2_K", 16)["attn_output"]) == {"Q3_K"}


def test_mixes_have_rules_for_eight_experts() -> None:
    eight = roles_of("Q4_K_M", 8)
    assert set(eight["attn_v_b"]) == {"Q8_0"}
    assert set(eight["attn_output"]) == {"Q5_K"}
    assert set(roles_of("Q5_K_M", 8)["attn_output"]) == {"Q5_K"}


def test_llama_mixes_offers_the_largest_that_fits() -> None:
    for budget in (TIGHT, LOOSE):
        lab = FakeLab(budget)
        found = result("llama-mixes", lab)
        kept = len(found.layers[0].experts)
        assert (kept == EXPERTS) == (budget == LOOSE)
        for mix, more in itertools.product(
            llama_mixes.BASE, [n for n in lab.space.kept_options if n >= kept]
        ):
            other = candidate_of(lab, llama_mixes.mix_types(lab.space, mix, more), more)
            assert not lab.fits(other) or (more == kept and lab.size(other) <= lab.size(found))


def test_convex_hull_is_convex_and_below_every_option() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        size, error = rng.integers(1, 1000, 12), rng.random(12)
        on = error_knapsack.convex(size, error)
        slopes = np.diff(error[on]) / np.diff(size[on])
        assert (np.diff(size[on]) > 0).all()
        assert (slopes < 0).all()
        assert (np.diff(slopes) >= 0).all()
        inside = size >= size[on[0]]
        assert (error[inside] >= np.interp(size[inside], size[on], error[on]) - 1e-12).all()


@pytest.mark.parametrize("budget", [TIGHT, LOOSE])
def test_error_knapsack_leaves_no_upgrade_that_fits(budget: str) -> None:
    lab = FakeLab(budget)
    found = result("error-knapsack", lab)
    kept, types = len(found.layers[0].experts), dict(found.types)
    assert kept == max(lab.counts_that_fit())
    left = lab.limit - lab.size(found)
    for hull in error_knapsack.hulls(lab, kept):
        at = hull.types.index(types[hull.name])
        assert at + 1 == len(hull.types) or hull.bytes[at + 1] - hull.bytes[at] > left


def test_error_knapsack_favours_what_it_thinks_important() -> None:
    lab = FakeLab()
    found = result("error-knapsack", lab)

    def bits(role: str) -> list[float]:
        return [quant_type(t).bits_per_weight for t in by_role(lab, found, role)]

    # Equal in shape and in error, unequal in favour.
    assert all(a >= b for a, b in zip(bits("attn_output"), bits("attn_q_b"), strict=True))
    assert sum(bits("ffn_down_exps")) > sum(bits("ffn_up_exps"))


def test_ample_bytes_give_every_method_its_best_types() -> None:
    for name in ("error-knapsack", "kl-knapsack", "greedy-damage", "uniform"):
        assert set(dict(result(name, FakeLab(AMPLE)).types).values()) == {"BF16"}


@pytest.mark.parametrize("budget", [TIGHT, LOOSE])
def test_kl_knapsack_is_the_optimum_of_its_prices(budget: str) -> None:
    lab = FakeLab(budget)
    found = result("kl-knapsack", lab)
    model, kept = kl_knapsack.measure(FakeLab(budget)), len(found.layers[0].experts)

    def price(candidate: Candidate) -> float:
        return sum(float(model.costs[model.index[option]]) for option in candidate.types)

    for name in ("error-knapsack", "reap-grid", "greedy-damage"):
        other = candidate_of(lab, dict(result(name, FakeLab(budget)).types), kept)
        assert not lab.fits(other) or price(found) <= price(other) + 1e-12


@pytest.mark.parametrize("name", ["kl-knapsack", "greedy-damage", "reap-grid"])
def test_less_is_measured_when_short_of_tokens(name: str) -> None:
    lab = FakeLab()
    each = simple.GRID_TOKENS if name == "reap-grid" else kl_knapsack.COST_TOKENS
    lab.tokens = 2 * WINDOW * (expected_tokens(name, lab) // each) + 1
    result(name, lab)
    assert lab.spent == lab.tokens - 1
    lab = FakeLab()
    lab.tokens = WINDOW
    with pytest.raises(Unreachable, match="tokens"):
        PUBLISHED[name].run(lab)


@pytest.mark.parametrize("budget", [TIGHT, LOOSE])
def test_greedy_damage_promotes_while_anything_fits(budget: str) -> None:
    lab = FakeLab(budget)
    found = result("greedy-damage", lab)
    kept, types = len(found.layers[0].experts), dict(found.types)
    left = lab.limit - lab.size(found)
    fresh = FakeLab(budget)
    for name, pool in greedy_damage.pools(fresh, kept).items():
        at = pool.types.index(types[name])
        assert at + 1 == len(pool.types) or pool.bytes[at + 1] - pool.bytes[at] > left
        assert (np.diff(pool.bytes) > 0).all()
        assert (np.diff(pool.damage) < 0).all()
        lowest = fresh.space.ladder(fresh.inventory.by_name[name])[0]
        assert pool.damage[0] == pytest.approx(fresh.costs([(name, lowest)], WINDOW)[name, lowest])


@pytest.mark.parametrize("budget", [TIGHT, LOOSE, AMPLE])
def test_mc_moe_gives_each_layer_at_most_its_share(budget: str) -> None:
    lab = FakeLab(budget)
    found = result("mc-moe", lab)
    kept, types = len(found.layers[0].experts), dict(found.types)
    rest = [t for t in lab.inventory.quantizable if not t.per_expert]
    share = room(lab, kept) - sum(padded(t.bytes(types[t.name])) for t in rest)
    spent = dict.fromkeys(lab.inventory.moe_layers, 0)
    for t in set(lab.inventory.quantizable) - set(rest):
        assert types[t.name] in mc_moe.BITS
        spent[t.layer or 0] += padded(t.bytes(types[t.name], kept))
    assert max(spent.values()) <= share // len(spent)
    if budget == AMPLE:
        assert {types[t.name] for t in rest if t.row % 256 == 0} == {mc_moe.REST}
        assert set(by_role(lab, found, "ffn_down_exps")) == {mc_moe.BITS[-1]}


def test_integer_program_finds_the_cheapest_choice() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        costs, size = (
            rng.random((3, 3)) * 10.0 ** rng.integers(-6, 6),
            rng.integers(1, 100, (3, 3)).astype(float),
        )
        share = int(rng.integers(size.min(1).sum(), size.max(1).sum() + 1))
        chosen = mc_moe.layer_types(costs, size, share)
        every = itertools.product(range(3), repeat=3)
        fitting = [c for c in every if size[range(3), c].sum() <= share]
        assert size[range(3), chosen].sum() <= share
        best = min(costs[range(3), c].sum() for c in fitting)
        assert costs[range(3), chosen].sum() == pytest.approx(best, rel=1e-6)
    with pytest.raises(Unreachable):
        mc_moe.layer_types(np.ones((3, 3)), np.full((3, 3), 10.0), 29)


def test_sizes_and_room_add_up_to_the_file() -> None:
    lab = FakeLab()
    for kept in (4, EXPERTS):
        candidate = candidate_of(lab, simple.uniform_types(lab.space, "Q2_K"), kept)
        of, types = sizes(lab, kept), dict(candidate.types)
        ladders = {t.name: lab.space.ladder(t) for t in lab.inventory.quantizable}
        quantized = sum(int(of[n][ladders[n].index(t)]) for n, t in types.items())
        assert lab.size(candidate) - quantized == lab.limit - room(lab, kept)


def test_errors_of_experts_average_to_the_banks(
    tiny: Checkpoint, tiny_calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compression.variant_bank import VariantBank

    monkeypatch.undo()
    bank = VariantBank(tmp_path)
    part = next(p for p in tiny.family.by_name.values() if p.tensor.role == "ffn_up_exps")
    h, weights = tiny_calibration.imatrix[part.name], tiny.weights
    rows = bank.add(part.tensor, ["IQ2_XS"], lambda e: weights.read(part, e), h, tiny.fingerprint)
    bank.register(part.name, "IQ2_XS", rows[0][1])
    worker = SimpleNamespace(checkpoint=tiny, bank=bank, calibration=tiny_calibration)
    lab: Any = SimpleNamespace(worker=worker)
    errors = mc_moe.relative_errors(lab, part.tensor, "IQ2_XS")
    energy = [((weights.read(part, e).reshape(-1, part.tensor.row) ** 2) @ h[e]).sum() for e in range(len(h))]
    assert len(set(errors)) == len(errors)
    assert np.average(errors, weights=energy) == pytest.approx(rows[0][2], rel=1e-4)
