"""A database has its name when it is whole: no kill and no second maker shows anything else."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from compression.files import remove_parts
from search.study import open_storage, open_study
from search.whole_file import make_database


def table(url: str, name: str = "made") -> None:
    """Makes a table of some content, as migrations do."""
    with closing(sqlite3.connect(str(make_url(url).database))) as connection, connection:
        connection.execute(f"CREATE TABLE {name} (x)")
        connection.executemany(f"INSERT INTO {name} VALUES (?)", [(i,) for i in range(100)])


def tables(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("name", ["a.db", "a b?c%20.db"])
def test_a_new_database_is_made_once_under_its_name(name: str, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/{name}".replace("%", "%25").replace("?", "%3F")
    make_database(uri, table)
    make_database(uri, lambda url: pytest.fail("made again"))
    assert names(tmp_path) == [name]
    assert tables(tmp_path / name) == ["made"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_maker_that_fails_leaves_nothing(failure: type[BaseException], tmp_path: Path) -> None:
    def fail(url: str) -> None:
        table(url)
        Path(f"{make_url(url).database}-journal").touch()
        raise failure

    with pytest.raises(failure):
        make_database(f"sqlite:///{tmp_path}/a.db", fail)
    assert names(tmp_path) == []


def test_of_two_makers_at_once_one_is_first(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=30)

    def make(name: str) -> None:
        def slowly(url: str) -> None:
            both.wait()
            table(url, name)
            both.wait()

        make_database(f"sqlite:///{tmp_path}/a.db", slowly)

    makers = [threading.Thread(target=make, args=(name,)) for name in ("one", "other")]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert names(tmp_path) == ["a.db"]
    assert tables(tmp_path / "a.db") in (["one"], ["other"])


def test_a_database_that_was_made_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr("search.whole_file.os.link", no_links)
    make_database(f"sqlite:///{tmp_path}/a.db", table)
    make_database(f"sqlite:///{tmp_path}/b.db", lambda url: table(f"sqlite:///{tmp_path}/b.db", "first"))
    assert names(tmp_path) == ["a.db", "b.db"]
    assert [*tables(tmp_path / "a.db"), *tables(tmp_path / "b.db")] == ["made", "first"]


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://user@host/name", "http://host:5000", "sqlite://", "sqlite:///:memory:", "mlruns",
        "sqlite:///file:a?mode=memory&uri=true", "sqlite:////no/such/folder/a.db",
    ],
)  # fmt: skip
def test_what_is_no_new_file_is_left_alone(uri: str) -> None:
    make_database(uri, lambda url: pytest.fail("made"))


KILLED = f"""
import os, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from search.study import open_storage

made = []

@event.listens_for(Engine, "after_cursor_execute")
def count(connection, cursor, statement, *rest):
    made.extend(["CREATE TABLE"] * ("CREATE TABLE" in statement))
    if len(made) == 2:
        os.kill(os.getpid(), {signal.SIGKILL.value})

open_storage(sys.argv[1], Path("none"))
"""
"""Is killed when it has made two of Optuna's tables."""


def test_a_study_is_opened_after_a_kill_between_its_tables(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    maker = subprocess.run([sys.executable, "-c", KILLED, url], check=False)
    assert maker.returncode == -signal.SIGKILL
    assert not (tmp_path / "study.db").exists()
    assert len(os.listdir(tmp_path)) > 0
    study = open_study("s", open_storage(url, tmp_path / "none"), {})
    study.enqueue_trial({"x": 1})
    assert len(study.get_trials()) == 1
    remove_parts(tmp_path)
    assert names(tmp_path) == ["study.db"]
