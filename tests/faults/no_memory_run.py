"""`python -m tests.faults.no_memory_run ...` is search.run whose memory ends at the third round of scores."""

from __future__ import annotations

from typing import Any

from search.commands import run_command


def main() -> None:
    import torch

    from search.run import main as run
    from search.worker import Worker

    scored, score = [0], Worker.score

    def greedy(self: Worker, *args: Any) -> Any:
        scored[0] += 1
        if scored[0] == 3:
            torch.empty(2**50, dtype=torch.uint8)
        return score(self, *args)

    Worker.score = greedy  # type: ignore[method-assign]
    run()


if __name__ == "__main__":
    run_command(main)
