"""What a case of the table is, and the folder it happens in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RUN = "search.run"
EXPORT = "search.export"
REPORT = "search.report"

SEARCH = (
    "--budget", "3MB", "--model", "model", "--text", "text.jsonl", "--calibration", "calibration.jsonl",
    "--tasks", "none", "--workers", "0", "--device", "raspberry-pi-5-16", "--study", "new", "--out", "out",
)  # fmt: skip
"""A search that is right: a case gives one option or file anew, and the last one given counts."""


@dataclass(frozen=True)
class World:
    """A folder that a command runs in, with good inputs, and where these are kept.

    Good inputs are links to shared files, so that a case costs no copy: whoever spoils one
    puts a new file in its place and never writes into it.

    Attributes:
        folder: The folder; paths of the table are relative to it.
        checkpoint: A good checkpoint folder, as `model` in the folder.
        gguf: A good GGUF model, as `model.gguf`.
        texts: A text and a calibration text, as `text.jsonl` and `calibration.jsonl`.
        run: Folder of a finished run of the checkpoint, or None; its study is called `tiny`.
    """

    folder: Path
    checkpoint: Path
    gguf: Path
    texts: tuple[Path, Path]
    run: Path | None = None

    def furnish(self) -> None:
        """Puts the good inputs into the folder, and a copy of the run as `runs/tiny`."""
        (self.folder / "model").symlink_to(self.checkpoint)
        (self.folder / "model.gguf").symlink_to(self.gguf)
        for name, text in zip(("text.jsonl", "calibration.jsonl"), self.texts, strict=True):
            (self.folder / name).symlink_to(text)
        if self.run is not None:
            self._copy_run(self.run, self.folder / "runs" / "tiny")

    def _copy_run(self, run: Path, to: Path) -> None:
        """Sealed files as links, what is written in place as copies; the study leads to the copy."""
        shutil.copytree(run / "cache", to / "cache", copy_function=os.link)
        for file in ("result.json", "mlflow.db"):
            shutil.copyfile(run / file, to / file)
        shutil.copytree(run / "winner", to / "winner", copy_function=os.link)
        journal, here = (run / "study.journal").read_text("utf-8"), json.dumps(str(to))[1:-1]
        (to / "study.journal").write_text(journal.replace(json.dumps(str(run))[1:-1], here), "utf-8")

    def path(self, name: str) -> Path:
        """A path below the folder; its parents are made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def put(self, name: str, content: bytes | str) -> Path:
        """A new file, in place of what is there."""
        path = self.path(name)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> Path:
        """A changed copy of a file, in its place."""
        return self.put(name, change((self.folder / name).read_bytes()))

    def own_model(self) -> Path:
        """The checkpoint as a folder of links that may be replaced one by one."""
        link = self.folder / "model"
        link.unlink()
        shutil.copytree(self.checkpoint, link, copy_function=os.link)
        return link


Make = Callable[[World], object]
"""Puts a bad input into a furnished folder."""


@dataclass(frozen=True)
class Case:
    """A bad input, and how the command has to end: one line on stderr, code 2, nothing written.

    Attributes:
        wrong: What is wrong, in words; no two cases share them.
        command: Module that is run.
        arguments: Its arguments.
        says: Parts of the line, in this order; among them is the file or option.
        make: Puts the bad input there; None where the arguments are all of it.
        of_a_study: Whether it needs the finished run.
        leaves: Patterns of files that may differ afterwards.
        slow: Whether it takes seconds until it is noticed.
    """

    wrong: str
    command: str
    arguments: tuple[str, ...]
    says: tuple[str, ...]
    make: Make | None = None
    of_a_study: bool = False
    leaves: tuple[str, ...] = ()
    slow: bool = False

    @property
    def argv(self) -> tuple[str, ...]:
        """All that follows the module's name."""
        return (*SEARCH, *self.arguments) if self.command == RUN else self.arguments


def search(wrong: str, arguments: str | list[str], *says: str, make: Make | None = None) -> Case:
    """A search with something given anew; arguments in one string are split at blanks."""
    return Case(wrong, RUN, _words(arguments), says, make)


def export(wrong: str, arguments: str | list[str], *says: str, make: Make | None = None) -> Case:
    """An export from a GGUF file."""
    return Case(wrong, EXPORT, _words(arguments), says, make)


def _words(arguments: str | list[str]) -> tuple[str, ...]:
    return tuple(arguments.split() if isinstance(arguments, str) else arguments)
