"""`python -m tests.faults.quick_run ...` is search.run with short repairs, for tests that start it often."""

from __future__ import annotations

from search.commands import run_command


def main() -> None:
    import evaluators.tuning
    from evaluators.tuning import Recipe

    evaluators.tuning.Recipe = lambda: Recipe(steps=4)  # type: ignore[assignment,misc]
    from search.run import main as run

    run()


if __name__ == "__main__":
    run_command(main)
