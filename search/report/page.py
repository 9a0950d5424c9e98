"""A page of headings, paragraphs, tables and pictures, written as HTML or as Markdown."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compression.files import atomic, write_text

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; color: #1f2937; background: #f5f6f8; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 40px 60px; background: #fff; }
h1 { font-size: 1.7em; line-height: 1.25; margin: .2em 0 .6em; }
h2 { font-size: 1.25em; margin: 2em 0 .5em; padding-top: .6em; border-top: 1px solid #e5e7eb; }
p { max-width: 75ch; }
table { border-collapse: collapse; margin: 1em 0; font-size: .88em; display: block; overflow-x: auto; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid #e5e7eb; white-space: nowrap; }
th { white-space: normal; min-width: 4em; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #9ca3af; font-weight: 600; }
tr.strong td { font-weight: 600; background: #eef6fb; }
figure { margin: 1.2em 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #4b5563; font-size: .9em; max-width: 85ch; }
nav { font-size: .92em; columns: 3; margin: 1em 0; } nav a { color: #2a6f97; text-decoration: none; }
nav a { display: block; }
pre { background: #f3f4f6; padding: 12px 16px; overflow-x: auto; font-size: .9em; }
.plot { margin: 1.2em 0; } .plot .pareto { grid-template-columns: minmax(0, 1fr) !important; }
.plot .pareto > div { height: 540px; }
"""


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph of plain words."""

    text: str


@dataclass(frozen=True)
class Code:
    """Commands to copy."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells as they are shown; `strong` are the positions of rows that stand out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG with a name for its file and a caption that says what is to be seen."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Interactive:
    """An HTML fragment with everything it needs, and the picture Markdown shows in its place."""

    fragment: str
    instead: Picture


Block = Heading | Text | Code | Table | Picture | Interactive


@dataclass
class Page:
    """A page that is built top down.

    Attributes:
        title: Of the document.
        blocks: What it holds, in order.
    """

    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block | None) -> None:
        """Appends what is there."""
        self.blocks += [b for b in blocks if b is not None]

    def write_html(self, path: Path) -> None:
        """One file that needs no other."""
        links = "".join(
            f'<a href="#{_anchor(b.text)}">{html.escape(b.text)}</a>'
            for b in self.blocks
            if isinstance(b, Heading)
        )
        body = "\n".join(_html(b) for b in self.blocks)
        write_text(
            path,
            "<!doctype html>\n"
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_STYLE}</style></head>\n<body><main><h1>{html.escape(self.title)}</h1>"
            f"<nav>{links}</nav>\n{body}\n</main></body></html>\n",
        )

    def write_markdown(self, path: Path) -> None:
        """A Markdown file, its pictures in a folder beside it."""
        folder = path.with_name(path.stem + "_pictures")
        parts = [f"# {self.title}"]
        for block in self.blocks:
            picture = block.instead if isinstance(block, Interactive) else block
            if isinstance(picture, Picture):
                with atomic(folder / f"{picture.name}.png") as stream:
                    stream.write(picture.png)
                parts.append(f"![{picture.caption}]({folder.name}/{picture.name}.png)\n\n*{picture.caption}*")
            else:
                parts.append(_markdown(picture))
        write_text(path, "\n\n".join(parts) + "\n")


def _anchor(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f'<h2 id="{_anchor(block.text)}">{html.escape(block.text)}</h2>'
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Code):
        return f"<pre>{html.escape(block.text)}</pre>"
    if isinstance(block, Table):
        head = "".join(f"<th>{html.escape(c)}</th>" for c in block.header)
        rows = "".join(
            f"<tr{' class=strong' if i in block.strong else ''}>"
            + "".join(f"<td>{html.escape(c)}</td>" for c in row)
            + "</tr>"
            for i, row in enumerate(block.rows)
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    if isinstance(block, Interactive):
        caption = html.escape(block.instead.caption)
        return f'<div class="plot">{block.fragment}</div><figcaption>{caption}</figcaption>'
    data = base64.b64encode(block.png).decode()
    caption = html.escape(block.caption)
    return (
        f'<figure id="{block.name}"><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _markdown(block: Heading | Text | Code | Table) -> str:
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Code):
        return f"```\n{block.text}\n```"
    lines = [list(block.header), ["---", *["---:"] * (len(block.header) - 1)]]
    lines += [[f"**{c}**" if i in block.strong else c for c in row] for i, row in enumerate(block.rows)]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)
