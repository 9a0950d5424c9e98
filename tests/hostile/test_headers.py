"""What the header checks accept the formats' own libraries open too, and what only looks valid is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compression.gguf_file import GgufFile
from compression.safetensors_file import read_header
from compression.weights import shards
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.json_text import read_text
from tests.compression.support import refused
from tests.hostile import seeds
from tests.hostile.mutants import Change, json_mutant, parts_mutant

# Readers of the formats' own, in a child: they may panic or abort.
_LIBRARIES = """
import sys
from pathlib import Path
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open
            with safe_open(file, "numpy") as opened:
                names = list(opened.keys())
        else:
            from gguf import GGUFReader
            names = [t.name for t in GGUFReader(file).tensors]
    except Exception as error:
        print(file.name, type(error).__name__, error)
    else:
        print(file.name, "opened", len(names))
"""


def opened_by_library(folder: Path) -> dict[str, str]:
    command = [sys.executable, "-c", _LIBRARIES, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def changes(dice: random.Random) -> list[Change]:
    return [
        (dice.randrange(12), dice.randrange(2**16), dice.randrange(256)) for _ in range(dice.randint(1, 2))
    ]


def accepted(
    folder: Path, suffix: str, count: int, make: Callable[[list[Change]], bytes], names: Callable[[Path], Any]
) -> dict[str, int]:
    """Writes `count` different changed files that our reader accepts; how many tensors it finds in each."""
    dice, found, seen = random.Random(0), {}, set()
    while len(found) < count:
        raw = make(changes(dice))
        file = folder / f"{len(found):04}{suffix}"
        if raw in seen:
            continue
        seen.add(raw)
        file.write_bytes(raw)
        try:
            found[file.name] = len(names(file))
        except UserError:
            file.unlink()
    return found


def test_safetensors_opens_what_is_accepted(tmp_path: Path) -> None:
    def make(some: list[Change]) -> bytes:
        return seeds.safetensors_file(json_mutant(seeds.SAFETENSORS, some))

    found = accepted(tmp_path, ".safetensors", 200, make, lambda file: read_header(file)[1])
    assert opened_by_library(tmp_path) == {name: f"opened {count}" for name, count in found.items()}


def test_the_gguf_library_opens_what_is_accepted(tmp_path: Path) -> None:
    parts = seeds.gguf_parts()
    found = accepted(
        tmp_path, ".gguf", 200, lambda some: parts_mutant(parts, some), lambda f: GgufFile.open(f).tensors
    )
    theirs = opened_by_library(tmp_path)
    odd = {n: theirs[n] for n, count in found.items() if theirs[n] != f"opened {count}"}
    assert not odd, odd


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}, '
        b'"a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}}',
        b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [32], "data_offsets": [0, 32]}}',
        b' {"a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}}',
        '{"a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}}'.encode("utf-16"),
        b'{"\\ud800": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}}',
        b'{"__metadata__": {"a": "\\ud800"}, "a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}}',
        b'{"__metadata__": {"a": 1}, "a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}}',
        b'{"a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}, '
        b'"b": {"dtype": "U8", "shape": [4611686018427387904, 4, 0], "data_offsets": [32, 32]}}',
        b'{"a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}, "__metadata__": {"b": "'
        + b"[" * (2**20 + 1) + b'"}}',
    ],
    ids=["name twice", "field twice", "space first", "UTF-16", "half a character", "half of another",
         "metadata", "overflow",
         "lists without end"],
)  # fmt: skip
def test_a_safetensors_header_that_readers_differ_on_is_refused(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(seeds.safetensors_file(header))
    refused(lambda: read_header(file), file, "damaged")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", "x" * 256, 3, None]
)
def test_a_shard_outside_the_folder_is_refused(name: Any, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: shards(folder), folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"types": {', '"types": {"token_embd.weight": "Q2_K", '),
        lambda text: text.replace('"version": 1', '"version": 1, "version": 1'),
        lambda text: text.replace('"version": 1', '"version": true'),
        lambda text: text.replace('"version": 1', '"version": 1.0'),
        lambda text: text.replace('"Q4_K"', "[]", 1),
        lambda text: text.replace('"token_embd', '"\\ud800', 1),
    ],
    ids=["tensor twice", "version twice", "version true", "version 1.0", "type a list", "half a character"],
)
def test_a_candidate_that_readers_differ_on_is_refused(edit: Callable[[str], str]) -> None:
    text = json.dumps(seeds.CANDIDATE)
    assert Candidate.from_json(text).to_json() == Candidate.uniform(seeds.MODEL, "Q4_K").to_json()
    assert edit(text) != text
    refused(lambda: Candidate.from_json(edit(text), "c.json"), "c.json")


def test_a_text_is_a_regular_file_of_bounded_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read_text(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read_text(Path("/dev/zero"))
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ValueError, match="more than"):
        read_text(tmp_path / "huge")


def test_a_message_cannot_act_on_a_terminal_or_fill_it() -> None:
    message = str(UserError("file: \x1b[2J \u202e\ud800 " + "x" * 10**6 + " remedy"))
    assert message.isprintable()
    assert len(message) < 500
    assert message.startswith(r"file: \x1b[2J \u202e\ud800")
    assert message.endswith("x remedy")
