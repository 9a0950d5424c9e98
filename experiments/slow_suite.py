"""Runs the slow tests and keeps what they measured: `python -m experiments.slow_suite`.

Results go to experiments/results/slow_suite.json after every module, with date and commit; a run
that was cut off goes on with the modules that have no results of this commit yet. `--docs FILE`
writes the page about faults from the JSON file alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from compression.files import write_text
from experiments.faults_page import page
from search.commands import run_command
from spaces.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results") / "slow_suite.json"
_MODULE_SECONDS = 7200
_PLAIN = ("-o", "addopts=--strict-markers")  # a second -q would hide the names


def commit() -> str:
    """The checked-out commit, with a plus where tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!experiments/results", ":!docs")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def modules(wanted: str) -> list[str]:
    """Test modules that hold slow tests, in pytest's order."""
    command = [sys.executable, "-m", "pytest", *_PLAIN, "-m", "slow", "--collect-only", "-q", "-k", wanted]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return list(dict.fromkeys(line.split("::")[0] for line in listed.splitlines() if "::" in line))


def run(module: str, wanted: str) -> list[dict[str, Any]]:
    """Runs a module's slow tests; returns a record of each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", *_PLAIN, "-m", "slow", "-k", wanted, module,
            f"--junitxml={report}", "-o", "junit_family=xunit1", "-o", "timeout=3600",
        ]  # fmt: skip
        code = subprocess.run(command, cwd=ROOT, timeout=_MODULE_SECONDS).returncode
        if code not in (0, 1):  # all passed, some failed
            raise UserError(f"{module}: pytest ended with {code}; run the same command again")
        when = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "commit": commit()}
        return [_record(case, module) | when for case in ElementTree.parse(report).iter("testcase")]


def _record(case: ElementTree.Element, module: str) -> dict[str, Any]:
    outcome, said = "passed", ""
    for name in ("failure", "error", "skipped"):
        found = case.find(name)
        if found is not None:
            outcome, said = {"failure": "failed"}.get(name, name), (found.get("message") or "")[:300]
    measured = {p.get("name", ""): json.loads(p.get("value", "null")) for p in case.iter("property")}
    name = f"{module}::{case.get('name')}"
    record = {"test": name, "outcome": outcome, "seconds": round(float(case.get("time", 0)), 1)}
    return record | ({"said": said} if said else {}) | ({"measured": measured} if measured else {})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.slow_suite", description=__doc__)
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only tests that pytest's -k selects")
    parser.add_argument("--again", action="store_true", help="run what has results of this commit too")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the page and run nothing")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    if args.docs is not None:
        write_text(args.docs, page(known))
        return
    for module in modules(args.k):
        if not args.again and not args.k and known.get(module, {}).get("commit") == commit():
            continue
        records = run(module, args.k)
        if args.k and module in known:  # the others of the module stay
            new = {r["test"] for r in records}
            records = [r for r in known[module]["tests"] if r["test"] not in new] + records
        known[module] = {"commit": commit(), "tests": records}
        write_text(RESULTS, json.dumps(known, indent=1, sort_keys=True) + "\n")
    records = [record for about in known.values() for record in about["tests"]]
    failed = [record["test"] for record in records if record["outcome"] in ("failed", "error")]
    print(f"{len(records)} slow tests have results, {len(failed)} of them failed")
    for name in failed:
        print(name)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main)
