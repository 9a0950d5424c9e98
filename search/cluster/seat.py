"""What runs in a Ray actor: a worker, on the driver's files or on a copy of them.

An actor finds out itself where it is, wherever Ray put it: it is at home if it reads in the study's
cache the token that the driver wrote there, and sees the same checkpoint. Then it works on those
files, be it the driver's machine or a shared disk. Elsewhere its files come from the file server.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.files import write_text
from search.cluster.file_server import Digest
from search.cluster.mirror import Mirror
from search.cluster.places import Place, base_folder
from search.cluster.served import Served

if TYPE_CHECKING:
    from search.worker import Setup

Job = tuple[str, tuple[Any, ...]]
"""(method, arguments)."""

_TYPES = 8
"""Every type of every tensor takes at most so many times the checkpoint (6 times one in bf16)."""


@dataclass(frozen=True)
class Home:
    """How to know the driver's files.

    Attributes:
        token: What the file `home.token` in the cache holds.
        checkpoint: Name of the checkpoint among the served files.
        model: (name, bytes) of the checkpoint's files.
    """

    token: str
    checkpoint: str
    model: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, served: Served) -> Home:
        """Writes the token if there is none yet; several drivers of a study share it."""
        file = served.cache / "home.token"
        if not file.exists():
            write_text(file, uuid.uuid4().hex)
        return cls(file.read_text("ascii"), served.model, _sizes(served))

    def seen(self, served: Served) -> bool:
        """Whether these are the driver's files."""
        with suppress(OSError, ValueError):
            token = (served.cache / "home.token").read_text("ascii")
            return token == self.token and _sizes(served) == self.model
        return False


def _sizes(served: Served) -> tuple[tuple[str, int], ...]:
    return tuple((name, path.stat().st_size) for name, path in served.model_files().items())


@dataclass(frozen=True)
class RemoteFiles:
    """The file server's actor, as `search.cluster.file_server.Files`."""

    actor: Any

    def _ask(self, method: str, *args: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self.actor, method).remote(*args))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None

    def listing(self) -> dict[str, Digest]:
        found: dict[str, Digest] = self._ask("listing")
        return found

    def describe(self, name: str) -> Digest:
        found: Digest = self._ask("describe", name)
        return found

    def read(self, name: str, offset: int) -> bytes:
        return bytes(self._ask("read", name, offset))

    def write(self, name: str, token: str, offset: int, data: bytes) -> None:
        self._ask("write", name, token, offset, data)

    def finish(self, name: str, token: str, digest: Digest) -> None:
        self._ask("finish", name, token, digest)

    def has(self, name: str, digest: Digest) -> bool:
        return bool(self._ask("has", name, digest))


@dataclass(frozen=True)
class Arrival:
    """Where a worker found itself.

    Attributes:
        node: Ray's name of the node.
        host: The machine's name.
        home: Whether it sees the driver's files.
        folder: Of the node's copy, where it does not.
    """

    node: str
    host: str
    home: bool
    folder: str | None


class Seat:
    """A worker and where its files are.

    Args:
        kind: Class of the worker; its methods are the jobs.
        setup: What it is made of, paths as the driver has them.
        home: How to know them; None: Ray runs on the driver's machine alone.
        files: Actor of the file server.
    """

    def __init__(
        self, kind: Callable[..., Any], setup: Setup, home: Home | None = None, files: Any = None
    ) -> None:
        self._mirror: Mirror | None = None
        if home is None or home.seen(Served(Path(setup.checkpoint), Path(setup.cache))):
            self.worker = kind(setup)
            return
        needed = _TYPES * sum(size for _, size in home.model)
        self._place = Place(base_folder(needed, home.token), home.token)
        self._mirror = Mirror(self._place.folder, RemoteFiles(files))
        model = self._place.folder / home.checkpoint
        away = replace(setup, checkpoint=str(model), cache=str(self._place.folder / "cache"))
        self.worker = kind(away, self._mirror)

    def arrive(self) -> Arrival:
        """Says where it is, once the worker stands."""
        import ray

        folder = None if self._mirror is None else str(self._mirror.folder)
        node = ray.get_runtime_context().get_node_id()
        return Arrival(node, socket.gethostname(), self._mirror is None, folder)

    def run(self, job: Job, lessons: Sequence[Job] = ()) -> Any:
        """Runs jobs of a broadcast that the worker has not seen, then a job; returns what that gives."""
        if self._mirror is not None:
            self._mirror.refresh()
        for method, args in lessons:
            getattr(self.worker, method)(*args)
        method, args = job
        return getattr(self.worker, method)(*args)
