"""What a killed process left unfinished goes, what a living one writes stays; parts of files are read."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from compression.files import atomic, locked_folder, read_part, remove_parts

WRITER = """
import sys, time
from pathlib import Path
from compression.files import atomic, locked_folder

out = Path(sys.argv[1])
with atomic(out / "model.gguf") as stream, locked_folder(out / "export") as folder:
    stream.write(bytes(1000))
    stream.flush()
    (folder / "weights").write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the midst of writing a file and a folder."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        yield process
        process.kill()


@pytest.mark.parametrize("below", [False, True])
def test_only_what_a_killed_process_left_is_removed(
    below: bool, writer: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / "finished.part").touch()
    (tmp_path / ".hidden").touch()
    folder = tmp_path.parent if below else tmp_path
    remove_parts(folder)
    assert len(names(tmp_path)) == 4
    writer.kill()
    writer.wait()
    assert len(names(tmp_path)) == 4
    remove_parts(folder)
    assert names(tmp_path) == [".hidden", "finished.part"]


def test_what_another_thread_writes_stays(tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    def write() -> None:
        with locked_folder(tmp_path / "b") as folder, atomic(tmp_path / "a") as stream:
            (folder / "c").touch()
            stream.write(b"whole")
            begun.set()
            ended.wait(30)

    thread = threading.Thread(target=write)
    thread.start()
    assert begun.wait(30)
    remove_parts(tmp_path)
    assert len(names(tmp_path)) == 2
    ended.set()
    thread.join()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_of_one_file_only_its_parts_are_removed(tmp_path: Path) -> None:
    orphans = [".a[1].gguf.1.2.part", ".a1.gguf.1.2.part", ".b.gguf.1.2.part", "below/.a[1].gguf.1.2.part"]
    (tmp_path / "below").mkdir()
    for orphan in orphans:
        (tmp_path / orphan).touch()
    (tmp_path / "a[1].gguf").touch()
    remove_parts(tmp_path, "a[1].gguf")
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted(["a[1].gguf", *orphans[1:]])


def test_the_journal_of_an_unfinished_database_goes_with_it(tmp_path: Path) -> None:
    for name in (".study.db.1.2.part", ".study.db.1.2.part-journal", "study.db-journal"):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert names(tmp_path) == ["study.db-journal"]


def test_a_part_that_was_removed_before_it_was_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = threading.get_ident()

    def removing(handle: object, kind: int) -> None:
        monkeypatch.undo()
        assert threading.get_ident() == own
        remove_parts(tmp_path)

    monkeypatch.setattr("compression.files.fcntl.flock", removing)
    with atomic(tmp_path / "a") as stream:
        stream.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_folder_of_nothing_has_no_parts(tmp_path: Path) -> None:
    remove_parts(tmp_path / "none")
    remove_parts(tmp_path / "none", "a")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("offset", "size", "found"), [(0, 10, 10), (3, 4, 4), (8, 5, 2), (10, 1, 0), (99, 5, 0), (2, 0, 0)]
)
def test_a_part_of_a_file_is_read_as_far_as_there_is_one(
    offset: int, size: int, found: int, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(bytes(range(10)))
    part = read_part(tmp_path / "a", offset, size)
    assert part.dtype == np.uint8
    assert part.tolist() == [*range(10)][offset : offset + size]
    assert len(part) == found
