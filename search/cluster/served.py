"""Which files of a study other nodes may read or write, and by which names.

    model/NAME             a file of the checkpoint's folder, or a part of its GGUF file
    cache/NAME             a file of a stage, with its seal
    cache/bank/xx/KEY.q    a variant: the only files that other nodes write

Nothing else has a name, so that no request can reach beyond the two folders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from spaces.errors import UserError

_MODEL = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_STAGES = ("windows-*.npz", "calibration.npz", "expert_sets.json", "experts.json", "base-*.npy")
_VARIANT = re.compile(r"cache/bank/[0-9a-f]{2}/[0-9a-f]{40}\.q")


@dataclass(frozen=True)
class Served:
    """The files of a study on the disk of its driver.

    Attributes:
        checkpoint: Folder or GGUF file of the model.
        cache: The study's cache.
    """

    checkpoint: Path
    cache: Path

    @property
    def model(self) -> str:
        """Name of the checkpoint: of its folder, or of its (first) GGUF file."""
        return "model" if self.checkpoint.is_dir() else f"model/{self.checkpoint.name}"

    def model_files(self) -> dict[str, Path]:
        """The checkpoint's files by name."""
        if self.checkpoint.is_dir():
            found = [p for pattern in _MODEL for p in self.checkpoint.glob(pattern)]
        else:
            from compression.gguf_file import GgufFile

            found = list(GgufFile.open(self.checkpoint).files)
        folder = self.checkpoint if self.checkpoint.is_dir() else self.checkpoint.parent
        return {f"model/{p.name}": p for p in sorted(found) if p.is_file() and _within(p, folder, blobs=True)}

    def stage_files(self) -> dict[str, Path]:
        """What stages left for workers so far, by name."""
        found = [p for name in _STAGES for s in ("", ".seal") for p in self.cache.glob(name + s)]
        return {f"cache/{p.name}": p for p in sorted(found) if p.is_file() and _within(p, self.cache)}

    def variant(self, name: str) -> Path:
        """Where a variant of the bank lies or is to lie.

        Raises:
            UserError: The name is no variant's, or a link leads out of the cache.
        """
        path = self.cache.parent / name.replace("cache", self.cache.name, 1)
        if not _VARIANT.fullmatch(name) or not _within(path, self.cache):
            raise _foreign(name)
        return path

    def path(self, name: str) -> Path:
        """The file of a name.

        Raises:
            UserError: It names nothing of the study.
        """
        if name.startswith("cache/bank/"):
            return self.variant(name)
        found = (self.model_files() if name.startswith("model/") else self.stage_files()).get(name)
        if found is None:
            raise _foreign(name)
        return found


def is_variant(name: str) -> bool:
    """Whether a name is a variant's."""
    return bool(_VARIANT.fullmatch(name))


def _foreign(name: str) -> UserError:
    return UserError(f"{name}: not a file of this study that workers may ask for; run the same command again")


def _within(path: Path, folder: Path, blobs: bool = False) -> bool:
    """Whether a file lies in a folder once links are followed.

    With `blobs` also in the store beside it that a hub's download links to (snapshots/REV/x -> blobs/HASH).
    """
    real, root = path.resolve(), folder.resolve()
    store = root.parent.parent / "blobs"
    return real.is_relative_to(root) or (blobs and root.parent.name == "snapshots" and real.parent == store)
