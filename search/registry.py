"""MLflow's model registry: the winner of a study as a version of the model named after it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

HASHED = 2 * 10**9
"""Bytes up to which a file's SHA-256 is taken: seconds."""


def sha256(path: Path) -> str | None:
    """Hex digest of a file; None of a folder and of what takes long to read."""
    if not path.is_file() or path.stat().st_size > HASHED:
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def register(client: Any, name: str, model: Path, run: str, tags: Mapping[str, str], description: str) -> str:
    """Registers a model where it lies, once per candidate; the alias `winner` is the newest.

    Nothing is copied. A tracking server takes no path outside its own artifacts as a source:
    there the source is the run's `winner` folder, and the tag `path` says where the model is.

    Args:
        client: An MlflowClient.
        name: Of the registered model.
        model: The GGUF file or checkpoint folder.
        run: Id of the run whose artifacts have the folder `winner`.
        tags: Figures; `candidate` tells versions apart.
        description: Markdown.

    Returns:
        The version.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=f"Winners of the moefit study {name}")
    tags = {**tags, "path": str(model)}
    known = client.search_model_versions(f"name = '{name}'")
    version = next((str(v.version) for v in known if v.tags.get("candidate") == tags["candidate"]), None)
    if version is None:
        remote = urlparse(client.tracking_uri).scheme in ("http", "https")
        source = f"runs:/{run}/winner" if remote else model.as_uri()
        made = client.create_model_version(name, source, run, tags=tags, description=description)
        version = str(made.version)
        for old in known:  # their files have been written over
            client.set_model_version_tag(name, str(old.version), "superseded_by", version)
    else:
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
        client.update_model_version(name, version, description)
    client.set_registered_model_alias(name, "winner", version)
    return version
