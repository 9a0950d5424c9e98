"""Finished studies whose caches and results are damaged or gone.

A search makes such files anew; who exports or reports needs them as they were.
"""

from __future__ import annotations

import json
from dataclasses import replace

from experiments.bad_inputs.case import Case, Make, World
from experiments.bad_inputs.search_places import PNG
from experiments.bad_inputs.studies import content, cut, exported, reported

_RUN, _CACHE = "runs/tiny", "runs/tiny/cache"


def flipped(name: str) -> Make:
    """A file with one bit changed in its middle."""

    def change(raw: bytes) -> bytes:
        middle = len(raw) // 2
        return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]

    return lambda world: world.edit(name, change)


def gone(*names: str) -> Make:
    def make(world: World) -> None:
        for name in names:
            (world.folder / name).unlink()

    return make


def flipped_variants(world: World) -> None:
    """A bit changed in every variant of one tensor."""
    rows = json.loads((world.folder / _CACHE / "bank.json").read_text("utf-8"))
    smallest = "blk.0.attn_kv_a_mqa.weight"
    for tensor, _, key, _ in rows:
        if tensor == smallest:
            flipped(f"{_CACHE}/bank/{key[:2]}/{key}.q")(world)


def no_variants(world: World) -> None:
    """An index of variants that are not there."""
    for file in (world.folder / _CACHE / "bank").rglob("*.q"):
        file.unlink()


_BANK = f"{_CACHE}/bank/*"

CASES: tuple[Case, ...] = (
    exported(
        "a cache that is gone", "", "runs/tiny/cache: the study's calibration and bank are gone",
        make=gone(f"{_CACHE}/bank.json"),
    ),
    exported(
        "a calibration with a flipped bit", "", "calibration.npz: damaged",
        make=flipped(f"{_CACHE}/calibration.npz"),
    ),
    exported(
        "a calibration cut short", "", "calibration.npz: damaged", make=cut(f"{_CACHE}/calibration.npz", 0.5),
    ),
    exported(
        "a calibration of something else", "", "calibration.npz: damaged",
        make=content(f"{_CACHE}/calibration.npz", PNG),
    ),
    exported(
        "a calibration without its seal", "", "calibration.npz: without a checksum",
        make=gone(f"{_CACHE}/calibration.npz.seal"),
    ),
    exported(
        "a seal of something else", "", "calibration.npz: damaged",
        make=content(f"{_CACHE}/calibration.npz.seal", PNG),
    ),
    exported(
        "a bank's index with a flipped bit", "", "bank.json: damaged", make=flipped(f"{_CACHE}/bank.json"),
    ),
    exported("a bank's index cut short", "", "bank.json: damaged", make=cut(f"{_CACHE}/bank.json", 0.5)),
    exported(
        "expert sets of something else", "", "expert_sets.json: damaged",
        make=content(f"{_CACHE}/expert_sets.json", "{}"),
    ),
    exported(
        "a choice of kernels that is garbage", "", "experts.json: damaged",
        make=content(f"{_CACHE}/experts.json", "garbage"),
    ),
    exported(
        "windows cut short", "", "windows-search.npz: damaged", make=cut(f"{_CACHE}/windows-search.npz", 0.5),
    ),
    exported(
        "base states cut short", "", "base-search.npy: damaged", make=cut(f"{_CACHE}/base-search.npy", 0.5),
    ),
    exported(
        "base states with a flipped bit", "", "base-search.npy: damaged",
        make=flipped(f"{_CACHE}/base-search.npy"),
    ),
    replace(
        exported(
            "variants with a flipped bit", "", "bank/", "damaged", "run the search again",
            make=flipped_variants,
        ),
        leaves=(_BANK,),
    ),
    exported(
        "variants that are gone", "", "bank/", "cannot be read",
        make=no_variants,
    ),
    replace(
        reported(
            "option costs that are garbage", "", "option costs are not complete",
            make=content(f"{_CACHE}/option_costs.jsonl", "garbage\n" * 9),
        ),
        slow=True,
    ),
    reported(
        "a result that is gone", "", "runs/tiny/result.json: not there yet", make=gone(f"{_RUN}/result.json"),
    ),
    reported("a result cut short", "", "runs/tiny/result.json", make=cut(f"{_RUN}/result.json", 0.5)),
    reported(
        "a result that is a list", "", "runs/tiny/result.json", make=content(f"{_RUN}/result.json", "[]"),
    ),
    reported(
        "a result of an older version", "", "runs/tiny/result.json: is of an older version",
        make=content(f"{_RUN}/result.json", "{}"),
    ),
)  # fmt: skip
