"""Long generations: sampling on logits, and how repetitive what came out is.

All in numpy, so that fixed seeds give the same text wherever logits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

GRAM = 4  # tokens of a repeated piece
_ROUNDS = 3  # of a loop, at least
_LOOP = 16  # tokens of a loop, at least: shorter ones are rules of dashes, blanks and the like


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature first, then the nucleus, one uniform number for each token.

    Attributes:
        seeds: One for each prompt. Two models given the same seeds draw the same uniform numbers, which
            makes what they write comparable prompt by prompt.
        temperature: Divides the logits.
        top_p: Only the fewest most likely tokens that together have this probability are drawn.
    """

    seeds: tuple[int, ...]
    temperature: float = 0.8
    top_p: float = 0.95


def draw(logits: np.ndarray, uniform: float, temperature: float, top_p: float) -> int:
    """The token at `uniform` of the distribution's running sum, most likely tokens first.

    Nucleus sampling (Holtzman et al., 2020, arXiv 1904.09751) by inversion.

    Args:
        logits: (vocabulary,).
        uniform: In [0, 1).
        temperature: Above 0.
        top_p: In (0, 1].
    """
    scaled = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    running = np.cumsum(np.exp(scaled[order] - scaled[order[0]]))
    nucleus = int(np.searchsorted(running, top_p * running[-1])) + 1
    running = running[: min(nucleus, len(running))]
    chosen = int(np.searchsorted(running, uniform * running[-1], side="right"))
    return int(order[min(chosen, len(running) - 1)])  # the product may round up to the whole sum


def drawer(seed: int, temperature: float, top_p: float) -> Callable[[np.ndarray], int]:
    """`draw` with the uniform numbers of a seed, one after the other."""
    random = np.random.default_rng(seed).random
    return lambda logits: draw(logits, random(), temperature, top_p)


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repeated(prompt: Sequence[int], tokens: Sequence[int], n: int = GRAM) -> float:
    """Share of the n-grams of a generation that occurred before, in the prompt or the generation.

    Without the prompt it would be 1 - distinct-n (seq-rep-n of Welleck et al., 2019, arXiv 1908.04319).
    NaN for fewer than n tokens.
    """
    seen, count = set(_grams(prompt, n)), 0
    grams = _grams(tokens, n)
    for gram in grams:
        count += gram in seen
        seen.add(gram)
    return count / len(grams) if grams else float("nan")


def distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams over n-grams (Li et al., 2016, arXiv 1510.03055); NaN for fewer than n tokens."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else float("nan")


def final_loop(tokens: Sequence[int]) -> tuple[int, int]:
    """Period and length in tokens of the longest loop that a generation ends in; (0, 0) for none.

    A loop is an ending of at least 16 tokens in which a piece follows itself three times or more.
    """
    row = np.asarray(tokens)
    best = (0, 0)
    for period in range(1, len(row) // _ROUNDS + 1):
        broken = np.flatnonzero(row[period:] != row[:-period])
        length = len(row) - int(broken[-1]) - 1 if len(broken) else len(row)
        if length >= max(_ROUNDS * period, _LOOP) and length > best[1]:
            best = (period, length)
    return best


@dataclass(frozen=True)
class Rates:
    """How one generation looks.

    Attributes:
        length: Tokens before the end token.
        loop: 1.0 where it ends in a loop, else 0.0.
        loop_tokens: Length of that loop.
        repeated: See `repeated`.
        distinct_1: See `distinct`; likewise for 2, 3 and 4 tokens.
        base_nll: Mean negative log-likelihood under the base model, nats: high for text that falls
            apart, low for text that repeats itself.
    """

    length: float
    loop: float
    loop_tokens: float
    repeated: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    distinct_4: float
    base_nll: float


def rates(prompt: Sequence[int], tokens: Sequence[int], nll: np.ndarray, compared: int) -> Rates:
    """Measures one generation.

    Args:
        prompt: What it continues.
        tokens: The generation, without an end token.
        nll: (at least length,) of its tokens under the base model.
        compared: Tokens that n-grams and the likelihood are taken of. They depend on length, so two models
            are compared on as many tokens as both have written; length and loop are of all `tokens`.
    """
    some, loop = tokens[:compared], final_loop(tokens)[1]
    return Rates(
        length=len(tokens),
        loop=float(loop > 0),
        loop_tokens=loop,
        repeated=repeated(prompt, some),
        distinct_1=distinct(some, 1),
        distinct_2=distinct(some, 2),
        distinct_3=distinct(some, 3),
        distinct_4=distinct(some, 4),
        base_nll=float(np.mean(nll[: len(some)])) if some else float("nan"),
    )


def text_before(row: np.ndarray, limit: int) -> list[int]:
    """The generated tokens of a row, at most `limit`; it is filled up with -1 where it ended early."""
    return [int(token) for token in row[:limit] if token >= 0]


def compare(
    prompts: np.ndarray,
    generated: Mapping[str, np.ndarray],
    nll: Mapping[str, np.ndarray],
    limit: int,
) -> dict[str, dict[str, float | None]]:
    """The base model's generations against a candidate's, paired by prompt.

    Args:
        prompts: (n, prompt) token ids.
        generated: `base` and `candidate`: (n, count) token ids, -1 from the end token on.
        nll: Of the same names: (n, count) under the base model.
        limit: Only so many generated tokens are looked at.

    Returns:
        For every field of `Rates`: means `base` and `candidate`, `difference` of the candidate from the
        base model with its standard error `difference_se` over prompts, and `p`, two-sided by the paired
        t test (null where every prompt has the same difference); `prompts`, how many both models wrote
        enough on for it.
    """
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in generated}
    for i, prompt in enumerate(prompts.tolist()):
        texts = {name: text_before(tokens[i], limit) for name, tokens in generated.items()}
        common = min(map(len, texts.values()))
        for name, text in texts.items():
            rows[name].append(asdict(rates(prompt, text, nll[name][i], common)))
    return {name: _paired(*([r[name] for r in rows[m]] for m in ("base", "candidate"))) for name in
            Rates.__dataclass_fields__}  # fmt: skip


def _paired(base: Sequence[float], candidate: Sequence[float]) -> dict[str, Any]:
    from scipy.stats import t as student

    both = np.array([base, candidate], np.float64)
    both = both[:, np.isfinite(both).all(0)]
    n = both.shape[1]
    if n < 2:
        return {"base": None, "candidate": None, "difference": None, "difference_se": None, "p": None,
                "prompts": n}  # fmt: skip
    difference = both[1] - both[0]
    mean, error = float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(n))
    p = float(2 * student.sf(abs(mean) / error, n - 1)) if error > 0 else None
    return {"base": float(both[0].mean()), "candidate": float(both[1].mean()), "difference": mean,
            "difference_se": error, "p": p, "prompts": n}  # fmt: skip
