"""A PostgreSQL server of the distribution's, for the length of a test."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAMS = Path("/usr/lib/postgresql")
_STARTING = 60.0
_QUIET = ("-c", "listen_addresses=", "-c", "fsync=off")  # a socket alone; no test pulls the machine's plug


def programs() -> Path | None:
    """Folder of the newest server's programs, where the distribution keeps them; None where there is none."""
    found = [p for p in PROGRAMS.glob("*/bin") if (p / "initdb").is_file()]
    return max(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.parent.name)], default=None)


def _other_user() -> dict[str, Any]:
    """The server refuses to run as root: whom to run it as then."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class Server:
    """A cluster in a temporary folder, which answers on a socket there and nowhere else.

    Args:
        programs: Folder of initdb and postgres.

    Attributes:
        url: Of an empty database.
    """

    def __init__(self, programs: Path) -> None:
        self.folder, self._as = Path(tempfile.mkdtemp(prefix="pg")), _other_user()
        self.process: subprocess.Popen[bytes] | None = None
        try:
            if self._as:
                shutil.chown(self.folder, self._as["user"], self._as["group"])
            data = self.folder / "data"
            made = subprocess.run(
                [programs / "initdb", "-D", data, "-U", "moefit", "-A", "trust", "--no-sync", "-E", "UTF8"],
                cwd=self.folder, capture_output=True, text=True, timeout=120, **self._as,
            )  # fmt: skip
            assert made.returncode == 0, made.stderr
            with (self.folder / "log").open("wb") as log:
                self.process = subprocess.Popen(
                    [programs / "postgres", "-D", data, "-k", self.folder, *_QUIET],
                    cwd=self.folder, stdout=log, stderr=log, **self._as,
                )  # fmt: skip
            self.url = f"postgresql://moefit@/postgres?host={self.folder}"
            self._wait(programs)
        except BaseException:
            self.close()
            raise

    def _wait(self, programs: Path) -> None:
        deadline = time.monotonic() + _STARTING
        while time.monotonic() < deadline:
            ready = [programs / "pg_isready", "-q", "-h", self.folder, "-d", "postgres", "-U", "moefit"]
            if subprocess.run(ready, cwd=self.folder, timeout=30).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text("utf-8", errors="replace")[-2000:])

    def close(self) -> None:
        """Stops the server and removes its folder."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # a gentler one waits for clients to hang up
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
