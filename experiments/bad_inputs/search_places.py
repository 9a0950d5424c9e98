"""Paths, addresses and storages given to search.run that lead nowhere or to something else."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

from experiments.bad_inputs.case import Case, World, search

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0"
_ENDLESS = "deep/" * 1000 + "x"
_NAME = "n" * 300


def loop(world: World) -> None:
    """`loop` is a link to itself."""
    (world.folder / "loop").symlink_to("loop")


def broken(world: World) -> None:
    """`broken` is a link to nothing."""
    (world.folder / "broken").symlink_to("nothing")


def folder(world: World) -> None:
    """An empty folder."""
    (world.folder / "folder").mkdir()


def file(world: World) -> None:
    """A text where a folder is asked for."""
    world.put("file", "text\n")


def png(world: World) -> None:
    world.put("picture.png", PNG)


def foreign_database(world: World) -> None:
    """A database of another program."""
    connection = sqlite3.connect(world.path("other.db"))
    with connection:
        connection.execute("CREATE TABLE studies (name TEXT, price REAL)")
    connection.close()


def other_journal(world: World) -> None:
    world.put("new.journal", '{"op_code":0,"worker_id":"w","study_name":"new"}\n{"garbage\n{"op_code":0}\n')


MODEL: tuple[Case, ...] = (
    search("a model that is not there", "--model nowhere", "nowhere: no such model folder", "config.json"),
    search("an empty path of a model", ["--model", ""], "config.json"),
    search(
        "a model in an empty folder", "--model folder", "folder/config.json", "cannot be read", make=folder,
    ),
    search("a model that is a text", "--model file", "file: cannot be read as JSON", make=file),
    search("a model behind a loop of links", "--model loop", "--model 'loop'", make=loop),
    search("a model behind a broken link", "--model broken", "broken: no such model folder", make=broken),
    search("a model's path that is too long", ["--model", _NAME], _NAME[:50]),
    search("a model's path of 5000 characters", ["--model", _ENDLESS], "deep/deep"),
    search("a model's path with a NUL", ["--model", "mo\0del"], "mo\\x00del"),
    search("a model's path with control codes", ["--model", "\x1b[31mred"], "\\x1b[31mred"),
    search("a device file as model", "--model /dev/zero", "/dev/zero", "is no file"),
    search("a GGUF file that is not there", "--model nowhere.gguf", "nowhere.gguf: cannot be read"),
    search("an unknown target", "--target deepseek-v9", "deepseek-v9"),
    search("an empty target", ["--target", ""], "--target"),
    search("a target's folder without config", "--target folder", "folder/config.json", make=folder),
    search("a target that is a picture", "--target picture.png", "picture.png", make=png),
    search("a target behind a loop of links", "--target loop", "loop", make=loop),
    search("a target with a NUL", ["--target", "a\0b"], "a\\x00b"),
)  # fmt: skip

OUT: tuple[Case, ...] = (
    search("an out folder that is a file", "--out file", "--out", "file", make=file),
    search("an out folder below a file", "--out file/out", "--out", "file", make=file),
    search("an out folder where none can be", "--out /dev/null/out", "--out /dev/null/out"),
    search("an out folder in a file system of the kernel's", "--out /proc/out", "/proc/out"),
    search("an out folder behind a loop of links", "--out loop", "--out 'loop'", make=loop),
    search("an out folder's name of 300 letters", ["--out", _NAME], "--out"),
    search("an out folder's path of 5000 characters", ["--out", _ENDLESS], "--out"),
    search("an out folder's name with a NUL", ["--out", "o\0ut"], "--out 'o\\x00ut'"),
)

STORAGE: tuple[Case, ...] = (
    search("a storage that is a picture", "--storage picture.png", "--storage picture.png", make=png),
    search("a storage that is a folder", "--storage folder", "--storage folder: is a folder", make=folder),
    search("a storage below a file", "--storage file/a.journal", "file", make=file),
    search("a storage behind a loop of links", "--storage loop", "loop", make=loop),
    search("a storage with a NUL", ["--storage", "a\0b"], "--storage"),
    search("an empty storage", ["--storage", ""], "--storage"),
    search(
        "a journal with a damaged line", "--storage new.journal", "--storage new.journal: is damaged",
        make=other_journal,
    ),
    replace(
        search(
            "a database of another program", "--storage sqlite:///other.db", "--storage sqlite:///other.db",
            make=foreign_database,
        ),
    ),
    search(
        "a picture as a database", "--storage sqlite:///picture.png", "--storage sqlite:///picture.png",
        make=png,
    ),
    search("a database below a file", "--storage sqlite:///file/a.db", "--storage sqlite:///", make=file),
    search("a storage of an unknown kind", "--storage gopher://host/db", "--storage gopher://host/db"),
    search("a storage URL that is none", "--storage ://", "--storage ://"),
    search(
        "a PostgreSQL server of nobody", "--storage postgresql://127.0.0.1:1/x", "--storage postgresql://",
    ),
    search("a MySQL server of nobody", "--storage mysql://127.0.0.1:1/x", "--storage mysql://"),
)  # fmt: skip

ADDRESSES: tuple[Case, ...] = (
    search("a tracking server of nobody", "--tracking-uri http://127.0.0.1:1", "--tracking-uri http://"),
    search(
        "a tracking server's port of 99999", "--tracking-uri http://h:99999", "--tracking-uri http://h:99999",
    ),
    search("a tracking URI of an unknown kind", "--tracking-uri gopher://h", "--tracking-uri gopher://h"),
    search(
        "a tracking database below a file", "--tracking-uri sqlite:///file/a.db", "--tracking-uri", make=file,
    ),
    search(
        "a picture as a tracking database", "--tracking-uri sqlite:///picture.png", "--tracking-uri",
        make=png,
    ),
    search("a tracking URI without an end of its host", ["--tracking-uri", "http://[::1"], "--tracking-uri"),
    search("a Ray cluster of nobody", "--workers 1 --ray-address 127.0.0.1:1", "--ray-address 127.0.0.1:1"),
    search("a Ray address without a port", "--workers 1 --ray-address host", "--ray-address 'host' must be"),
    search("an empty Ray address", ["--workers", "1", "--ray-address", ""], "--ray-address '' must be"),
    search("a Ray address's port of 99999", "--workers 1 --ray-address 127.0.0.1:99999", "--ray-address"),
    search("a Ray cluster and no Ray workers", "--ray-address 127.0.0.1:1", "--ray-address", "--workers 0"),
)  # fmt: skip


CASES = (*MODEL, *OUT, *STORAGE, *ADDRESSES)
