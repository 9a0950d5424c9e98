"""All cases by theme."""

from __future__ import annotations

from experiments.bad_inputs import (
    caches,
    candidates,
    checkpoints,
    gguf_files,
    measuring,
    search_options,
    search_places,
    studies,
    texts_and_tasks,
)
from experiments.bad_inputs.case import Case

THEMES: dict[str, tuple[Case, ...]] = {
    "Options of a search": search_options.CASES,
    "Paths, storages and addresses": search_places.CASES,
    "Texts and tasks": texts_and_tasks.CASES,
    "Checkpoint folders": checkpoints.CASES,
    "GGUF files": gguf_files.CASES,
    "Candidates and their export": candidates.CASES,
    "Finished studies": studies.CASES,
    "Files of finished studies": caches.CASES,
    "Commands that measure": measuring.CASES,
}

CASES: tuple[Case, ...] = tuple(case for cases in THEMES.values() for case in cases)
