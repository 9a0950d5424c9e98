"""What is fuzzed, as functions of bytes, and the rule that each must keep to.

Nothing here needs hypothesis or atheris, so that both drive the same functions.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import search.export
import search.options
import search.report.__main__ as search_report
from compression.gguf_file import GgufFile
from compression.gguf_inventory import describe_gguf
from compression.safetensors_file import read_header, read_raw
from compression.sentencepiece_model import read_sentencepiece
from compression.weights import shards
from search.export_gguf import _read
from spaces.budget import format_size, parse_size
from spaces.errors import UserError
from tests.hostile import seeds
from tests.hostile.mutants import bytes_mutant

SECONDS, BYTES, LETTERS = 2.0, 2**29, 500


@dataclass(frozen=True)
class Target:
    """A function of an untrusted input, which takes the bytes and a folder of its own, and valid inputs."""

    run: Callable[[bytes, Path], None]
    seeds: tuple[bytes, ...]


class Judge:
    """Runs inputs and holds each to the rule: it returns or raises one short line, soon, in little memory."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder, self.inputs, self.accepted = target, folder, 0, 0
        # Linux forgets the largest memory so far when told to, so that it is this target's.
        Path("/proc/self/clear_refs").write_text("5")
        self.peak = _peak()

    def __call__(self, raw: bytes) -> None:
        self.inputs += 1
        start = time.process_time()
        try:
            self.target.run(raw, self.folder)
            self.accepted += 1
            text = None
        except UserError as error:
            text = str(error)
        except SystemExit as end:
            raise AssertionError("the process would end") from end
        if text is not None:
            assert text.isprintable(), repr(text)
            assert 0 < len(text) < LETTERS, f"a message of {len(text)} characters"
        took = time.process_time() - start
        assert took < SECONDS, f"took {took:.1f} s"
        # Of this input alone: what a fuzzer remembers of 100,000 inputs grows too.
        before, self.peak = self.peak, _peak()
        grown = self.peak - before
        assert grown < BYTES, f"memory grew by {grown >> 20} MiB"


def _peak() -> int:
    """The most memory this process has had, bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _written(read: Callable[[Path], None], name: str, raw: bytes, folder: Path) -> None:
    file = folder / name
    # In place: to empty a file and to fill it again costs more than all else.
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT), "wb") as stream:
        stream.write(raw)
        stream.truncate()
    read(file)


def _safetensors(file: Path) -> None:
    head, entries = read_header(file)
    end = file.stat().st_size
    for entry in entries.values():
        assert 8 + len(head) <= entry.offset <= entry.offset + entry.size <= end
        assert read_raw(entry).size == entry.size


def _index(file: Path) -> None:
    for shard in shards(file.parent):
        assert shard.resolve().parent == file.parent.resolve()


def _gguf(file: Path) -> None:
    opened = GgufFile.open(file)
    size = file.stat().st_size
    for name, tensor in opened.tensors.items():
        assert 0 <= tensor.offset <= tensor.offset + tensor.size <= size
        assert opened.raw(name).nbytes == tensor.size
    model = describe_gguf(opened)
    model.file_bytes(model.uniform_plan("Q4_K"))


def _candidate(file: Path) -> None:
    candidate = _read(file)
    candidate.validate(seeds.MODEL, str(file))
    assert json.loads(candidate.to_json())["version"] == 1


def _size(raw: bytes, folder: Path) -> None:
    size = parse_size(raw.decode("utf-8", "surrogateescape"))
    assert size > 0
    assert format_size(size)


def _arguments(raw: bytes, folder: Path) -> None:
    """The first byte chooses the command, NULs part the arguments, as no argument can hold one."""
    arguments = [os.fsdecode(a) for a in raw[1:].split(b"\0")]
    commands: list[Callable[[list[str]], Any]] = [
        search.options.parse, search.export.parse, search_report.parser().parse_args,
    ]  # fmt: skip
    try:
        with redirect_stdout(io.StringIO()):
            commands[raw[0] % len(commands) if raw else 0](arguments)
    except SystemExit as end:
        if end.code:  # 0 after --help
            raise


def _joined(*arguments: str, command: int = 0) -> bytes:
    return bytes([command]) + b"\0".join(a.encode() for a in arguments)


def _in_file(read: Callable[[Path], None], name: str, *valid: bytes) -> Target:
    return Target(partial(_written, read, name), valid)


TARGETS: dict[str, Target] = {
    "safetensors": _in_file(
        _safetensors, "a.safetensors", seeds.safetensors_file(json.dumps(seeds.SAFETENSORS).encode())
    ),
    "index": _in_file(_index, "model.safetensors.index.json", json.dumps(seeds.INDEX).encode()),
    "gguf": _in_file(_gguf, "a.gguf", b"".join(seeds.gguf_parts())),
    "candidate": _in_file(_candidate, "candidate.json", json.dumps(seeds.CANDIDATE).encode()),
    "sentencepiece": _in_file(
        lambda file: void(read_sentencepiece(file)), "tokenizer.model", b"".join(seeds.sentencepiece_parts())
    ),
    "size": Target(_size, (b"103GB", b"96 GiB", b"1.5TB", b"7b")),
    "arguments": Target(
        _arguments,
        (
            _joined("--budget", "103GB", "--trials", "9", "--types", "Q4_K,Q8_0", "--study", "a-b"),
            _joined("--budget=1GB", "--out", "runs/x", "--device-memory", "8GiB", "--seed", "7", "--dry-run"),
            _joined("--model", "m.gguf", "--uniform", "Q4_K", "--out", "a.gguf", command=1),
            _joined("--study", "a", "--trial", "3", command=2),
        ),
    ),
}


def void(_: object) -> None:
    """Takes what a reader returns."""


def spoilt_seeds(target: Target) -> list[bytes]:
    """Valid inputs and those one change away, to start a coverage-guided fuzzer from."""
    return [*target.seeds, *(bytes_mutant(s, [(5, len(s) // 2, 0)]) for s in target.seeds)]
