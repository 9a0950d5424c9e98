"""The files of a study's cache: what each is made of, and which of them may still be used.

Every derived file is sealed (`compression.sealed`). What it hangs on goes by these names:

    model         fingerprint of the checkpoint
    text NAME     digest of the windows of a text
    calibration   SHA-256 of calibration.npz
    expert sets   SHA-256 of expert_sets.json
    quantizer     version of ggml's quantizers

The bank's variants are named by a hash of all that decides them, and carry checksums of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from compression import ggml, sealed
from compression.calibration import Calibration
from compression.expert_pruning import rankings
from compression.files import atomic
from compression.sealed import UnsoundError
from evaluators.texts import TextSet
from search.console import console
from spaces.errors import MALFORMED, UserError

_DERIVED = (
    "windows-*.npz", "calibration.npz", "expert_sets.json", "experts.json", "base-*.npy", "base-*.json",
    "bank.json", "slopes/*.json", "scores/*.json", "evidence/*.json", "repairs/*.safetensors",
)  # fmt: skip


def save_text(text: TextSet, folder: Path) -> None:
    """Puts windows where workers find them."""
    file = folder / f"windows-{text.name}.npz"
    with atomic(file) as stream:
        np.savez(stream, windows=text.windows, sources=text.sources, bytes_per_token=text.bytes_per_token)
    sealed.seal(file, {f"text {text.name}": text.digest})


def load_text(name: str, folder: Path) -> TextSet:
    """Reads what `save_text` wrote.

    Raises:
        UserError: The file is missing or damaged.
    """
    file = folder / f"windows-{name}.npz"
    sealed.check(file, {})
    with np.load(file, allow_pickle=False) as data:
        sources = tuple(str(s) for s in data["sources"])
        return TextSet(name, data["windows"], sources, float(data["bytes_per_token"]))


def bank_index(folder: Path) -> dict[tuple[str, str], tuple[str, float]]:
    """(tensor, type) -> (key, error) of variants quantized so far; empty if there are none.

    Raises:
        UserError: The file is damaged, or of another calibration or quantizer.
    """
    file = folder / "bank.json"
    if not file.exists():
        return {}
    rows = json.loads(sealed.read(file, material(folder)))
    return {(tensor, type_name): (key, error) for tensor, type_name, key, error in rows}


def save_bank_index(folder: Path, index: Mapping[tuple[str, str], tuple[str, float]]) -> None:
    """Writes what `bank_index` reads."""
    rows = [[tensor, type_name, *value] for (tensor, type_name), value in sorted(index.items())]
    sealed.write(folder / "bank.json", json.dumps(rows), material(folder))


def text_digests(folder: Path, *names: str) -> dict[str, str]:
    """`text NAME` to the digest of each text that is there."""
    found = {f"text {n}": sealed.made_of(folder / f"windows-{n}.npz").get(f"text {n}") for n in names}
    return {name: digest for name, digest in found.items() if digest is not None}


def material(folder: Path, *texts: str) -> dict[str, str]:
    """What a score, cost or slope on some texts is made of: as far as the cache has it."""
    made = sealed.made_of(folder / "calibration.npz")
    out = {"quantizer": ggml.version(), **text_digests(folder, *texts)}
    for name, value in (("model", made.get("model")), ("calibration", made.get("itself"))):
        if value is not None:
            out[name] = value
    sets = sealed.made_of(folder / "expert_sets.json").get("itself")
    if sets is not None and texts:  # the bank holds all experts, whichever stay
        out["expert sets"] = sets
    return out


def sweep(folder: Path) -> None:
    """Removes derived files that are damaged, with a line each, or stale, with a line for those of a folder.

    What is removed is made anew by the stages that need it.
    """
    names = [p.name[len("windows-") : -len(".npz")] for p in folder.glob("windows-*.npz")]
    current = material(folder, *names)
    file = folder / "identity.json"
    with suppress(*MALFORMED):  # without it nobody said which model it is to be
        current |= {k: v for k, v in json.loads(file.read_text("utf-8")).items() if k == "model"}
    removed: dict[tuple[Path, str], list[Path]] = {}
    for pattern in _DERIVED:
        for path in sorted(folder.glob(pattern)):
            try:
                sealed.check(path, current, every=False)
            except UnsoundError as error:
                sealed.remove(path)
                removed.setdefault((path.parent if error.stale else path, error.reason), []).append(path)
    for (place, reason), paths in removed.items():
        which = str(paths[0]) if len(paths) == 1 else f"{place}: {len(paths)} files"
        console.print(f"note: {which}: {reason}: made anew", soft_wrap=True)


def study_identity_of_cache(folder: Path) -> dict[str, str]:
    """What a study's parameters mean by this cache.

    Returns:
        `calibration`: hash of the order of experts by every criterion and of the expert sets, which
        a trial's choice of experts names by number (hashes of the measured numbers would differ between
        machines); `quantizer`: version of the quantizers that its types stand for.
    """
    calibration = Calibration.load(folder / "calibration.npz")
    order = rankings(calibration, range(len(calibration.routing["tokens"])))
    file = folder / "expert_sets.json"
    sets = file.read_text("utf-8") if file.exists() else ""
    digest = hashlib.sha256((json.dumps(order) + sets).encode()).hexdigest()[:16]
    return {"calibration": digest, "quantizer": ggml.version()}


def same_ingredients(known: Mapping[str, str] | None, found: Mapping[str, str], study: str) -> None:
    """Refuses a study whose trials were made with another calibration or quantizer.

    Raises:
        UserError: Names what differs.
    """
    for name, value in (known or {}).items():
        if found.get(name) != value:
            raise UserError(
                f"study {study!r} was made with another {name} ({value}, now {found.get(name)}): its trials "
                "mean something else; give this search a --study name of its own"
            )
