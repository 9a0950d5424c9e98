"""What each block of a model is set to: the unit that candidates of one round share.

A candidate is one setting per decoder block, one for what enters the first (the
embedding) and one for what follows the last (the output matrix). Two candidates
whose settings agree up to a block have the same states there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from spaces.candidate import Candidate
from spaces.inventory import Inventory

Types = tuple[tuple[str, str | None], ...]
"""(tensor, GGUF type) pairs; None: as in the uncompressed model."""

_OUTPUT = "output.weight"


@dataclass(frozen=True)
class BlockSetting:
    """One decoder block: types of its tensors; experts kept and active, None as in the model."""

    types: Types
    experts: tuple[int, ...] | None = None
    top_k: int | None = None

    @property
    def order(self) -> tuple[tuple[str, ...], tuple[int, ...], int]:
        """Sorts settings so that neighbours differ in little, which saves writing weights."""
        return tuple(t or "" for _, t in self.types), self.experts or (), self.top_k or 0


@dataclass(frozen=True)
class Setting:
    """A whole model: what enters the blocks, the blocks, what leaves them."""

    entry: Types
    blocks: tuple[BlockSetting, ...]
    exit: Types


class Settings:
    """Makes settings of one model."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        names: dict[int, list[str]] = {layer: [] for layer in range(inventory.layers)}
        outside: list[str] = []
        for t in inventory.quantizable:
            (outside if t.layer is None else names[t.layer]).append(t.name)
        tied = _OUTPUT not in outside
        self._entry = [n for n in outside if n != _OUTPUT]
        self._exit = self._entry if tied else [_OUTPUT]
        self._blocks = names
        self.base = self.of_types({})

    def of_types(self, types: Mapping[str, str]) -> Setting:
        """Some tensors quantized, nothing pruned; tensors that `types` lacks stay uncompressed."""
        blocks = tuple(
            BlockSetting(tuple((n, types.get(n)) for n in names)) for names in self._blocks.values()
        )
        entry, leave = (tuple((n, types.get(n)) for n in part) for part in (self._entry, self._exit))
        return Setting(entry, blocks, leave)

    def of(self, candidate: Candidate) -> Setting:
        """A candidate's setting."""
        setting = self.of_types(dict(candidate.types))
        for m in candidate.layers:
            setting = self.routed(setting, m.layer, m.experts, m.top_k)
        return setting

    def routed(
        self, setting: Setting, layer: int, experts: tuple[int, ...] | None, top_k: int | None = None
    ) -> Setting:
        """`setting` with other experts and top-k in one layer."""
        whole = self.inventory
        block = replace(
            setting.blocks[layer],
            experts=None if experts is None or len(experts) == whole.experts else experts,
            top_k=None if top_k == whole.top_k else top_k,
        )
        return replace(setting, blocks=(*setting.blocks[:layer], block, *setting.blocks[layer + 1 :]))
