"""What writing a study to MLflow takes: `python -m experiments.tracking_time runs/NAME`.

Writes the trials of a finished run into a new database (or to --tracking-uri, under another
name) and compares that with the time the trials themselves took.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import optuna

from compression.checkpoint import open_checkpoint
from experiments.figures import figures
from search.commands import run_command
from search.study import finished, open_storage
from search.tracking import Tracker
from spaces.candidate import Candidate
from spaces.errors import UserError


def measure(run: Path, uri: str | None) -> dict[str, float]:
    """Seconds per trial (driver held up, writer busy, processor time) and shares of a trial's own time."""
    if not (run / "result.json").is_file():
        raise UserError(f"{run}: holds no result.json; give the folder of a finished run")
    result = json.loads((run / "result.json").read_text("utf-8"))
    kept = optuna.load_study(study_name=result["study"], storage=open_storage(None, run / "study.journal"))
    settings = kept.user_attrs["settings"]
    inventory = open_checkpoint(Path(settings["model"]), settings["name"]).inventory
    candidates = {
        r["number"]: Candidate.from_json(json.dumps(r["candidate"]), str(run)) for r in result["trials"]
    }
    trials = finished(kept)
    with tempfile.TemporaryDirectory() as folder:
        study = optuna.create_study(study_name=f"{result['study']}-timed-{time.time_ns()}")
        tracker = Tracker(study, uri, Path(folder), {}, inventory)
        begun, processor = time.perf_counter(), time.process_time()
        for trial in trials:
            tracker.log_trial(trial, candidates[trial.number])
        held = time.perf_counter() - begun
        tracker.flush()
        busy = time.perf_counter() - begun
        processor = time.process_time() - processor
    took = result["trial_stage"]["seconds"] / len(trials)
    return {
        "trials": len(trials),
        "seconds_per_trial": round(took, 4),
        "held_up_seconds_per_trial": round(held / len(trials), 5),
        "writing_seconds_per_trial": round(busy / len(trials), 5),
        "processor_seconds_per_trial": round(processor / len(trials), 5),
        "held_up_share": round(held / len(trials) / took, 5),
        "processor_share": round(processor / len(trials) / took, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--tracking-uri", help="where to write (default: a new SQLite file)")
    args = parser.parse_args()
    figures(measure(args.run, args.tracking_uri), None)


if __name__ == "__main__":
    run_command(main)
