"""Searches as processes of their own, to be killed, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
from optuna.storages import JournalStorage

from search.journal import JournalFile
from search.study import finished

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0
"""Seconds a command may take."""


def short_texts(texts: tuple[Path, Path], folder: Path) -> tuple[Path, Path]:
    """The first documents of the two texts."""
    out = []
    for text, count in zip(texts, (7, 1), strict=True):
        out.append(folder / text.name)
        out[-1].write_text("\n".join(text.read_text("utf-8").splitlines()[:count]), "utf-8")
    return out[0], out[1]


def arguments(
    checkpoint: Path, texts: tuple[Path, Path], out: Path, workers: int, repair: str = "none"
) -> list[str]:
    """A search of a tiny model that takes seconds; Ray's workers repair at full length, which takes long."""
    return [
        "--budget", "3MB", "--model", str(checkpoint), "--workers", str(workers), "--trials", "14",
        "--text", str(texts[0]), "--calibration", str(texts[1]), "--tasks", "none", "--study", "tiny",
        "--out", str(out), "--device", "raspberry-pi-5-16", "--types", "Q2_K,Q4_K,Q6_K,Q8_0,BF16",
        "--repair", repair,
    ]  # fmt: skip


class Command:
    """A search that runs as a process of its own, with a session of its own.

    Attributes:
        agents: Processes that may outlive their killed driver by a minute or two, of all commands.
    """

    agents: ClassVar[list[psutil.Process]] = []

    def __init__(self, arguments: Sequence[str], log: Path, module: str = "tests.faults.quick_run") -> None:
        self.log = log
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=stream, stderr=stream, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            )  # fmt: skip
        self.started = time.monotonic()
        self._family: dict[int, psutil.Process] = {}

    def family(self) -> list[psutil.Process]:
        """The processes it started, those that live."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        self._family |= {c.pid: c for c in children}
        return [p for p in self._family.values() if p.is_running() and p.status() != "zombie"]

    def called(self, part: str) -> list[psutil.Process]:
        """Of them, those whose command line begins with a program or title that holds `part`."""
        out = []
        for process in self.family():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if line and part in os.path.basename(line[0].split(" ")[0]):
                out.append(process)
        return out

    def wait(self, seconds: float = DEADLINE) -> int:
        """Its exit code."""
        return self.process.wait(max(1.0, seconds))

    def lives(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """kill -9 of the driver alone; what it started has to end by itself, soon.

        Ray's agents ask for their head node for another minute; see `agents`.
        """
        family, agents = [], []
        for process in self.family():
            with suppress(psutil.Error):
                # A new one has the name of its script, and no title yet; Ray's raylet is told of agents.
                agent = "agent" in " ".join(process.cmdline()).lower()
                (agents if agent else family).append(process)
        self.process.kill()
        self.process.wait()
        _, left = psutil.wait_procs(family, timeout=20)
        assert not left, f"outlived their driver: {[p.cmdline() for p in left]}"
        self.agents += agents

    def end(self) -> None:
        """Ends everything, for a test that has failed."""
        for process in [*self.family()]:
            process.kill()
        if self.lives():
            self.process.kill()
        self.process.wait()

    def output(self) -> str:
        return self.log.read_text("utf-8", errors="replace")


def finish(arguments: Sequence[str], log: Path) -> float:
    """Runs a search to its end; returns the seconds it took."""
    command = Command(arguments, log)
    try:
        assert command.wait() == 0, command.output()[-3000:]
    finally:
        command.end()
    return time.monotonic() - command.started


def trials(out: Path) -> list[tuple[Any, ...]]:
    """What the finished trials are, but for numbers and times."""
    import optuna

    storage = JournalStorage(JournalFile(out / "study.journal"))
    study = optuna.load_study(study_name="tiny", storage=storage)
    return [
        (sorted(t.params.items()), t.state.name, t.values, t.user_attrs["rungs"]) for t in finished(study)
    ]


def winner(out: Path) -> dict[str, Any]:
    """The winners' candidate, scores and the file's hash."""
    result = json.loads((out / "result.json").read_text("utf-8"))
    return {
        "winners": result["winners"],
        "finals": result["finals"],
        "repairs": {n: r["used"] for n, r in result["repairs"].items()},
        "file": hashlib.sha256((out / "winner" / "model.gguf").read_bytes()).hexdigest(),
        "candidate": (out / "winner" / "candidate.json").read_text("utf-8"),
    }


def logged(out: Path) -> list[int]:
    """Numbers of the trials that MLflow holds, sorted."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    runs = client.search_runs([experiment.experiment_id], max_results=10_000)
    return sorted(int(r.data.tags["trial"]) for r in runs if "trial" in r.data.tags)


def leftovers(out: Path) -> list[Path]:
    """Files of unfinished writes."""
    return [p for p in out.rglob("*") if p.name.endswith(".part")]
