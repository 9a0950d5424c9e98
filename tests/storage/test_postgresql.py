"""Several drivers share a study in PostgreSQL, the distribution's own, started here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from search.study import finished, open_storage
from spaces.errors import UserError
from tests.faults.commands import Command, arguments, short_texts
from tests.storage.postgresql import Server, programs
from tests.storage.sharing import opened_at_once, shared, survived, taken_at_once

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = programs()
    if found is None:
        pytest.skip("no PostgreSQL server here: install the distribution's package `postgresql`")
    pytest.importorskip("psycopg", reason="no driver of PostgreSQL: pip install 'moefit[postgresql]'")
    made = Server(found)
    yield made
    made.close()


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    """A database of the test's own."""
    import psycopg

    name = f"db{abs(hash(request.node.name)) % 10**9}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.url.replace("/postgres?", f"/{name}?")


@slow
def test_two_drivers_make_exactly_the_trials_that_were_wanted(url: str) -> None:
    shared(url, 40)


@slow
def test_a_new_database_is_opened_by_several_at_once(url: str) -> None:
    opened_at_once(url, 4)


@slow
def test_an_enqueued_trial_is_given_to_one_driver(url: str) -> None:
    taken_at_once(url, 3)


@slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_killed_drivers_trials_are_taken_over_at_once(
    url: str, count: int, record_property: Callable[[str, object], None]
) -> None:
    lost, seconds = survived(url, 60, count)
    told = f"kill -9 of one of {count} drivers of one study (PostgreSQL), with {lost} trials running"
    record_property("fault", json.dumps({"fault": told, "injected": 1, "lost": 0, "seconds": seconds}))
    assert seconds < 10


@slow
@pytest.mark.timeout(1800)
def test_two_commands_in_two_folders_share_a_study(
    url: str, tiny_checkpoint: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    short = short_texts(texts, tmp_path)
    commands = []
    for name in ("one", "other"):
        own = arguments(tiny_checkpoint, short, tmp_path / name, 0)
        commands.append(Command([*own, "--storage", url], tmp_path / f"{name}.log"))
    try:
        for command in commands:
            assert command.wait(600) == 0, command.output()[-3000:]
    finally:
        for command in commands:
            command.end()
    study = optuna.load_study(study_name="tiny", storage=open_storage(url, tmp_path / "unused"))
    done = finished(study)
    assert len(done) == 14
    assert len({t.user_attrs["candidate"] for t in done}) == 14
    assert len({t.user_attrs["driver"] for t in done}) == 2
    results = [json.loads((tmp_path / n / "result.json").read_text("utf-8")) for n in ("one", "other")]
    assert results[0]["winners"] == results[1]["winners"]
    assert [t["number"] for t in results[0]["trials"]] == [t.number for t in done]


def test_a_missing_driver_of_the_database_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'moefit\[postgresql\]'") as error:
        open_storage("postgresql://moefit@/x?host=/nowhere", tmp_path / "unused")
    assert "\n" not in str(error.value)
