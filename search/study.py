"""The Optuna study: where it is stored, and whether it may go on."""

from __future__ import annotations

import json
import math
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from search.journal import JournalFile
from search.whole_file import make_database
from spaces.errors import UserError

_DIRECTIONS: tuple[Literal["minimize", "maximize"], ...] = ("minimize", "minimize", "maximize")
_BUSY = 120  # seconds a writer waits for the others
_MAKING, _LOOKS = 1.0, 5  # seconds between looks at a database whose tables another driver just makes
_METRICS = ("KL (nats)", "target bytes", "target tokens/s")


def open_storage(url: str | None, default: Path) -> BaseStorage:
    """A journal file, or any database Optuna takes.

    Raises:
        UserError: The storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    if url is None or "://" not in url:
        path = default if url is None else Path(url)
        if path.is_dir():
            raise UserError(f"--storage {path}: is a folder; give a journal file or a database URL")
        if path.is_file() and not _journal(path):
            raise UserError(f"--storage {path}: is no study's journal; give a new file or a database URL")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return JournalStorage(JournalFile(path))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"--storage {path}: is damaged ({str(error)[:100]}); restore a copy of it, or give a new file"
            ) from error
    shown = re.sub(r"(//[^:/@]+):[^@/]*@", r"\1:***@", url)
    try:
        if _foreign(url):
            time.sleep(_MAKING)
            if _foreign(url):
                raise UserError(f"--storage {shown}: is a database of something else; give one of its own")
        return _database(url)
    except UserError:
        raise
    except Exception as error:  # SQLAlchemy and drivers raise many kinds
        if isinstance(error, ImportError) and url.startswith("postgresql"):
            raise UserError(
                f"--storage {shown}: PostgreSQL's driver is not installed; pip install 'moefit[postgresql]'"
            ) from error
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"--storage {shown}: cannot be opened ({reason})") from error


def _database(url: str) -> BaseStorage:
    """Optuna's storage in a database; its tables are made where there are none."""
    # A server may have closed a connection since it was used last; a file's writers take turns.
    local = url.startswith("sqlite")
    patience = {"timeout": _BUSY, "isolation_level": None} if local else {}
    options = {"pool_pre_ping": True, "connect_args": patience}
    make_database(url, _make_tables)
    looks = 0
    while True:
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=dict(options))
            if local:
                _one_at_a_time(storage)
            return storage
        except Exception as error:  # which kind depends on the database, and on who was first where
            making = "already exists" in str(error) or "UNIQUE constraint" in str(error)
            if looks == _LOOKS or not making:
                raise
            looks += 1
            time.sleep(_MAKING)


def _make_tables(url: str) -> None:
    optuna.storages.RDBStorage(url).engine.dispose()


def _one_at_a_time(storage: optuna.storages.RDBStorage) -> None:
    """Has SQLite's transactions take the write lock where they begin.

    It has no locks of rows, by which Optuna keeps two drivers from taking the same enqueued trial: both
    would read that it waits before one of them writes.
    """
    from sqlalchemy import event

    writable = os.access(storage.engine.url.database or "", os.W_OK)
    begin = "BEGIN IMMEDIATE" if writable else "BEGIN"
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql(begin))


def _foreign(url: str) -> bool:
    """Whether a database has tables that Optuna's would be mixed up with; looked at, not changed."""
    import sqlalchemy

    file = url.removeprefix("sqlite:///")
    if file != url and not Path(file).is_file():
        return False
    engine = sqlalchemy.create_engine(url)
    try:
        tables = set(sqlalchemy.inspect(engine).get_table_names())
    finally:
        engine.dispose()
    clashing = tables if file != url else tables & {"studies", "trials"}
    return bool(clashing) and "version_info" not in tables


def _journal(path: Path) -> bool:
    """Whether a file is empty or begins as Optuna's journals do."""
    try:
        with path.open("rb") as stream:
            first = stream.readline(2**20)
        return not first or "op_code" in json.loads(first)
    except (OSError, ValueError, TypeError):
        return False


def open_study(name: str, storage: BaseStorage, identity: dict[str, Any]) -> optuna.Study:
    """Creates the study, or goes on with it if it is about the same problem.

    Raises:
        UserError: A study of that name is about something else.
    """
    if name in [s.study_name for s in storage.get_all_studies()]:
        study = optuna.load_study(study_name=name, storage=storage)  # writes nothing where it is refused
    else:
        study = optuna.create_study(
            study_name=name, storage=storage, directions=list(_DIRECTIONS), load_if_exists=True
        )
    known = study.user_attrs.get("identity")
    if known is None:
        study.set_metric_names(list(_METRICS))
        study.set_user_attr("identity", identity)
    elif known != identity:
        differing = sorted(k for k in identity.keys() | known.keys() if identity.get(k) != known.get(k))
        k = differing[0]
        raise UserError(
            f"study {name!r} is of another {k} ({known.get(k)!r}, now {identity.get(k)!r}); "
            "give this search a --study name of its own"
        )
    return study


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials with scores: complete and early-stopped ones."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return [t for t in study.get_trials(deepcopy=False, states=states) if "scores" in t.user_attrs]


def window_scores(columns: dict[str, list[float]], bytes_per_token: float, tokens: int) -> dict[str, Any]:
    """The quality fields of `Scores` from per-window measures on so many tokens."""
    kl, nll = np.array(columns["kl"]), np.array(columns["nll"])
    return {
        "kl": float(kl.mean()),
        "kl_se": float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else 0.0,
        "perplexity": float(np.exp(min(nll.mean(), 700.0))),
        "bits_per_byte": float(nll.mean() / math.log(2) / bytes_per_token),
        "top1": float(np.mean(columns["top1"])),
        "tokens": tokens,
    }
