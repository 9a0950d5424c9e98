"""Finished studies whose files are damaged or gone, or that are asked for what they do not hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from experiments.bad_inputs.case import EXPORT, REPORT, RUN, Case, Make, World
from experiments.bad_inputs.search_places import PNG, file, foreign_database, png

_JOURNAL = "runs/tiny/study.journal"


def exported(wrong: str, arguments: str, *says: str, make: Make | None = None) -> Case:
    """An export of a trial of the finished study."""
    return Case(wrong, EXPORT, tuple(f"--study tiny {arguments}".split()), says, make, of_a_study=True)


def reported(wrong: str, arguments: str, *says: str, make: Make | None = None) -> Case:
    """A report on the finished study."""
    return Case(wrong, REPORT, tuple(f"--study tiny {arguments}".split()), says, make, of_a_study=True)


def again(wrong: str, arguments: str, *says: str, make: Make | None = None) -> Case:
    """The finished search, started again with something changed."""
    same = "--study tiny --out runs/tiny --trials 14 "
    return Case(wrong, RUN, tuple((same + arguments).split()), says, make, of_a_study=True)


def content(name: str, new: bytes | str) -> Make:
    return lambda world: world.put(name, new)


def cut(name: str, keep: float) -> Make:
    """The first part of a file."""
    return lambda world: world.edit(name, lambda raw: raw[: int(len(raw) * keep)])


def garbage_in_the_middle(raw: bytes) -> bytes:
    """A line of the journal overwritten."""
    lines = raw.split(b"\n")
    lines[len(lines) // 2] = b'{"op_code": \x00\xff'
    return b"\n".join(lines)


def settings(change: Callable[[dict[str, Any]], object]) -> Make:
    """A journal whose study was made with other settings."""

    def edit(raw: bytes) -> bytes:
        lines = raw.decode().split("\n")
        for i, line in enumerate(lines):
            if '"settings":' in line:
                log = json.loads(line)
                change(log["user_attr"]["settings"])
                lines[i] = json.dumps(log)
        return "\n".join(lines).encode()

    return lambda world: world.edit(_JOURNAL, edit)


def other_texts(world: World) -> None:
    """A text of other documents."""
    documents = world.texts[0].read_text("utf-8").splitlines()
    world.put("text.jsonl", "\n".join(documents[1:]))


def without_settings(raw: bytes) -> bytes:
    """A study that another program made."""
    return re.sub(rb'"settings":', b'"others":', raw)


OPTIONS: tuple[Case, ...] = (
    Case("a report of no study", REPORT, (), ("required: --study",)),
    Case("a report of a study with a blank", REPORT, ("--study", "a b"), ("--study 'a b'",)),
    Case("a report of an empty name", REPORT, ("--study", ""), ("--study ''",)),
    Case(
        "a report of a study that is nowhere", REPORT, ("--study", "none"),
        ("--study none: no study in runs/none",),
    ),
    Case(
        "an export of a study that is nowhere", EXPORT, ("--study", "none"),
        ("--study none: no study in runs/none",),
    ),
    Case("an export of a study's folder", EXPORT, ("--study", "../tiny"), ("--study '../tiny'",)),
    Case(
        "a report from a storage that is nowhere", REPORT, ("--study", "a", "--storage", "none"),
        ("--storage none: no such journal file",),
    ),
    Case(
        "a report from a picture", REPORT, ("--study", "a", "--storage", "picture.png"),
        ("--storage picture.png: is no study's journal",), png,
    ),
    Case(
        "a report from another program's database", REPORT,
        ("--study", "a", "--storage", "sqlite:///other.db"), ("--storage sqlite:///other.db",),
        foreign_database,
    ),
    Case(
        "an export from a server of nobody", EXPORT,
        ("--study", "a", "--storage", "postgresql://127.0.0.1:1/a"), ("--storage postgresql",),
    ),
    Case(
        "a report to a text", REPORT, ("--study", "a", "--out", "a.txt"), ("--out a.txt: must end in .html",),
    ),
    Case(
        "a report's unknown option", REPORT, ("--study", "a", "--page", "1"),
        ("unrecognized arguments: --page 1",),
    ),
    reported("a misspelt study", "--study tinny", "unknown --study 'tinny'", "did you mean 'tiny'?"),
    reported("a report of a trial that is not there", "--trial 999", "--trial 999: no trial of that number"),
    reported(
        "a report of a trial in words", "--trial worst",
        "--trial must be best or a trial's number, got 'worst'",
    ),
    reported(
        "a report of a negative trial", "--trial=-1", "--trial must be best or a trial's number, got '-1'",
    ),
    reported("a report of a trial of 5000 digits", "--trial " + "9" * 5000, "--trial"),
    reported("a report of a trial in superscript", "--trial ²", "--trial", "'²'"),
    reported("a report below a file", "--out file/a.html", "file", make=file),
    reported(
        "a report onto a folder", "--out f.html", "f.html", make=lambda w: (w.folder / "f.html").mkdir(),
    ),
    exported("an export of a trial that is not there", "--trial 999", "--trial 999: no trial of that number"),
    exported(
        "an export of half a trial", "--trial 1.5", "--trial must be best or a trial's number, got '1.5'",
    ),
    exported("an export of a trial below a file", "--out file/a.gguf", "file", make=file),
    exported(
        "an export of a trial onto a folder", "--out f.gguf", "f.gguf",
        make=lambda w: (w.folder / "f.gguf").mkdir(),
    ),
)  # fmt: skip

JOURNALS: tuple[Case, ...] = (
    reported(
        "a study's journal that is empty", "", "runs/tiny/study.journal", "holds no study",
        make=content(_JOURNAL, ""),
    ),
    reported("a study's journal of something else", "", _JOURNAL, make=content(_JOURNAL, '{"a": 1}\n')),
    reported(
        "a picture as a study's journal", "", _JOURNAL, "is no study's journal", make=content(_JOURNAL, PNG),
    ),
    reported(
        "garbage in the middle of a journal", "", _JOURNAL, "is damaged",
        make=lambda w: w.edit(_JOURNAL, garbage_in_the_middle),
    ),
    reported("a journal cut to its first lines", "", "--study tiny", make=cut(_JOURNAL, 0.001)),
    reported(
        "a journal without the beginning", "", _JOURNAL,
        make=lambda w: w.edit(_JOURNAL, lambda raw: raw[300:]),
    ),
    reported(
        "a study of another program", "", "--study tiny: was not made by search.run",
        make=lambda w: w.edit(_JOURNAL, without_settings),
    ),
    reported(
        "a study whose model is gone", "", "nowhere", make=settings(lambda s: s.update(model="nowhere")),
    ),
    reported(
        "a study whose settings lack the model", "", "--study tiny", make=settings(lambda s: s.pop("model")),
    ),
    exported(
        "an export of a study made without", "", "was made with --no-export",
        make=settings(lambda s: s.update(export=False)),
    ),
)  # fmt: skip

_OTHERS: tuple[Case, ...] = (
    again("a study of another budget", "--budget 4MB", "study 'tiny' is of another budget", "--study name"),
    again("a study of another seed", "--seed 1", "study 'tiny' is of another seed (0, now 1)"),
    again("a study of another sampler", "--sampler random", "study 'tiny' is of another sampler"),
    again("a study of another context", "--context 64", "study 'tiny' is of another context"),
    again("a study of other types", "--types Q4_K,Q8_0", "study 'tiny' is of another types"),
    again("a study of another device", "--device rtx-5090", "study 'tiny' is of another device"),
)  # fmt: skip

IDENTITIES: tuple[Case, ...] = (
    *_OTHERS,
    again(
        "a study of other texts in the same folder", "",
        "runs/tiny: holds a study of another model or other texts", make=other_texts,
    ),
    again("a study of another model in the same folder", "--model model.gguf", "model.gguf"),
    again(
        "a journal that another study's garbage is in", "", _JOURNAL, "is damaged",
        make=lambda w: w.edit(_JOURNAL, garbage_in_the_middle),
    ),
    again("a journal that became a picture", "", _JOURNAL, make=content(_JOURNAL, PNG)),
)  # fmt: skip

CASES = (*OPTIONS, *JOURNALS, *IDENTITIES)
