"""Items of lm-eval packed into sequences in which a context is computed once for all its continuations.

Per item a sequence holds the context and, after it, its continuations side by side.
A token attends to the context of its item and to the earlier tokens of its own
continuation, at the positions that they would have alone: it comes out as it would alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tokens = tuple[int, ...]

LENGTH = 256
"""Tokens of a sequence: attention's cost grows with it, as most of what it holds is masked."""

BRANCHES = 64
"""Continuations of a sequence; llama.cpp takes up to 256."""


@dataclass(frozen=True)
class Item:
    """A context and what may follow it.

    Attributes:
        context: Token ids, at least one.
        continuations: Different token ids each, of at least one token.
    """

    context: Tokens
    continuations: tuple[Tokens, ...]

    @property
    def length(self) -> int:
        """Tokens to compute: the last of a continuation is scored, but nothing follows it."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


@dataclass(frozen=True)
class Pack:
    """Items in one sequence of n tokens, by which m tokens are scored.

    Attributes:
        tokens: (n,) ids.
        positions: (n,) place of a token in its context and continuation.
        items: (n,) number of a token's item in this pack.
        branches: (n,) number of a token's continuation in its item, -1 in the context.
        rows: (m,) tokens whose logits score a target.
        targets: (m,) ids.
        owners: (m,) index into `scores` of what a target adds to.
        scores: (item, continuation) of every score; items are numbered as `pack` was given them.
    """

    tokens: np.ndarray
    positions: np.ndarray
    items: np.ndarray
    branches: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    scores: tuple[tuple[int, int], ...]

    def attends(self) -> np.ndarray:
        """(n, n) bool: whether the token of a row attends to the token of a column."""
        branches, positions = self.branches, self.positions
        near = (branches[None] == -1) | (branches[None] == branches[:, None])
        return (self.items[None] == self.items[:, None]) & near & (positions[None] <= positions[:, None])

    def sums(self, log_probs: np.ndarray, likeliest: np.ndarray) -> dict[tuple[int, int], tuple[float, bool]]:
        """Log-likelihood of every score, and whether it is what the model would write.

        Args:
            log_probs: (m,) of the targets, nats.
            likeliest: (m,) bool: whether a target is the most likely token.
        """
        size = len(self.scores)
        total = np.bincount(self.owners, log_probs, size)
        missed = np.bincount(self.owners, ~likeliest, size)
        return {s: (float(total[i]), not missed[i]) for i, s in enumerate(self.scores)}


def share(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> tuple[list[Item], list[tuple[int, int]]]:
    """Requests by context, that of many in several items.

    Args:
        requests: (context, continuation) token ids, neither of them empty.
        max_length: Tokens the model sees; what is longer loses its start, as in lm-eval.

    Returns:
        The items, of at most `BRANCHES` continuations, and (item, continuation) of each request.

    Raises:
        ValueError: A context or a continuation is empty, or a continuation is longer than `max_length`.
    """
    items: list[tuple[Tokens, list[Tokens]]] = []
    latest: dict[Tokens, int] = {}
    known: dict[tuple[Tokens, Tokens], tuple[int, int]] = {}
    places = []
    for context, continuation in requests:
        if not len(context) or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"a context of {len(context)} tokens and a continuation of {len(continuation)}: both need "
                f"one or more, and the continuation at most {max_length}"
            )
        # The last token is only scored, so that one more fits.
        kept = tuple(context[-(max_length + 1 - len(continuation)) :])
        after = tuple(continuation)
        if (kept, after) not in known:
            item = latest.get(kept)
            if item is None or _full(*items[item], after):
                item = latest[kept] = len(items)
                items.append((kept, []))
            known[kept, after] = item, len(items[item][1])
            items[item][1].append(after)
        places.append(known[kept, after])
    return [Item(context, tuple(branches)) for context, branches in items], places


def _full(context: Tokens, branches: Sequence[Tokens], after: Tokens) -> bool:
    """Whether to compute a context once more rather than let a sequence grow: attention takes its square."""
    size = sum(len(c) - 1 for c in branches) + len(after) - 1
    return len(branches) == BRANCHES or size > max(LENGTH, len(context))


def pack(items: Sequence[Item], length: int = LENGTH, branches: int = BRANCHES) -> list[Pack]:
    """Items in sequences of at most `length` tokens and `branches` continuations each.

    The longest first, each into the first sequence with room; one that is too long has its own.
    """
    packs: list[list[int]] = []
    room: list[list[int]] = []
    for i in sorted(range(len(items)), key=lambda i: -items[i].length):
        size, width = items[i].length, len(items[i].continuations)
        at = next((k for k, (long, wide) in enumerate(room) if long >= size and wide >= width), len(packs))
        if at == len(packs):
            packs.append([])
            room.append([length, branches])
        packs[at].append(i)
        room[at][0] -= size
        room[at][1] -= width
    return [_pack(items, chosen) for chosen in packs]


def _pack(items: Sequence[Item], chosen: Sequence[int]) -> Pack:
    tokens: list[tuple[int, int, int, int]] = []  # id, position, item, branch
    targets: list[tuple[int, int, int]] = []  # row, id, score
    scores: list[tuple[int, int]] = []
    for number, i in enumerate(chosen):
        context = items[i].context
        tokens += [(token, at, number, -1) for at, token in enumerate(context)]
        last = len(tokens) - 1
        for branch, continuation in enumerate(items[i].continuations):
            rows = [last, *range(len(tokens), len(tokens) + len(continuation) - 1)]
            tokens += [
                (token, at, number, branch) for at, token in enumerate(continuation[:-1], len(context))
            ]
            targets += [(row, target, len(scores)) for row, target in zip(rows, continuation, strict=True)]
            scores.append((i, branch))
    ids, positions, numbers, branches = np.array(tokens).T
    scored, wanted, owners = np.array(targets).T
    return Pack(ids, positions, numbers, branches, scored, wanted, owners, tuple(scores))


def unique_rows(packs: Sequence[Pack], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What to compute and look up for packs laid in rows of `width` tokens.

    Returns:
        (u,) flat tokens whose logits are needed, (m,) index into them and (m,) target of everything scored.
    """
    flat = np.concatenate([p.rows + i * width for i, p in enumerate(packs)])
    needed, index = np.unique(flat, return_inverse=True)
    return needed, index, np.concatenate([p.targets for p in packs])
