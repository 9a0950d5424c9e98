"""The best parameters at the byte budget for given costs, through the exact knapsack."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from search.costs import CostModel
from search.relaxation import Classes, Relaxation, table
from spaces.allocation import InfeasibleError, OptionClass, pareto, solve
from spaces.carry import Carry
from spaces.gguf_layout import padded
from spaces.inventory import Tensor
from spaces.space import PORTABLE, RAGGED, Space


class Allocator:
    """Solves for types, expert counts and rankings under a limit on the target's bytes.

    Args:
        space: What may vary.
        model: Which entry of a cost vector each option is.
        carry: Maps decisions to the target, whose bytes count.
        limit: Bytes the target's file may take.
    """

    def __init__(self, space: Space, model: CostModel, carry: Carry, limit: int) -> None:
        self.space, self.model, self.carry, self.limit = space, model, carry, limit
        inventory = space.inventory
        self.plain = [t for t in inventory.quantizable if not t.per_expert]
        self.stacked = [t for t in inventory.quantizable if t.per_expert]
        self._bytes = {
            (t.name, n): np.array([carry.bytes(t.name, q, n) for q in space.ladder(t)], np.int64)
            for t in inventory.quantizable
            for n in (space.kept_options if t.per_expert else (inventory.experts,))
        }
        self._columns = {
            t.name: np.array([model.index[t.name, q] for q in space.ladder(t)]) for t in inventory.quantizable
        }
        self._router = {n: self._router_bytes(n) for n in space.kept_options}
        self._fixed = {form: self._fixed_bytes(form) for form in space.forms}

    def _router_bytes(self, kept: int) -> dict[int, int]:
        """Target bytes of the unquantized per-expert tensors that follow each source layer."""
        out = dict.fromkeys(self.space.inventory.moe_layers, 0)
        for t in self.carry.target.tensors:
            if t.per_expert and not t.quantizable and t.layer is not None:
                out[self.carry.layer_of[t.layer]] += padded(t.bytes("F32", self.carry.kept(kept)))
        return out

    def _fixed_bytes(self, form: str) -> int:
        """Target bytes that no decision changes: header, metadata, norms."""
        space = self.space
        layers, most = space.inventory.moe_layers, space.kept_options[-1]
        kept = dict.fromkeys(layers, most)
        if form == RAGGED and len(layers) > 1:
            kept[layers[0]] = space.kept_options[0]  # differing counts are stored as arrays
        types = {t.name: space.ladder(t)[0] for t in space.inventory.quantizable}
        top_k = dict.fromkeys(layers, space.inventory.top_k)
        top_k[layers[0]] = 1 if form == RAGGED else top_k[layers[0]]
        params = space.params(types, kept, space.criteria[0], top_k)
        total = self.carry.target.file_bytes(self.carry.plan(space.candidate(params).plan))
        for t in space.inventory.quantizable:
            n = kept[t.layer] if t.per_expert and t.layer is not None else space.inventory.experts
            total -= int(self._bytes[t.name, n][0])
        return total - sum(self._router[kept[layer]][layer] for layer in layers)

    def best(self, costs: np.ndarray, form: str, top_k: Mapping[int, int] | None = None) -> dict[str, Any]:
        """The cheapest parameters that fit.

        Args:
            costs: One cost per option, as `CostModel.costs`; may be negative.
            form: Portable or ragged.
            top_k: Active experts per layer; the model's own where None.

        Raises:
            InfeasibleError: Nothing of this form fits the limit.
        """
        return self._portable(costs, top_k) if form == PORTABLE else self._ragged(costs, top_k)

    def draw(
        self, costs: np.ndarray, form: str, top_k: Mapping[int, int] | None = None, share: float = 1.0
    ) -> dict[str, Any]:
        """As `best`, close to it, in milliseconds; see `search.relaxation`.

        Args:
            costs: One cost per option.
            form: Portable or ragged.
            top_k: Active experts per layer; the model's own where None.
            share: Of the limit that may be used.

        Raises:
            InfeasibleError: Nothing of this form fits that share of the limit.
        """
        space = self.space
        layers = space.inventory.moe_layers
        relaxed = Relaxation(
            self._classes, int(share * self.limit) - self._fixed[form], alike=form == PORTABLE
        )
        prices = costs[self._pruning]  # (L, N, criteria)
        try:
            choice = relaxed.best(costs, prices.min(2))
        except InfeasibleError as error:
            raise InfeasibleError(int(share * self.limit), error.smallest + self._fixed[form]) from error
        names = [t for layer in layers for t in self.stacked if t.layer == layer]
        types = {t.name: space.ladder(t)[i] for t, i in zip(self.plain, choice.plain, strict=True)}
        types |= {t.name: space.ladder(t)[i] for t, i in zip(names, choice.stacked.ravel(), strict=True)}
        kept, criteria = {}, {}
        for row, (layer, n) in enumerate(zip(layers, choice.counts, strict=True)):
            kept[layer] = space.kept_options[n]
            criteria[layer] = space.criteria[int(prices[row, n].argmin())]
        if form == PORTABLE:
            count = kept[layers[0]]
            k = None if top_k is None else min(count, next(iter(top_k.values())))
            return space.params(types, count, criteria, k)
        ks = None if top_k is None else {layer: min(top_k[layer], kept[layer]) for layer in layers}
        return space.params(types, kept, criteria, ks)

    @cached_property
    def _classes(self) -> Classes:
        layers, counts = self.space.inventory.moe_layers, self.space.kept_options
        of_layer = [[t for t in self.stacked if t.layer == layer] for layer in layers]
        everyone = self.space.inventory.experts
        stacked = [table([self._bytes[t.name, n] for t in ts], 0) for ts in of_layer for n in counts]
        columns = [table([self._columns[t.name] for t in ts], -1) for ts in of_layer]
        return Classes(
            plain_bytes=table([self._bytes[t.name, everyone] for t in self.plain], 0),
            plain_columns=table([self._columns[t.name] for t in self.plain], -1),
            stacked_bytes=np.stack(stacked).reshape(len(layers), len(counts), *stacked[0].shape),
            stacked_columns=np.stack(columns),
            count_bytes=np.array([[self._router[n][layer] for n in counts] for layer in layers], np.int64),
        )

    @cached_property
    def _pruning(self) -> np.ndarray:
        """(layers, counts, criteria) places in a cost vector."""
        space, index = self.space, self.model.index
        return np.array(
            [
                [[index[f"blk.{layer}.experts", (n, c)] for c in space.criteria] for n in space.kept_options]
                for layer in space.inventory.moe_layers
            ]
        )

    def smallest(self) -> int:
        """Target bytes of the smallest candidate of the space."""
        least = self.space.kept_options[0]
        total = self._fixed[PORTABLE] + sum(self._router[least].values())
        for t in self.space.inventory.quantizable:
            n = least if t.per_expert else self.space.inventory.experts
            total += int(self._bytes[t.name, n].min())
        return total

    def _class(self, tensor: Tensor, kept: int, costs: np.ndarray) -> OptionClass:
        n = kept if tensor.per_expert else self.space.inventory.experts
        return OptionClass(self._bytes[tensor.name, n], costs[self._columns[tensor.name]])

    def _criterion(self, layer: int, kept: int, costs: np.ndarray) -> tuple[float, str]:
        """The cheapest ranking of a layer at an expert count, and its cost."""
        decision = f"blk.{layer}.experts"
        return min((float(costs[self.model.index[decision, (kept, c)]]), c) for c in self.space.criteria)

    def _portable(self, costs: np.ndarray, top_k: Mapping[int, int] | None) -> dict[str, Any]:
        space = self.space
        tensors = [*self.plain, *self.stacked]
        best: tuple[float, int, dict[str, str], dict[int, str]] | None = None
        smallest = None
        for kept in space.kept_options:
            chosen = {layer: self._criterion(layer, kept, costs) for layer in space.inventory.moe_layers}
            spent = self._fixed[PORTABLE] + sum(self._router[kept].values())
            try:
                found = solve([self._class(t, kept, costs) for t in tensors], self.limit - spent)
            except InfeasibleError as error:
                smallest = min(smallest or error.smallest + spent, error.smallest + spent)
                continue
            cost = found.cost + sum(c for c, _ in chosen.values())
            if best is None or cost < best[0]:
                types = {t.name: self.space.ladder(t)[i] for t, i in zip(tensors, found.choice, strict=True)}
                best = (cost, kept, types, {layer: c for layer, (_, c) in chosen.items()})
        if best is None:
            raise InfeasibleError(self.limit, smallest or 0)
        _, kept, types, criteria = best
        k = None if top_k is None else min(kept, next(iter(top_k.values())))
        return space.params(types, kept, criteria, k)

    def _layer_options(
        self, layer: int, costs: np.ndarray
    ) -> tuple[OptionClass, list[tuple[int, str, tuple[int, ...]]]]:
        """All undominated (count, ranking, three types) of a layer as one class."""
        tensors = [t for t in self.stacked if t.layer == layer]
        sizes, values, labels = [], [], []
        for kept in self.space.kept_options:
            prune_cost, criterion = self._criterion(layer, kept, costs)
            total = np.array([self._router[kept][layer]], np.int64)
            cost = np.array([prune_cost])
            picks: list[tuple[int, ...]] = [()]
            for t in tensors:
                option = self._class(t, kept, costs)
                all_sizes = (total[:, None] + option.bytes[None]).ravel()
                all_costs = (cost[:, None] + option.costs[None]).ravel()
                keep = pareto(all_sizes, all_costs)
                count = len(option.bytes)
                picks = [(*picks[i // count], int(i % count)) for i in keep]
                total, cost = all_sizes[keep], all_costs[keep]
            sizes.append(total)
            values.append(cost)
            labels += [(kept, criterion, p) for p in picks]
        stacked = OptionClass(np.concatenate(sizes), np.concatenate(values))
        keep = pareto(stacked.bytes, stacked.costs)
        return OptionClass(stacked.bytes[keep], stacked.costs[keep]), [labels[i] for i in keep]

    def _ragged(self, costs: np.ndarray, top_k: Mapping[int, int] | None) -> dict[str, Any]:
        space, layers = self.space, self.space.inventory.moe_layers
        classes = [self._class(t, space.inventory.experts, costs) for t in self.plain]
        labels = []
        for layer in layers:
            option, names = self._layer_options(layer, costs)
            classes.append(option)
            labels.append(names)
        try:
            found = solve(classes, self.limit - self._fixed[RAGGED])
        except InfeasibleError as error:
            raise InfeasibleError(self.limit, error.smallest + self._fixed[RAGGED]) from error
        types = {t.name: self.space.ladder(t)[i] for t, i in zip(self.plain, found.choice, strict=False)}
        kept, criteria = {}, {}
        for layer, names, choice in zip(layers, labels, found.choice[len(self.plain) :], strict=True):
            kept[layer], criteria[layer], picks = names[choice]
            for t, i in zip((t for t in self.stacked if t.layer == layer), picks, strict=True):
                types[t.name] = self.space.ladder(t)[i]
        ks = None if top_k is None else {layer: min(top_k[layer], kept[layer]) for layer in layers}
        return space.params(types, kept, criteria, ks)
