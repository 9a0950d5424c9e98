"""Finds and loads lm-eval tasks: shipped ones, a user's own, and lm-eval's, in this order.

Only lm-eval's own tasks need a network: their data come from the Hugging Face
hub. The JSON data of the others are read into memory, so no cache is written. A user's
folder may be a stranger's: no code of it is run.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from spaces.errors import MALFORMED, UserError, unknown
from spaces.json_text import read_text

_SHIPPED = Path(__file__).with_name("tasks")
_LARGEST = 2**18  # bytes of a task file; lm-eval's own have a few thousand


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
                task = yaml.load(read_text(path, _LARGEST), Loader)
            except (*MALFORMED, yaml.YAMLError) as error:
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
    with _no_code():
        # lm-eval takes overrides of a task it knows by name only inside a group.
        return manager.load({"group": "moefit", "task": [{"task": name, **overrides}]})["tasks"]


@contextmanager
def _no_code() -> Iterator[None]:
    """Tasks loaded within the block cannot bring code: neither functions nor metrics of their own."""
    from lm_eval.api import registry
    from lm_eval.api import task as tasks
    from lm_eval.tasks import _yaml_loader as loader

    def function(name: str, folder: Path) -> NoReturn:
        raise UserError(
            f"task files of {folder} name the function {name!r} (!function); code of a task folder is never "
            "run; write what it does as a template"
        )

    def metric(name: str, from_the_hub: bool = False) -> Any:
        # lm-eval would fetch a script of that name, or take one of the working directory, and run it.
        if from_the_hub or name not in registry.metric_registry:
            raise UserError(f"metric {name!r} is none of lm-eval's own; code of a task folder is never run")
        return registry.get_metric(name)

    with (
        mock.patch.object(loader, "_import_func_in_yml", function),
        mock.patch.object(tasks, "get_metric", metric),
    ):
        yield


@functools.cache
def sandboxed_templates() -> Any:
    """lm-eval's template environment, in which templates cannot reach Python's own functions."""
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    own = lm_eval.utils.env
    sandbox = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    sandbox.filters.update(own.filters)
    return sandbox


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
        text = read_text(path)
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"task data {path}: {error}; it needs to be JSON lines") from None
