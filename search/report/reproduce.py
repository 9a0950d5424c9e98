"""How a study is run again: its command line, from its settings."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from search import options
from search.report.facts import Facts
from search.report.page import Code, Text
from spaces.devices import DEVICES


def command_of(settings: dict[str, Any]) -> list[str]:
    """The command line of a study: every option that is not its default."""
    s, parser = settings, options.parser()
    command = ["python", "-m", "search.run", "--budget", f"{s['budget']}B", "--study", s["study"]]
    device = s["device"]["name"]
    memory, reference = s["device"]["memory"], Path(s["model"]) == options.REFERENCE_MODEL
    default = options.DEFAULT_TARGET if reference else s["model"]
    plain = {
        "model": None if reference else s["model"],
        "target": s["target"] if s["target"] != default else None,
        "device_memory": None if memory == DEVICES[device].memory else f"{memory}B",
        "types": ",".join(s.get("types") or ()),
        "tasks": ",".join(s["tasks"]) or "none",
        "device": device,
        "out": None if Path(s["out"]) == (Path("runs") / s["study"]).resolve() else s["out"],
    }
    for action in parser._actions:
        name = action.dest
        if name in ("help", "budget", "study", "dry_run", "workers", "no_export", "ray_address"):
            continue
        value = plain[name] if name in plain else s.get(name)
        if value not in (None, "", action.default):
            command += [action.option_strings[-1], str(value)]
    return command if s["export"] else [*command, "--no-export"]


def reproduce(facts: Facts) -> list[Text | Code]:
    """What a report ends with."""
    s, out = facts.opened.settings, facts.folder
    identity = facts.opened.study.user_attrs.get("identity") or {}
    study = ["--study", s["study"], "--trial", str(facts.number)]
    if s.get("storage") or out != (Path("runs") / s["study"]).resolve():
        study += ["--storage", s.get("storage") or str(out / "study.journal")]
    return [
        Text(
            f"The study's files lie in {out.name}/. The same command, seed and machine give the same trials; "
            f"model fingerprint {identity.get('model')}, texts {identity.get('texts')}."
        ),
        Code(
            "\n".join(
                shlex.join(command)
                for command in (
                    command_of(s),
                    ["python", "-m", "search.export", *study],
                    ["python", "-m", "search.report", *study],
                )
            )
        ),
    ]
