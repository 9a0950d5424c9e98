"""Fuzzes one target led by coverage: `python -m tests.hostile.atheris_targets NAME FOLDER [OPTIONS]`.

The options are libFuzzer's; FOLDER is for the files that the target reads.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Runs until libFuzzer is done, which ends the process itself; 0 where no input broke the rule."""
    import atheris

    name, folder = sys.argv[1], Path(sys.argv[2])
    with atheris.instrument_imports(include=["spaces", "compression", "search"]):
        from tests.hostile.targets import TARGETS, Judge
    judge = Judge(TARGETS[name], folder)
    atheris.Setup([sys.argv[0], *sys.argv[3:]], judge)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
