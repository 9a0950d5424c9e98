"""A cache of bounded size that forgets what was used least recently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values by key, at most `capacity` bytes of them.

    Args:
        capacity: Bytes; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, which then counts as just used; None where it is not held."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def put(self, key: K, make: Callable[[], V], size: int) -> None:
        """Keeps what `make` gives if `size` bytes have a place here at all."""
        if size > self.capacity or key in self._held:
            return
        while self.size + size > self.capacity:
            _, (_, freed) = self._held.popitem(last=False)
            self.size -= freed
        self._held[key] = (make(), size)
        self.size += size
