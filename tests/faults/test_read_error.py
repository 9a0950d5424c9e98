"""A disk that cannot be read: one line that names the file, and a search that goes on when it can be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compression.files import read_part
from tests.faults.commands import Command, arguments, finish, leftovers, trials, winner
from tests.faults.conftest import Texts, Undisturbed

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* read() of a file whose name ends in $UNREADABLE: an input/output error. */
static int broken(int fd) {
    char link[64], name[4096];
    const char *wanted = getenv("UNREADABLE");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = wanted ? readlink(link, name, sizeof name - 1) : -1;
    if (n < 0) return 0;
    name[n] = 0;
    size_t length = strlen(wanted);
    return (size_t)n >= length && strcmp(name + n - length, wanted) == 0;
}

ssize_t read(int fd, void *to, size_t count) {
    static ssize_t (*real)(int, void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "read");
    if (broken(fd)) { errno = EIO; return -1; }
    return real(fd, to, count);
}
"""
"""What stands between the program and the system, as no test can break a disk."""


def test_an_unreadable_file_is_named() -> None:
    memory = Path("/proc/self/mem")  # nothing is mapped at its start
    if not memory.exists():
        pytest.skip("no /proc here")
    with pytest.raises(OSError, match="Input/output error") as caught:
        read_part(memory, 0, 8)
    assert caught.value.filename == str(memory)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "unreadable.c").write_text(SOURCE)
    library = folder / "unreadable.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "unreadable.c"], check=True)
    return library


def stopped_when(ready: Callable[[], bool], options: list[str], log: Path) -> None:
    """Runs a search until then, and kills it."""
    command = Command(options, log)
    try:
        while not ready():
            assert command.lives(), command.output()[-3000:]
            time.sleep(0.01)
        command.kill()
    finally:
        command.end()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["the checkpoint", "a text", "the tokenizer", "the calibration", "the bank"])
def test_a_search_goes_on_when_a_file_can_be_read_again(
    kind: str,
    shim: Path,
    tiny_checkpoint: Path,
    short: Texts,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    out = tmp_path / "out"
    options = arguments(tiny_checkpoint, short, out, 0)
    calibration, bank, costs = (out / "cache" / n for n in ("calibration.npz", "bank", "option_costs.jsonl"))
    if kind == "the calibration":
        stopped_when(lambda: bank.exists(), options, tmp_path / "before")
    if kind == "the bank":
        stopped_when(lambda: costs.exists(), options, tmp_path / "before")
    file = {
        "the checkpoint": lambda: next(tiny_checkpoint.glob("*.safetensors")),
        "a text": lambda: short[0],
        "the tokenizer": lambda: tiny_checkpoint / "tokenizer.json",
        "the calibration": lambda: calibration,
        "the bank": lambda: max(bank.rglob("*.q"), key=os.path.getsize),
    }[kind]()
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(shim))
        patch.setenv("UNREADABLE", str(file))
        command = Command(options, tmp_path / "log")
        try:
            assert command.wait() == 2, command.output()[-3000:]
        finally:
            command.end()
    output = command.output()
    (line,) = [row for row in output.splitlines() if row.startswith("error:")]
    assert file.name in line
    assert "Input/output error" in line
    assert "Traceback" not in output
    assert file.exists()
    assert kind in ("the calibration", "the bank") or not leftovers(tmp_path)  # these were killed before
    seconds = round(finish(options, tmp_path / "again"), 1)
    expected, _ = undisturbed(0, "none")
    assert trials(out) == trials(expected)
    assert winner(out) == winner(expected)
    fault = {"fault": f"read error of {kind}", "injected": 1, "lost": 0, "seconds": seconds}
    record_property("fault", json.dumps(fault))
