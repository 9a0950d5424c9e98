"""From a `config.json` to an `Inventory`: one module per model family."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from spaces.architectures import deepseek_v3
from spaces.errors import UserError, unknown
from spaces.inventory import Inventory, published_targets, read_config

DESCRIBE: dict[str, Callable[[dict[str, Any], str], Inventory]] = {
    "deepseek_v3": deepseek_v3.describe,
}


def describe(config: dict[str, Any], name: str) -> Inventory:
    """The inventory of the model that `config` configures.

    Raises:
        UserError: Not an MoE, a family that is not known, or a field that is missing or wrong.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{name}: config.json has no model_type; is it a transformers model?")
    if model_type not in DESCRIBE:
        experts = any("expert" in key for key in config)
        if not experts:
            raise UserError(
                f"{name}: {model_type!r} is not a Mixture-of-Experts model (its config names no experts); "
                f"known families: {', '.join(sorted(DESCRIBE))}"
            )
        raise unknown("model family", model_type, DESCRIBE)
    try:
        return DESCRIBE[model_type](config, name)
    except KeyError as error:
        raise UserError(f"{name}: config.json lacks {error.args[0]!r}, which {model_type} needs") from error


def describe_folder(path: Path, name: str | None = None) -> Inventory:
    """The inventory of a checkpoint folder, called `name` or as the folder; errors name the folder."""
    config = read_config(path)
    try:
        return describe(config, name or path.resolve().name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def open_inventory(target: str) -> Inventory:
    """The inventory of a published target's name or of a model folder."""
    if target in published_targets():
        path = resources.files("spaces").joinpath("configs", f"{target}.json")
        with resources.as_file(path) as file:
            return describe(read_config(file), target)
    path = Path(target)
    if not path.exists() and "/" not in target:
        raise unknown("--target", target, published_targets())
    return describe_folder(path)
