"""Workers that fail in the ways real ones do; in a module of their own so that Ray can import them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from search.worker import Setup
from spaces.errors import UserError


class FakeWorker:
    """Jobs that succeed, raise, or kill their process; `setup.cache` holds the marks they leave."""

    anywhere = ("double", "slowly", "knows", "die_once")

    def __init__(self, setup: Setup, remote: Any = None) -> None:
        self.marks = Path(setup.cache)
        self.known: list[str] = []

    def learn(self, word: str) -> None:
        self.known.append(word)

    def knows(self) -> list[str]:
        return self.known

    def double(self, number: int) -> int:
        return 2 * number

    def slowly(self, number: int, seconds: float) -> int:
        time.sleep(seconds)
        return number

    def lose_files(self, number: int, times: int) -> int:
        """Fails so often as when the file server is out of reach."""
        import ray

        mark = self.marks / f"lost-{number}"
        lost = int(mark.read_text()) if mark.exists() else 0
        if lost < times:
            mark.write_text(str(lost + 1))
            raise ray.exceptions.ActorUnavailableError("out of reach", None)
        return number

    def stay(self) -> str:
        """The node it runs on, which has to be the driver's."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

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
