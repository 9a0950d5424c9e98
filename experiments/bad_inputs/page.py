"""The table of bad inputs as Markdown."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence

from experiments.bad_inputs.case import RUN, SEARCH, Case
from experiments.bad_inputs.table import CASES, THEMES

_LONGEST = 60  # characters of an argument that are shown


def _escaped(text: str) -> str:
    """What a terminal would act on, as escapes; long runs of one thing cut short."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]}...{line[-10:]}"


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`" if text else ""


def command(case: Case) -> str:
    """What is typed after `python -m`, without what makes every search right."""
    arguments = " ".join(shlex.quote(_escaped(a)) for a in case.arguments)
    return _code(f"{case.command} {'... ' * (case.command == RUN)}{arguments}".strip())


def _row(case: Case) -> str:
    says = " ... ".join(_escaped(part) for part in case.says)
    return f"| {case.wrong} | {command(case)} | {_code(says)} |"


def _wrapped(arguments: Sequence[str]) -> str:
    """Arguments as the rest of a command, in lines."""
    lines = textwrap.wrap(" ".join(arguments), 90, break_on_hyphens=False)
    return " \\\n".join(f"    {line}" for line in lines)


def page() -> str:
    """All themes."""
    parts = [
        f"""# Bad inputs

What is answered with one line on stderr and exit code 2, with nothing written: {len(CASES)} cases, each of
which is tried by `tests/hostile/test_bad_inputs.py`. The line begins with `error:`, names the option or file
and says what to do; the last column has words of it. `...` stands for a search that is right:

```
python -m {RUN} \\
{_wrapped(SEARCH)}
```

`model` is a checkpoint, `model.gguf` a GGUF model and `tiny` a finished study. Where the command looks right,
a file is what the first column says. This page is made by
`python -m experiments.bad_inputs docs/bad-inputs.md`."""
    ]
    for theme, cases in THEMES.items():
        head = [f"## {theme}", "", "| what is wrong | command | the line holds |", "|---|---|---|"]
        parts.append("\n".join([*head, *map(_row, cases)]))
    return "\n\n".join(parts) + "\n"
