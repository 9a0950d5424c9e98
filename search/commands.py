"""How every command ends: 0 when it worked, one line and 2 on bad input, 130 when interrupted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from spaces.errors import UserError


def quiet_libraries() -> None:
    """Telemetry and chatter off, unless the user's environment says otherwise."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }.items():
        os.environ.setdefault(name, value)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function and exits the process."""
    quiet_libraries()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; free space or check the path, then run it again",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
