"""Workers that fail in the ways real ones do; in a module of their own so that Ray can import them."""

from __future__ import annotations

import os
from pathlib import Path

from search.worker import Setup
from spaces.errors import UserError


class FakeWorker:
    """Jobs that succeed, raise, or kill their process; `setup.cache` holds the marks they leave."""

    def __init__(self, setup: Setup) -> None:
        self.marks = Path(setup.cache)
        self.known: list[str] = []

    def learn(self, word: str) -> None:
        self.known.append(word)

    def knows(self) -> list[str]:
        return self.known

    def double(self, number: int) -> int:
        return 2 * number

    def die_once(self, number: int) -> int:
        mark = self.marks / f"died-{number}"
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return number

    def die(self) -> None:
        os._exit(1)

    def refuse(self) -> None:
        raise UserError("--text x: holds no text")
