"""Finds and loads lm-eval tasks: shipped ones, a user's own, and lm-eval's, in this order.

Only lm-eval's own tasks need a network: their data come from the Hugging Face
hub. The JSON data of the others are read into memory, so no cache is written.
"""

from __future__ import annotations

import difflib
import functools
import json
from pathlib import Path
from typing import Any

from spaces.errors import UserError, unknown

_SHIPPED = Path(__file__).with_name("tasks")


def known_tasks(tasks_path: Path | None = None) -> list[str]:
    """Names of the tasks that need no hub: shipped ones and those of the user's folder.

    Raises:
        UserError: `tasks_path` is no folder, a task file is not YAML, or a name is taken twice.
    """
    return sorted(task_files(tasks_path))


def task_files(tasks_path: Path | None = None) -> dict[str, Path]:
    """Absolute task file by task name. Groups, tags and files to include have no name of their own.

    Raises:
        UserError: See `known_tasks`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads `!function` tags without importing what they name."""

    Loader.add_multi_constructor("!", lambda *_: None)
    if tasks_path is not None and not tasks_path.is_dir():
        raise UserError(f"task folder {tasks_path} does not exist: give a folder with lm-eval task files")
    files: dict[str, Path] = {}
    for folder in (_SHIPPED, tasks_path):
        for path in sorted(folder.resolve().rglob("*.yaml")) if folder else ():
            try:
                task = yaml.load(path.read_text(encoding="utf-8"), Loader)
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise UserError(f"task file {path}: {error}") from None
            name = task.get("task") if isinstance(task, dict) else None
            if isinstance(name, str):
                if name in files:
                    raise UserError(f"task file {path}: task {name!r} is also in {files[name]}; rename it")
                files[name] = path
    return files


def load(name: str, files: dict[str, Path]) -> dict[str, Any]:
    """lm-eval's task objects of one task or of a group of lm-eval's, by name.

    Args:
        name: What to load.
        files: The local tasks, from `task_files`.

    Raises:
        UserError: The name is unknown, or the task or its data cannot be loaded.
    """
    if name not in files and name not in _hub().all_tasks:
        raise unknown("task", name, [*files, *difflib.get_close_matches(name, _hub().all_tasks)])
    try:
        tasks = _local_task(files[name], name) if name in files else _hub().load([name])["tasks"]
    except UserError:
        raise
    except Exception as error:  # lm-eval, datasets and their HTTP clients share no base class
        reason = f"{type(error).__name__}: {error}"[:300]
        if name in files:
            raise UserError(f"task {name!r} of {files[name]}: {reason}") from error
        raise UserError(
            f"task {name!r} needs the Hugging Face hub, which failed ({reason}); "
            f"tasks that need no hub: {', '.join(sorted(files))}"
        ) from error
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name!r} runs a model's code or needs more than text; choose another task")
    return tasks


def check(name: str, task: Any, max_length: int) -> None:
    """Refuses a task that a model of `max_length` tokens cannot be asked, or not twice alike.

    Raises:
        UserError: It has no items, samples its answers, or leaves no room for the question.
    """
    if not len(task.eval_docs):
        raise UserError(f"task {name!r} has no items; choose another task")
    if task.OUTPUT_TYPE != "generate_until":
        return
    from lm_eval.models.utils import normalize_gen_kwargs

    options = normalize_gen_kwargs(task.config.generation_kwargs or {})
    if options.get("do_sample"):
        raise UserError(f"task {name!r} samples its answers, which compares chance; choose another task")
    if options["max_gen_toks"] >= max_length:
        raise UserError(
            f"task {name!r} generates {options['max_gen_toks']} tokens, which leaves no room for the "
            f"question in a context of {max_length}; choose another task"
        )


@functools.cache
def _hub() -> Any:
    """lm-eval's index of its own tasks: thousands of files, so read once per process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _local_task(path: Path, name: str) -> dict[str, Any]:
    """lm-eval's task objects of one task file, by name."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    config = manager.task_index[name].cfg or {}
    options = dict(config.get("dataset_kwargs") or {})
    overrides: dict[str, Any] = {}
    if "data_files" in options:
        options["data_files"] = _absolute(options["data_files"], path.parent)
        overrides = {"dataset_kwargs": options}
        if config.get("dataset_path") == "json" and len(options) == 1:
            source = functools.partial(_in_memory, options["data_files"])
            overrides = {"dataset_kwargs": None, "custom_dataset": source}
    # lm-eval takes overrides of a task it knows by name only inside a group.
    return manager.load({"group": "moefit", "task": [{"task": name, **overrides}]})["tasks"]


def _absolute(files: Any, folder: Path) -> Any:
    """`data_files` (a path, or a list or mapping of them) relative to the task file, not the process."""
    if isinstance(files, dict):
        return {split: _absolute(part, folder) for split, part in files.items()}
    if isinstance(files, list):
        return [_absolute(part, folder) for part in files]
    return files if "://" in files else str(folder / files)


def _in_memory(files: Any, **_: Any) -> dict[str, Any]:
    """The dataset of JSON files by split; the `datasets` library's own reader would write a cache.

    Args:
        files: Absolute path, list of paths, or mapping of splits to either.
    """
    from datasets import Dataset

    splits = files if isinstance(files, dict) else {"train": files}
    return {
        split: Dataset.from_list(
            [row for path in ([paths] if isinstance(paths, str) else paths) for row in _rows(Path(path))]
        )
        for split, paths in splits.items()
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    """Items of a JSON or JSON-lines file."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"task data {path}: {error}; it needs to be JSON lines") from None
